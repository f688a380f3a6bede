"""The batches a student sees: stored views with their labels, or views drawn while it trains."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import canvas, views, work
from .condensed import CondensedSet
from .section import ViewSettings
from .views import ViewTable


KEPT_BYTES = 10**9  # of labelled rows; a larger set is read an epoch at a time
CLEAN_VIEWS = 1000  # at least, for BatchNorm statistics of the whole set


class Batch(NamedTuple):
    """B views with their labels, on the device of the images."""

    x: Tensor  # float32 (B, 3, v, v) in [0, 1]
    soft: Tensor | None  # float32 (B, C) logits of the views; None where labels are hard
    label: Tensor  # int64 (B,) class of the first image
    mixed: Tensor  # int64 (B,) class of the image it is mixed with; `label` where there is none
    share: Tensor  # float32 (B,) share of the first image; 1 where there is none


Teach = Callable[[Tensor, ViewTable], Tensor]
"""Soft labels (B, C) of views float32 (B, 3, v, v) on the device; their rows are on the CPU."""


class Stored:
    """The stored views of a condensed set, with the stored labels or with the classes.

    Label epochs come in an order that the student's seed decides, each once before the first comes again, then in
    another order. Rows are shuffled anew in every epoch or, with `shuffled="batches"`, the label batches are, each as
    it was mixed, and a smaller one comes last. `mix=False` shows the views as they are before mixing, which fits hard
    labels alone: the stored ones are of the mixed views.
    """

    def __init__(
        self,
        condensed: CondensedSet,
        batch: int,
        device: torch.device,
        *,
        seed: int,
        hard: bool = False,
        mix: bool = True,
        shuffled: Literal["rows", "batches"] = "rows",
    ):
        self._condensed, self._batch, self._seed, self._hard, self._mix = condensed, batch, seed, hard, mix
        self._unit = 1 if shuffled == "rows" else batch
        self._images = condensed.pictures.to(device)
        self._labels = condensed.of_pictures(condensed.labels).to(device)
        self._view = settings(condensed.manifest["soft_labels"])
        self.count, self._size = len(condensed.labels), self._view.view_size
        row = 2 * len(condensed.names) + 64
        small = row * self.count * condensed.epochs <= KEPT_BYTES
        self._rows = condensed.labelled(0, condensed.epochs) if small else None
        self._at_once = views.at_once(self._size, batch, device)
        # epochs made at once: more than some dozens win nothing, and those after the last are made for nobody
        self._together = max(1, min(32, self._at_once // self.count)) if small else 1
        self._ahead = -1, torch.empty(0)  # the first of them, and their views
        self.steps = steps(self.count, batch)
        self.clean = partial(_clean, self._images, self._view, batch)

    def epoch(self, number: int, generator: torch.Generator) -> Iterator[Batch]:
        """The batches of training epoch `number`; `generator`, on the CPU, shuffles them."""
        table, soft = self._labelled(number)
        order = _full(_shuffled(self.count, self._unit, generator), self._batch)
        for rows in order.split(self._at_once):
            if self._together > 1:
                x = self._made(number)[rows.to(self._images.device)]
            else:
                x = views.apply(self._images, views.take(table, rows), self._size)
            labels = None if self._hard else soft[rows].to(x.device).float()
            yield from _split(_batch(x, labels, self._labels, views.take(table, rows)), self._batch)

    def _labelled(self, number: int) -> tuple[ViewTable, Tensor]:
        """Rows and soft labels of the label epoch whose turn it is."""
        cycle, place = divmod(number, self._condensed.epochs)
        rng = work.generator(self._seed, "feed", f"cycle {cycle}")
        chosen = int(torch.randperm(self._condensed.epochs, generator=rng)[place])
        if self._rows is None:
            table, soft = self._condensed.labelled(chosen, chosen + 1)
        else:
            rows = slice(chosen * self.count, (chosen + 1) * self.count)
            table, soft = views.take(self._rows[0], rows), self._rows[1][rows]
        if not self._mix:
            table = {**table, "mix_image_id": torch.full_like(table["mix_image_id"], -1)}
        return table, soft

    def _made(self, number: int) -> Tensor:
        """The views of one epoch of a small set, in the order of their rows, made with those of the next ones."""
        first = number - number % self._together
        if self._ahead[0] != first:
            tables = [self._labelled(first + i)[0] for i in range(self._together)]
            self._ahead = first, views.apply(self._images, views.join(tables), self._size)
        start = (number - first) * self.count
        return self._ahead[1][start : start + self.count]


class Drawn:
    """Views of images in memory, drawn while the student trains.

    `view=None` shows whole images. `teach` gives soft labels, without it labels are hard. An epoch is one pass over
    the images in random order or, with `fixed`, that many full batches of an endless stream of such passes.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        view: ViewSettings | None,
        batch: int,
        device: torch.device,
        *,
        seed: int,
        teach: Teach | None,
        fixed: int | None = None,
        grid: int = 1,
        full: bool = False,
    ):
        """Args: images uint8 (N, 3, s, s); labels int64 (N,); grid: of canvases, whose pictures the images are; full:
        a last batch of fewer views is left out, as the set's teachers need the statistics of whole ones; where
        all images are fewer, teachers see further views of them as well, and the student does not."""
        self._images, self._labels = images.to(device), labels.to(device)
        self._view, self._batch, self._seed, self._teach, self._fixed = view, batch, seed, teach, fixed
        self._size = view.view_size if view and view.view_size else images.shape[-1]
        self._grid, self.count = grid, len(images) // grid**2
        self._whole = full
        self.steps = fixed or steps(self.count, batch, full=full)
        self.clean = partial(_clean, self._images, view, batch)

    def epoch(self, number: int, generator: torch.Generator) -> Iterator[Batch]:
        """The batches of training epoch `number`; `generator`, on the CPU, draws order and views."""
        shown = self._batch
        if self._fixed:
            order = self._stream(number * self._fixed * self._batch, self._fixed * self._batch)
        else:
            order = canvas.turn(torch.randperm(self.count, generator=generator), number, self._grid)
            order = _full(order, self._batch, self._whole)
            if self._whole and self._teach and self.count < self._batch:  # as where labels are stored
                order, shown = order[torch.arange(self._batch) % self.count], self.count
        for rows in order.split(views.at_once(self._size, self._batch, self._images.device)):
            tables = _draw(self._view, rows, self._batch, self._images.shape[-1], generator)
            joined = views.join(tables)
            whole = _batch(views.apply(self._images, joined, self._size), None, self._labels, joined)
            for table, made in zip(tables, _split(whole, self._batch), strict=True):
                made = made._replace(soft=self._teach(made.x, table).float()) if self._teach else made
                yield Batch(*(part if part is None else part[:shown] for part in made))

    def _stream(self, start: int, count: int) -> Tensor:
        """Images `start` to `start + count` of the endless stream."""
        size, found = len(self._images), []
        for turn in range(start // size, (start + count - 1) // size + 1):
            found.append(torch.randperm(size, generator=work.generator(self._seed, "feed", f"pass {turn}")))
        return torch.cat(found)[start % size :][:count]


def settings(facts: dict) -> ViewSettings:
    """How the views of a set were drawn, by its manifest."""
    return ViewSettings(**{name: facts[name] for name in ViewSettings.model_fields})


def _draw(
    view: ViewSettings | None, rows: Tensor, batch: int, size: int, generator: torch.Generator
) -> list[ViewTable]:
    """The views of each batch, which are mixed; how many are made at once is the device's and changes no draw."""
    if view is not None:
        return [views.sample(view, ids, size, generator) for ids in rows.split(batch)]
    return [{**views.whole(len(ids), size), "image_id": ids.to(torch.int32)} for ids in rows.split(batch)]


def _clean(images: Tensor, view: ViewSettings | None, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches of flipped crops of all images, not mixed nor augmented otherwise: float32 (B, 3, v, v)."""
    size = images.shape[-1]
    if view is not None:
        view = ViewSettings(view_size=view.view_size, crop_area=view.crop_area, flip=view.flip, mix="none")
    passes = -(-CLEAN_VIEWS // len(images))
    order = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(passes)])
    view_size = view.view_size or size if view else size
    for rows in _full(order, batch).split(views.at_once(view_size, batch, images.device)):
        yield from views.apply(images, views.join(_draw(view, rows, batch, size, generator)), view_size).split(batch)


def _batch(x: Tensor, soft: Tensor | None, labels: Tensor, table: ViewTable) -> Batch:
    first, second = table["image_id"].long(), table["mix_image_id"].long()
    mixed = second >= 0
    share = table["mix_lam"].where(mixed, 1.0)
    first, second, share = (column.to(x.device) for column in (first, second.where(mixed, first), share))
    return Batch(x, soft, labels[first], labels[second], share)


def _split(whole: Batch, batch: int) -> Iterator[Batch]:
    for start in range(0, len(whole.x), batch):
        yield Batch(*(None if part is None else part[start : start + batch] for part in whole))


def _shuffled(count: int, unit: int, generator: torch.Generator) -> Tensor:
    """0 to count - 1 in random order, runs of `unit` kept together; a last run of fewer stays last."""
    whole = count // unit
    order = torch.randperm(whole, generator=generator)[:, None] * unit + torch.arange(unit)
    return torch.cat([order.flatten(), torch.arange(whole * unit, count)])


def _full(order: Tensor, batch: int, whole: bool = False) -> Tensor:
    """Without a last batch of one view, for which BatchNorm has no statistics, or of fewer than `batch` where only
    `whole` ones serve; unless it is the only one."""
    over = len(order) % batch
    return order[: len(order) - over] if len(order) > batch > 1 and (whole or over == 1) else order


def steps(count: int, batch: int, *, full: bool = False) -> int:
    """Batches of one pass over `count` views; full: without a last one of fewer."""
    return -(-len(_full(torch.arange(count), batch, full)) // batch)
