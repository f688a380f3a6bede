"""What each condensed image starts from: real images, RDED's crops, images nearest to cluster centres, or noise.

Each kind picks row numbers of the real set and remembers them. The first k images of a class are a usable set of k
images a class, whatever the kind.
"""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch import Generator, Tensor

from . import work
from .errors import InputError
from .pixels import CROP_DRAWS
from .recipe import Recipe, selected
from .source import RealSet, check_ipc
from .work import Session, Unit


if TYPE_CHECKING:
    from .networks import Network
    from .observers import Observers

VERSION = 1
SCORED = 8192  # rows a unit of the full-image scores (edc variant)
EDC_IMAGES, EDC_CROPS = 4 * 64, 4  # the edc variant draws 4 batches of 64 images, 4 crops each


class Initial(NamedTuple):
    images: Tensor
    """uint8 (C*ipc, 3, s, s), class-major."""
    source_rows: Tensor
    """int32 (C*ipc, tiles): row of the training split each tile comes from; -1: none."""
    fingerprint: str


def obtain(recipe: Recipe, real: RealSet, observers: "Observers", session: Session) -> Initial:
    """The initial images; a class is a unit of work. Raises InputError as `check` does."""
    check(recipe, real)
    section = recipe.initialize
    chosen = _observers(recipe)
    seen = {
        "source": real.fingerprint,
        "observers": [observers.fingerprint(*entry) for entry in chosen],
        "precision": recipe.precision if chosen else None,
    }
    inputs = work.fingerprint("initial", VERSION, **_facts(recipe), **seen)
    labels = {Unit("initial", f"class-{label:04d}", inputs): label for label in range(len(real.names))}

    @cache
    def networks() -> list["Network"]:
        return [observers.load(*entry) for entry in chosen]

    scores = None
    if section.kind == "rded" and section.variant == "edc":
        scores = _score_all(recipe, real, networks, seen, session)

    @cache
    def candidates() -> list[Tensor]:
        found = [_candidates(recipe, real, label, scores) for label in labels.values()]
        real.keep(torch.cat(found))  # all at once: one pass over a stream
        return found

    def make(unit: Unit, generator: Generator, _progress: work.Progress) -> tuple[dict[str, Tensor], dict]:
        label = labels[unit]
        if section.kind == "noise":
            images, rows = _noise(recipe, real.size, generator), torch.full((recipe.ipc, 1), -1)
        elif section.kind == "rded":
            images, rows = _tiles(recipe, real, label, candidates()[label], networks(), session, generator)
        else:
            rows = candidates()[label]
            if section.kind == "kmeans":
                rows = _nearest(recipe, real, rows, networks()[0], session, generator)
            images, rows = real.images(rows), rows[:, None]
        return {"images": images, "source_rows": rows.int()}, {"class": real.names[label]}

    work.run(list(labels), make, session, seed=recipe.seed, label="initial images")
    found = [session.store.load(unit) for unit in labels]
    images, rows = (torch.cat([unit[name] for unit in found]) for name in ("images", "source_rows"))
    return Initial(images, rows, inputs)


def check(recipe: Recipe, real: RealSet) -> None:
    """Raises InputError where the classes, the observers or the keys cannot give the initial images asked for."""
    section, need = recipe.initialize, recipe.ipc
    if section.kind == "noise":
        return
    check_ipc(real, recipe.ipc)
    if section.kind in ("rded", "kmeans") and not recipe.observers.networks:
        raise InputError(f"initialize.kind: {section.kind} needs an observer; list one in observers.networks")
    if section.kind == "kmeans" and len(section.observers or [0]) > 1:
        raise InputError("initialize.observers: kmeans uses the features of one observer; name one")
    if section.kind == "rded":
        need *= section.factor**2
        if section.variant == "edc":
            if need > EDC_IMAGES * EDC_CROPS:
                raise InputError(
                    f"initialize.variant: edc draws {EDC_IMAGES * EDC_CROPS} crops a class and {need} are needed; "
                    f"use variant rded"
                )
            return
        smallest = int(torch.bincount(real.labels[real.labels >= 0], minlength=len(real.names)).min())
        if smallest < need:
            raise InputError(
                f"initialize.factor: {recipe.ipc} images of {section.factor}x{section.factor} tiles need {need} real "
                f"images a class, and {real.id} has a class with {smallest}; lower factor or ipc"
            )
    if section.kind in ("rded", "kmeans") and section.images_per_class < need:
        raise InputError(f"initialize.images_per_class: {section.images_per_class} is fewer than {need}; raise it")


def random_rows(real: RealSet, ipc: int, generator: Generator) -> Tensor:
    """Rows int64 (C*ipc,) of random real images, class-major, without replacement."""
    return torch.cat([_draw(real.rows(label), ipc, generator) for label in range(len(real.names))])


def to_float(images: Tensor, device: torch.device) -> Tensor:
    """uint8 to float32 in [0, 1] on `device`."""
    return images.to(device).float().div_(255)


def _observers(recipe: Recipe) -> list[tuple[str, int]]:
    if recipe.initialize.kind not in ("rded", "kmeans"):
        return []
    chosen = selected(recipe, recipe.initialize.observers)
    return chosen[:1] if recipe.initialize.kind == "kmeans" else chosen


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
    facts |= {key: getattr(section, key) for key in keys}
    if section.kind == "noise":
        facts |= {"mean": recipe.source.mean, "std": recipe.source.std}
    if section.kind == "rded" and section.variant == "rded":
        facts["crops"] = section.crops
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


def _noise(recipe: Recipe, size: int, generator: Generator) -> Tensor:
    z = torch.randn((recipe.ipc, 3, size, size), generator=generator)
    mean, std = (torch.tensor(values)[:, None, None] for values in (recipe.source.mean, recipe.source.std))
    return _to_uint8(z * std + mean)


def _to_uint8(x: Tensor) -> Tensor:
    return x.clamp(0, 1).mul(255).round().to(torch.uint8)


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


def _score_all(
    recipe: Recipe, real: RealSet, networks: Callable[[], list["Network"]], seen: dict, session: Session
) -> Tensor:
    """Cross-entropy float32 (N,) of every whole image (edc.md 1.2 a).

    Ranges of rows are the units, not classes: a stream passes once.
    """
    inputs = work.fingerprint("scores", VERSION, batch=recipe.initialize.batch, **seen)
    rows = real.rows()
    parts = {Unit("scores", f"rows-{index:05d}", inputs): part for index, part in enumerate(rows.split(SCORED))}

    def make(unit: Unit, _generator: Generator, _progress: work.Progress) -> tuple[dict[str, Tensor], dict]:
        batches = real.batches(parts[unit], recipe.initialize.batch)
        found = [score(networks(), images, labels, real.size, session) for images, labels, _ in batches]
        return {"scores": torch.cat(found)}, {}

    work.run(list(parts), make, session, seed=recipe.seed, label="scores of real images")
    scores = torch.full((len(real.labels),), torch.inf)
    scores[rows] = torch.cat([session.store.load(unit)["scores"] for unit in parts])
    return scores


@torch.no_grad()
def score(networks: list["Network"], images: Tensor, labels: Tensor, size: int, session: Session) -> Tensor:
    """Cross-entropy float32 (n,) of the networks' mean logits against `labels` (n,), on the CPU.

    Images uint8 (n, 3, h, w) smaller than `size` are centred in zeros of each network's normalised space (RDED).
    """
    x, logits = to_float(images, session.device), 0
    for network in networks:
        with session.autocast():
            logits = logits + network(_centred(x, size, network.facts["mean"])).float()
    return F.cross_entropy(logits / len(networks), labels.to(session.device), reduction="none").cpu()


def _centred(x: Tensor, size: int, mean: list[float]) -> Tensor:
    if x.shape[-1] == size:
        return x
    height, width = x.shape[-2:]
    top, left = (size - height) // 2, (size - width) // 2
    canvas = torch.tensor(mean, device=x.device)[:, None, None].repeat(len(x), 1, size, size)
    canvas[..., top : top + height, left : left + width] = x
    return canvas


def _tiles(
    recipe: Recipe,
    real: RealSet,
    label: int,
    rows: Tensor,
    networks: list["Network"],
    session: Session,
    generator: Generator,
) -> tuple[Tensor, Tensor]:
    """Images uint8 (ipc, 3, s, s) of factor x factor crops with the lowest cross-entropy, and their rows.

    rded: the best of `crops` square crops of each image, of the tile's side. edc (edc.md 1.2 b, c): the best of 1,024
    crops with the usual ratios, of the image's side and resized afterwards; several may come from one image.
    """
    section, factor = recipe.initialize, recipe.initialize.factor
    need = recipe.ipc * factor**2
    if section.variant == "rded":
        side, ratio, count = real.size // factor, (1.0, 1.0), section.crops
    else:
        rounds = -(-EDC_IMAGES // len(rows))
        rows = torch.cat([_draw(rows, len(rows), generator) for _ in range(rounds)])[:EDC_IMAGES]
        side, ratio, count = real.size, (3 / 4, 4 / 3), EDC_CROPS
    draws = torch.rand((len(rows), count, CROP_DRAWS), generator=generator, dtype=torch.float64)
    crops, scores, sources = [], [], []
    for images, source in real.crops(
        rows, max(1, section.batch // count), draws, side,
        area=tuple(section.crop_area), ratio=ratio, flip=section.variant == "edc",
    ):  # fmt: skip
        labels = torch.full((images.shape[0] * count,), label)
        found = score(networks, images.flatten(0, 1), labels, real.size, session).view(-1, count)
        if section.variant == "rded":
            best = found.argmin(1, keepdim=True)
            found, images = found.gather(1, best), images[torch.arange(len(images)), best[:, 0]][:, None]
        crops.append(images.flatten(0, 1))
        scores.append(found.flatten())
        sources.append(source.repeat_interleave(found.shape[1]))
    order = torch.cat(scores).argsort(stable=True)[:need]
    if section.variant == "edc":  # consecutive ranks share an image; RDED's are ipc apart
        order = order.view(recipe.ipc, -1).T.flatten()
    return tile(torch.cat(crops)[order], factor, real.size), torch.cat(sources)[order].view(-1, recipe.ipc).T


def tile(crops: Tensor, factor: int, size: int) -> Tensor:
    """uint8 (n, 3, size, size) from crops (factor^2 * n, 3, h, w): tile t of image j is crop t*n + j, row-major.

    The first `size % factor` rows and columns of tiles are a pixel larger, as in RDED; crops are resized bilinearly.
    """
    sides = [size // factor + (index < size % factor) for index in range(factor)]
    grid = crops.unflatten(0, (factor, factor, -1))
    strips = [
        torch.cat([_resized(grid[i, j], (sides[i], sides[j])) for j in range(factor)], -1) for i in range(factor)
    ]
    return torch.cat(strips, -2)


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    if images.shape[-2:] == size:
        return images
    resized = F.interpolate(images.float(), size, mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)
