"""What each condensed image starts from: real images, RDED's crops, images nearest to cluster centres, or noise.

Real image initialisation, EDC section 3.2, Eq. 3. Each kind picks row numbers of the real set and remembers them. The
first k images of a class are a usable set of k images a class, whatever the kind.
"""

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from threadpoolctl import threadpool_limits
from torch import Generator, Tensor

from . import canvas, rded, work
from .errors import InputError
from .pixels import Space, to_float
from .recipe import Recipe
from .selection import users
from .source import RealSet, check_ipc
from .work import Session, Unit


if TYPE_CHECKING:
    from .networks import Network
    from .observers import Observers

VERSION = 1


class Initial(NamedTuple):
    images: Tensor
    """uint8 (C*ipc, 3, s, s), class-major; canvases where `images.grid` says so."""
    source_rows: Tensor
    """int32 (C*ipc, tiles): row of the training split each tile comes from; -1: none."""
    fingerprint: str


def obtain(recipe: Recipe, real: RealSet, observers: "Observers", session: Session) -> Initial:
    """The initial images; a class is a unit of work. Raises InputError as `check` does."""
    check(recipe, real)
    section, grid = recipe.initialize, recipe.images.grid
    chosen = users(recipe).get("initialize", [])
    seen = {
        "source": real.fingerprint,
        "observers": [observers.fingerprint(*entry) for entry in chosen],
        "precision": session.precision if chosen else None,
    }
    inputs = work.fingerprint("initial", VERSION, **_facts(recipe), **seen)
    labels = {Unit("initial", f"class-{label:04d}", inputs): label for label in range(len(real.names))}
    images_each, recipe = recipe.ipc, _of_pictures(recipe)

    @cache
    def networks() -> list["Network"]:
        return [observers.load(*entry) for entry in chosen]

    scores = None
    if section.kind == "rded" and section.variant == "edc":
        scores = rded.score_all(recipe, real, networks, seen, session)

    @cache
    def candidates() -> list[Tensor]:
        found = [_candidates(recipe, real, label, scores) for label in labels.values()]
        real.keep(torch.cat(found))  # all at once: one pass over a stream
        return found

    def make(unit: Unit, generator: Generator, _progress: work.Progress) -> tuple[dict[str, Tensor], dict]:
        label = labels[unit]
        if section.kind == "noise":
            z = torch.randn((images_each, 3, real.size, real.size), generator=generator)
            images, rows = Space(recipe.source, z.device).to_bytes(z), torch.full((recipe.ipc, 1), -1)
        elif section.kind == "rded":
            images, rows = rded.select(recipe, real, label, candidates()[label], networks(), session, generator)
        else:
            rows = candidates()[label]
            if section.kind == "kmeans":
                rows = _nearest(recipe, real, rows, networks()[0], session, generator)
            images, rows = real.images(rows), rows[:, None]
        if section.kind != "noise":  # which fills the canvas itself: shrunk it would be smooth
            images = canvas.compose(images, grid)
        return {"images": images, "source_rows": rows.view(images_each, -1).int()}, {"class": real.names[label]}

    work.run(list(labels), make, session, seed=recipe.seed, label="initial images")
    found = [session.store.load(unit) for unit in labels]
    images, rows = (torch.cat([unit[name] for unit in found]) for name in ("images", "source_rows"))
    return Initial(images, rows, inputs)


def check(recipe: Recipe, real: RealSet) -> None:
    """Raises InputError where the classes of the set cannot give the images asked for.

    What the recipe alone shows to be impossible is `rules.validate`'s.
    """
    section, ipc, each = recipe.initialize, recipe.ipc, recipe.images.grid**2
    if len(real.names) < 2:
        raise InputError(f"source.path: {real.id} has one class, '{real.names[0]}'; a classifier needs two")
    if section.kind == "noise" and not recipe.relabel.controls:
        ipc = each = 1  # it starts from no image, but its moments need one, and the random controls as many as the set
    elif section.kind == "rded" and section.variant == "rded":
        each *= section.factor**2
    check_ipc(real, ipc, each)


def _of_pictures(recipe: Recipe) -> Recipe:
    """The recipe of a set with an image for each picture of this one's."""
    return recipe.model_copy(update={"ipc": recipe.ipc * recipe.images.grid**2})


def random_rows(real: RealSet, ipc: int, generator: Generator) -> Tensor:
    """Rows int64 (C*ipc,) of random real images, class-major, without replacement."""
    return torch.cat([_draw(real.rows(label), ipc, generator) for label in range(len(real.names))])


def _facts(recipe: Recipe) -> dict:
    """Every key that decides the images of the kind that is used."""
    section = recipe.initialize
    keys = {
        "real": [],
        "noise": [],
        "kmeans": ["batch", "images_per_class", "iterations"],
        "rded": ["batch", "images_per_class", "variant", "factor", "crop_area"],
    }[section.kind]
    facts = {"kind": section.kind, "ipc": recipe.ipc, "seed": recipe.seed}
    facts |= {key: getattr(section, key) for key in keys} | canvas.facts(recipe.images.grid)
    if section.kind == "noise":
        facts |= {"mean": recipe.source.mean, "std": recipe.source.std}
    if section.kind == "rded" and section.variant == "rded":
        facts["crops"] = section.crops
    if section.kind == "rded" and section.difficulty != "easiest":  # sets made before the key was there are found
        facts["difficulty"] = section.difficulty
    return facts


def _draw(rows: Tensor, count: int, generator: Generator) -> Tensor:
    return rows[torch.randperm(len(rows), generator=generator)[:count]]


def _candidates(recipe: Recipe, real: RealSet, label: int, scores: Tensor | None) -> Tensor:
    """The rows of a class that its images are made from, in the order of their choice."""
    section, rows = recipe.initialize, real.rows(label)
    if scores is not None:
        return rows[scores[rows].argsort(stable=True)[: section.images_per_class]]
    generator = work.generator(recipe.seed, "initial rows", f"class-{label:04d}")
    return _draw(rows, recipe.ipc if section.kind == "real" else section.images_per_class, generator)


def _nearest(
    recipe: Recipe, real: RealSet, rows: Tensor, network: "Network", session: Session, generator: Generator
) -> Tensor:
    """Rows (ipc,) nearest to the centres of k-means in the observer's features, the largest cluster first."""
    rows, found = rows.sort().values, []
    with torch.no_grad():
        for images, _, _ in real.batches(rows, recipe.initialize.batch):
            with session.autocast():
                found.append(network.features(to_float(images, session.device)).flatten(1).double().cpu())
    features = torch.cat(found)
    seed = int(torch.randint(2**31 - 1, (), generator=generator))
    from sklearn.cluster import KMeans  # takes seconds to import

    means = KMeans(recipe.ipc, n_init=10, max_iter=recipe.initialize.iterations, random_state=seed)
    with threadpool_limits(1):  # its threads add up in the order in which they finish
        means.fit(features.numpy())
    return rows[nearest(features, torch.from_numpy(means.cluster_centers_), torch.from_numpy(means.labels_))]


def nearest(features: Tensor, centres: Tensor, clusters: Tensor) -> Tensor:
    """Distinct indices (k,) of `features` (n, D), each nearest to one of the `centres` (k, D), largest cluster first.

    `clusters` (n,) are the cluster numbers of the features.
    """
    sizes = torch.bincount(clusters.long(), minlength=len(centres))
    distances = torch.cdist(centres, features, compute_mode="donot_use_mm_for_euclid_dist")
    picked = []
    for centre in sizes.argsort(descending=True, stable=True):
        picked.append(distances[centre].argmin())
        distances[:, picked[-1]] = torch.inf
    return torch.stack(picked)
