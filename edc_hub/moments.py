"""Moments of the observers' layers over the real set, class by class (EDC Eq. 2 and 5).

For image i of class c let m_i and v_i be the mean and the biased variance of a channel over positions, or of a tile
over channels and positions. Kept are n_c, mean_c = avg m_i, within_c = avg v_i and between_c = avg (m_i - mean_c)^2;
what images are asked to have follows from these (targets.py).
"""

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from . import work
from .networks import Network
from .observers import Observers
from .pixels import View, to_float
from .realset import RealSet
from .recipe import Recipe
from .selection import selected
from .sites import Kind
from .taps import Layout, Taps
from .targets import STAGE, VERSION, Key, Moments
from .work import Progress, Session, Unit


STREAM_PARTS = 8  # a part of a stream holds every class, so its sums are as large as the result: a few parts only


def obtain(recipe: Recipe, real: RealSet, observers: Observers, session: Session) -> Moments:
    """Moments of every observer that synthesis matches: one pass over the real set feeds all that are missing.

    Units are, in turn: the shift that sums are taken about; parts of the rows, for all observers; one file an
    observer, after which the parts are removed.
    """
    keys = list(dict.fromkeys(selected(recipe, recipe.synthesize.observers)))
    settings = _settings(recipe, real, session)
    units = {
        (name, epoch): Unit(
            STAGE,
            f"{name}@{epoch}",
            work.fingerprint(STAGE, VERSION, observer=observers.fingerprint(name, epoch), **settings),
        )
        for name, epoch in keys
    }
    parts = _parts(recipe, real)
    there = work.present([units[key] for key in keys], session)
    wanted = [key for key, found in zip(keys, there, strict=True) if not found]
    # the parts of an earlier run that was killed between two observers' files serve as well
    for some in (keys, wanted):
        mark = work.fingerprint(STAGE, VERSION, observers=[units[key].fingerprint for key in some])
        shift_unit = Unit(STAGE, "shift", mark)
        part_units = [Unit(STAGE, f"rows-{index:05d}", mark) for index in range(len(parts))]
        if wanted and all(work.present([shift_unit, *part_units], session)):
            break
    networks: dict[Key, tuple[Network, Taps]] = {}

    def tapped(key: Key) -> tuple[Network, Taps]:
        if key not in networks:
            network = observers.load(*key)
            Taps(network, patch=recipe.moments.patch, layers=recipe.synthesize.layers)  # refused here if it has none
            networks[key] = network, Taps(network, patch=recipe.moments.patch)
        return networks[key]

    def shift(*_) -> tuple[dict[str, Tensor], dict]:
        rows = real.rows()[: recipe.moments.batch]
        images = next(real.batches(rows, recipe.moments.batch, view=_view(recipe)))[0]
        tensors = {}
        for key in some:
            network, taps = tapped(key)
            tensors[_text(key)] = forward(network, taps, images, session)[0].mean(0)
        return tensors, {}

    @cache
    def about() -> dict[tuple[str, int], Tensor]:
        """Of each observer, read once: a run that overtakes this one removes it when all files are there."""
        try:
            kept = session.store.load(shift_unit)
        except FileNotFoundError:  # already; no tap has a shift yet
            kept, _ = shift()
        return {key: kept[_text(key)].to(session.device) for key in some}

    def part(unit: Unit, _: torch.Generator, progress: Progress) -> tuple[dict[str, Tensor], dict]:
        for key, value in about().items():
            tapped(key)[1].shift = value
        watching = {_text(key): tapped(key) for key in some}
        return add_up(parts[int(unit.name[5:])], real, recipe, watching, session, progress), {}

    def observer(unit: Unit, *_) -> tuple[dict[str, Tensor], dict]:
        key = next(key for key in keys if units[key] == unit)
        try:
            sums = _combine(_text(key), [shift_unit, *part_units], len(real.names), session)
        except FileNotFoundError:  # another run made the files of all observers meanwhile, and removed the parts
            return session.store.load(unit), session.store.facts(unit)
        network, taps = tapped(key)
        layout = [(s.name, s.kind, s.length) for s in taps.layout.segments]
        return finish(*sums, running=_running(network, taps.layout)), {"layout": layout}

    if wanted:
        seed = recipe.observers.seed
        work.run([shift_unit], shift, session, seed=seed, label="moments: shift")
        work.run(part_units, part, session, seed=seed, label="moments")
        work.run([units[key] for key in keys], observer, session, seed=seed, label="moments: observers")
        if session.state.is_main_process:
            for unit in (shift_unit, *part_units):
                session.store.path(unit).unlink(missing_ok=True)
    return Moments(recipe, units, session)


def _settings(recipe: Recipe, real: RealSet, session: Session) -> dict:
    """What decides the moments of any observer; targets derived later are none of it."""
    section = recipe.moments
    settings = {"source": real.fingerprint, "stream": recipe.source.streaming}
    settings |= {key: getattr(section, key) for key in ("batch", "rows", "patch", "augment")}
    settings["precision"] = session.precision
    view = _view(recipe)
    return settings if view is None else {**settings, "view": list(view)}


def _view(recipe: Recipe) -> View | None:
    section = recipe.moments
    if section.augment == "none":
        return None
    return View(section.augment, recipe.observers.seed, section.pad, tuple(section.crop_area), section.flip)


def _parts(recipe: Recipe, real: RealSet) -> list[Tensor]:
    """Row numbers of each unit. Class by class, so that a part's sums are of a few classes; a stream in its order."""
    rows = real.rows()
    if recipe.source.streaming:
        return list(rows.split(max(recipe.moments.rows, -(-len(rows) // STREAM_PARTS))))
    return list(rows[real.labels[rows].argsort(stable=True)].split(recipe.moments.rows))


def _text(key: Key) -> str:
    return f"{key[0]}@{key[1]}"


def forward(network: Network, taps: Taps, images: Tensor, session: Session) -> tuple[Tensor, Tensor]:
    """Moments (B, F) about the taps' shift, float32 on the device, of images uint8 (B, 3, s, s)."""
    with torch.no_grad(), session.autocast(), taps:
        network(to_float(images, session.device))
    return taps.collect()


def of_images(
    network: Network, images: Tensor, shift: Tensor, layers: Sequence[Kind], recipe: Recipe, session: Session
) -> tuple[Tensor, Tensor]:
    """Moments (n, F) about `shift` (F,), float32 on the device, of images uint8 (n, 3, s, s), a few at a time.

    `layers` are kinds of them, as in `synthesize.layers`.
    """
    taps = Taps(network, patch=recipe.moments.patch, layers=layers)
    taps.shift = shift
    parts = [forward(network, taps, part, session) for part in images.split(recipe.moments.batch)]
    first, second = (torch.cat(each) for each in zip(*parts, strict=True))
    return first, second


def class_sums(first: Tensor, second: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Classes present, int64 (k,), and float64 sums over their images (3, k, F) of m - s, v and (m - s)^2.

    `first`, `second` are moments (B, F) about a shift s; `labels` int64 (B,). What is summed in float32 over the few
    images of a class is taken about their mean; all that could cancel is put together in float64.
    """
    present, index, counts = labels.unique(return_inverse=True, return_counts=True)
    weights = F.one_hot(index).t().to(first) / counts.to(first)[:, None]
    centre = weights @ first
    apart = first - (centre if len(present) == 1 else centre[index.to(first.device)])
    means = [centre, weights @ apart, weights @ apart.square_(), weights @ second]
    centre, rest, square, total = (mean.cpu().double() for mean in means)
    mean = centre + rest
    square = mean.square() + square - rest.square()
    return present, torch.stack([mean, total - square, square]) * counts[:, None]


def add_up(
    rows: Tensor,
    real: RealSet,
    recipe: Recipe,
    networks: dict[str, tuple[Network, Taps]],
    session: Session,
    progress: Progress,
) -> dict[str, Tensor]:
    """Sums over some rows for every observer, each image decoded once.

    Returns `classes` int64 (k,), `counts` int64 (k,), and an observer's sums float64 (3, k, F) under its name.
    """
    classes, counts = real.labels[rows].unique(return_counts=True)
    sums = progress.load()
    if sums is None:
        sizes = {name: taps.layout.size for name, (_, taps) in networks.items()}
        sums = {name: torch.zeros(3, len(classes), size, dtype=torch.float64) for name, size in sizes.items()}
        sums["done"] = torch.zeros((), dtype=torch.int64)
    left = rows[int(sums["done"]) :]
    batches = real.batches(left, recipe.moments.batch, view=_view(recipe))
    for images, labels, _ in session.bar(
        batches, total=-(-len(left) // recipe.moments.batch), unit="batch", leave=False
    ):
        for name, (network, taps) in networks.items():
            present, partial = class_sums(*forward(network, taps, images, session), labels)
            sums[name][:, torch.searchsorted(classes, present)] += partial
        sums["done"] += len(labels)
        progress.save(lambda: sums)
    del sums["done"]
    return {**sums, "classes": classes, "counts": counts}


def _combine(name: str, units: list[Unit], classes: int, session: Session) -> tuple[Tensor, Tensor, Tensor]:
    """Counts int64 (C,), the shift (F,) and the sums float64 (3, C, F), added in the order of the parts."""
    with session.store.open(units[0]) as file:
        shift = file.get_tensor(name)
    counts = torch.zeros(classes, dtype=torch.int64)
    sums = torch.zeros(3, classes, len(shift), dtype=torch.float64)
    for unit in units[1:]:
        with session.store.open(unit) as file:
            present = file.get_tensor("classes")
            counts[present] += file.get_tensor("counts")
            sums[:, present] += file.get_tensor(name)
    return counts, shift, sums


def finish(counts: Tensor, shift: Tensor, sums: Tensor, running: dict[str, Tensor]) -> dict[str, Tensor]:
    """An observer's file: `n` (C,), `mean`, `within`, `between` float32 (C, F), and the whole set's, weighted by n.

    A class without images has zeros. `running`: `running_mean` and `running_var` (F,), NaN where a layer has none.
    """
    n = counts.clamp_min(1)[:, None]
    first, within, square = (part / n for part in sums)
    within, between = within.clamp_min_(0), (square - first.square()).clamp_min_(0)
    shares = counts.double() / counts.sum()
    centre = shares @ first
    whole = {
        "global_mean": centre + shift,
        "global_within": shares @ within,
        "global_between": shares @ between,
        "global_spread": shares @ (first - centre).square(),
    }
    tensors = {"mean": first + shift, "within": within, "between": between, **whole, **running}
    return {"n": counts, **{name: tensor.float() for name, tensor in tensors.items()}}


def _running(network: Network, layout: Layout) -> dict[str, Tensor]:
    """The running buffers of BatchNorm layers on the feature axis, NaN where there is none."""
    tensors = {name: torch.full((layout.size,), torch.nan) for name in ("running_mean", "running_var")}
    for name, tensor in tensors.items():
        for segment in layout.segments:
            buffer = getattr(network.module.get_submodule(segment.name), name, None)
            if buffer is not None:
                tensor[segment.start : segment.start + segment.length] = buffer
    return tensors
