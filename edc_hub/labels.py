"""Soft labels: the mean of the observers' raw logits over views of the published images (EDC section 3.2, Eq. 4).

One label epoch, a view of every image, is one unit of work. Labels are computed from the images as they are stored,
encoded and decoded, so that a reader of the set sees what the observers saw.
"""

import hashlib
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from . import canvas, codecs, tables, views, work
from .errors import InputError
from .recipe import Recipe, Relabel
from .recorded import Recorded
from .selection import selected, users
from .views import ViewTable
from .work import Progress, Session, Store, Unit


if TYPE_CHECKING:
    from .observers import Observers


VERSION = 1
STAGE = "views"
Teacher = Callable[[Tensor], Tensor]
"""Mean logits float32 (B, C) of views (B, 3, v, v) in [0, 1]."""


@dataclass(frozen=True)
class Labels:
    """The labels of one set of N images and C classes, read from the store one label epoch at a time."""

    store: Store
    units: list[Unit]  # the images themselves, then the label epochs
    full: "Labels | None" = None  # the same with all label epochs, where those are published beside these

    @property
    def epochs(self) -> int:
        return len(self.units) - 1

    @property
    def mean(self) -> Tensor:
        """Mean logits of the published images themselves, (N, C) float16."""
        return self.store.load(self.units[0])["soft_label"]

    def epoch(self, number: int) -> tuple[ViewTable, Tensor]:
        """The views of one label epoch as stored, in the order of their batches, and mean logits float16 (rows, C)."""
        table = self.store.load(self.units[1 + number])
        soft = table.pop("soft_label")
        return {name: table[name] for name in views.columns(table)}, soft

    @property
    def fingerprint(self) -> str:
        """Of everything that the labels are made from."""
        units = (self.full or self).units
        return work.fingerprint("labels", VERSION, units=[unit.fingerprint for unit in units])

    def first(self, epochs: int) -> "Labels":
        """These labels with their first `epochs` label epochs alone."""
        return Labels(self.store, self.units[: 1 + epochs])


def check(recipe: Recipe, classes: int, size: int | None = None) -> None:
    """Raises InputError where `relabel` does not go with the number of classes, or shows an observer what it cannot
    take. `size`: side of the images where it is not the source's."""
    from . import networks  # readers of a set need none

    section = recipe.relabel
    if section.codec == "top_k" and section.top_k > classes:
        raise InputError(f"relabel.top_k: {section.top_k} of {classes} classes; write at most {classes}")
    side, labelling = section.view_size or size or recipe.source.size, dict(users(recipe)["relabel"])
    for net in recipe.observers.networks:
        if net.name in labelling and side != recipe.source.size:  # for which `observers.obtain` builds it
            network = networks.described(net, classes, seed=0, **recipe.source.face)
            networks.check(network, side, f"give {net.name} an input_size, or write another relabel.view_size")


def obtain(
    recipe: Recipe,
    images: Tensor,
    observers: "Observers",
    session: Session,
    label: str = "labels",
    *,
    epochs: int | None = None,
) -> Labels:
    """Labels views of each image, and each image itself.

    Args: images uint8 (N, 3, s, s) on the CPU, as decoded from the published files; observers: networks by name and
    epoch; label: what the progress bar calls this set; epochs: label epochs to make and to keep, for a control those
    of its set; when not given, what `recipe.relabel` asks for.
    Sets that differ in their images alone get the same views.
    """
    section, grid = recipe.relabel, recipe.images.grid
    chosen = selected(recipe, section.observers)
    inputs = {
        "images": hashlib.sha256(images.contiguous().numpy()).hexdigest(),
        "shape": list(images.shape),
        "relabel": section.model_dump(exclude={"observers", "epochs", "controls", "random_draws", *codecs.KEYS}),
        "observers": [observers.fingerprint(name, epoch) for name, epoch in chosen],
        "views": views.VERSION,
        "seed": recipe.seed,
        "precision": str(session.arithmetic),
    } | canvas.facts(grid)
    names = ["mean", *(f"epoch{number:05d}" for number in range(section.epochs))]
    own = {"mean": {"batches": "drawn"}} if section.observer_mode == "batch" else {}
    prints = [work.fingerprint(STAGE, VERSION, unit=name, **inputs, **own.get(name, {})) for name in names]
    units = [Unit(STAGE, name, fingerprint) for name, fingerprint in zip(names, prints, strict=True)]
    whole = Labels(session.store, units)

    @cache  # only where a unit is missing, and once
    def ready() -> tuple[Tensor, Teacher]:
        networks = [observers.load(name, epoch) for name, epoch in chosen]
        return canvas.decode(images.to(session.device), grid), teacher(networks, section, session)

    def make(unit: Unit, generator: torch.Generator, progress: Progress) -> tuple[dict[str, Tensor], dict]:
        pictures, teach = ready()
        if unit.name == "mean":
            return {"soft_label": _images_themselves(pictures, grid, teach, section, generator)}, {}
        made = _label_epoch(pictures, grid, teach, section, int(unit.name[5:]), generator)
        return {**canvas.stored(made, grid), "soft_label": made["soft_label"]}, {}

    def labelled(count: int) -> Labels:
        found = whole.first(count)
        work.run(found.units, make, session, seed=recipe.seed, label=label)
        return found

    if epochs is not None:
        return labelled(epochs)
    if section.codec == "observers":
        return labelled(0)
    kept = _kept(section, len(images), labelled, session)
    if section.budget is not None and kept < grid**2:
        raise InputError(
            f"relabel.budget: {section.budget:g} MB keep {kept} label epochs, and each shows one of the {grid**2} "
            "pictures of an image; write more"
        )
    return replace(labelled(kept), full=labelled(section.epochs) if section.full else None)


def _kept(section: Relabel, count: int, labelled: Callable[[int], Labels], session: Session) -> int:
    """How many label epochs of `count` images fit `relabel.budget`, by the bytes of their file; at least one."""
    if section.budget is None:
        return section.epochs
    budget, group = section.budget * 1e6, tables.epochs_a_group(count)
    first, second = min(group, section.epochs), min(2 * group, section.epochs)
    found = labelled(first)

    def size(epochs: int) -> int:
        return tables.file_bytes(tables.label_rows(found.first(epochs), section))

    if (least := size(first)) > budget:
        kept = max(1, bisect_right(range(1, first), budget, key=size))
    elif first == section.epochs:
        kept = first
    else:
        found = labelled(second)
        one = (size(second) - least) / (second - first)  # without what a file has once
        kept = min(section.epochs, first + int((budget - least) / one))
        found = labelled(kept)
        while kept > first and (over := size(kept) - budget) > 0:
            kept = max(first, kept - math.ceil(over / one))
    one_takes = f"; one takes {size(1) / 1e6:.3g}" if kept == 1 else ""
    session.report(f"relabel.budget: {section.budget:g} MB keep {kept} of {section.epochs} label epochs{one_takes}")
    return kept


def _label_epoch(
    pictures: Tensor,
    grid: int,
    teach: Teacher,
    section: Relabel,
    epoch: int,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """The views of one epoch, one of each image, in the order of their batches, and as `soft_label` float16 labels."""
    count, size = len(pictures) // grid**2, pictures.shape[-1]
    order = canvas.turn(torch.randperm(count, generator=generator), epoch, grid)
    batches = order[_filled(count, section)].split(section.batch)  # a batch is what is mixed
    table = views.join([views.sample(section, ids, size, generator, epoch=epoch) for ids in batches])
    labels = _half(_labelled(pictures, table, teach, section))
    return views.take({**table, "soft_label": labels}, slice(count))


def _images_themselves(
    pictures: Tensor, grid: int, teach: Teacher, section: Relabel, generator: torch.Generator
) -> Tensor:
    """Mean logits (N, C) float16 of the images as they are, in their order: over the pictures of each.

    Batches whose statistics count are drawn: images lie class by class, and a batch of one class has its mean taken
    away.
    """
    count, size = len(pictures), pictures.shape[-1]
    order = torch.randperm(count, generator=generator) if section.observer_mode == "batch" else torch.arange(count)
    table = views.take(views.whole(count, size), order[_filled(count, section)])
    found = _labelled(pictures, table, teach, section)[:count]
    labels = torch.empty_like(found)
    labels[order] = found
    return _half(labels.unflatten(0, (-1, grid**2)).mean(1))


def _half(labels: Tensor) -> Tensor:
    """float16. Raises InputError for what that cannot hold."""
    found = labels.half()
    if not found.isfinite().all():
        raise InputError(
            "relabel.observers: their mean logits are no numbers or pass 65504, where float16 ends; check their "
            "weights, or train them with a lower observers.train.lr"
        )
    return found


def _labelled(pictures: Tensor, table: ViewTable, teach: Teacher, section: Relabel) -> Tensor:
    """Mean logits float32 (rows, C), on the CPU, of rows in the order of their batches."""
    size = section.view_size or pictures.shape[-1]
    found = []
    for rows in torch.arange(len(table["image_id"])).split(views.at_once(size, section.batch, pictures.device)):
        x = views.apply(pictures, views.take(table, rows), size)
        found += [teach(batch) for batch in x.split(section.batch)]
    return torch.cat(found).cpu()


def _filled(count: int, section: Relabel) -> Tensor:
    """0 … count - 1; with batch statistics, wrapped until the last batch is full."""
    rows = torch.arange(count)
    if section.observer_mode == "batch":
        rows = torch.arange(-(-count // section.batch) * section.batch) % count
    return rows


def teacher(networks: list, section: Relabel, session: Session) -> Teacher:
    """`mean_logits` of these networks, as a function of the views alone."""
    return Recorded(lambda x: mean_logits(networks, x, section, session), session.device)


@torch.no_grad()
def mean_logits(networks: list, x: Tensor, section: Relabel, session: Session) -> Tensor:
    """Arithmetic mean of the networks' raw logits for views (B, 3, v, v) in [0, 1]: (B, C) float32."""
    total = None
    with _batch_statistics(networks if section.observer_mode == "batch" else []), session.autocast():
        for network in networks:
            logits = network(x).float()
            total = logits if total is None else total + logits
    return total / len(networks)


@contextmanager
def _batch_statistics(networks: list) -> Iterator[None]:
    """BatchNorm by the statistics of the batch. Buffers never change, dropout and all else stay as in evaluation."""
    layers = [layer for network in networks for layer in network.modules() if isinstance(layer, _BatchNorm)]
    before = [(layer.training, layer.track_running_stats) for layer in layers]
    for layer in layers:
        layer.training, layer.track_running_stats = True, False  # without tracking, forward leaves the buffers alone
    try:
        yield
    finally:
        for layer, (training, tracking) in zip(layers, before, strict=True):
            layer.training, layer.track_running_stats = training, tracking
