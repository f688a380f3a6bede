"""Views of condensed images: drawn once, stored as a few numbers, replayed to the bit from one stored row.

The order of a view: strip shuffle, RandAugment (both on the stored uint8 image), RandomResizedCrop, flip, then CutMix
or MixUp with another view of the batch. What a row yields depends on that row alone, never on which rows are asked
for together with it: crops are gathered tap by tap, as a matrix product's sums vary with the batch's shape.
"""

import math

import numpy as np
import torch
from torch import Tensor

from . import randaugment
from .section import ViewSettings


PIXELS = 256 * 32 * 32  # of the views that are made at once: fewer pay more of the fixed cost, more gain nothing
PIXELS_GPU = 16 * PIXELS  # where the fixed cost is thousands of launches
VERSION = 1  # of the meaning of a row; raised when the same row would yield other pixels
ViewTable = dict[str, Tensor]
"""Columns of V views, on the CPU: `epoch` int16, `image_id` int32, `crop` int16 (V, 4) box y, x, h, w in the stored
image, `flip` bool, `mix_image_id` int32 (-1 none), `mix_crop`, `mix_flip`, `mix_box` int16 (V, 4) box y, x, h, w in
the view, `mix_lam` float32 (the share of the first image), and where used `augment`, `mix_augment` int16 (V, 2 * ops)
and `shuffle`, `mix_shuffle` int16 (V, 2 * strips). Where images are canvases, the ids count their pictures; those of
stored rows count canvases, with `tile` and `mix_tile` int8 beside them (canvas.py)."""

_OWN = ("crop", "flip", "augment", "shuffle")  # what a view has before it is mixed


def sample(
    section: ViewSettings, image_ids: Tensor, size: int, generator: torch.Generator, *, epoch: int = 0
) -> ViewTable:
    """Draws one batch of views.

    Args: image_ids (B,) integers; size: side of the stored images; generator: on the CPU.
    A view is mixed with another row's view of this batch (its own where B is 1).
    """
    count = len(image_ids)
    ids = image_ids.to(torch.int32)
    own = {"crop": _crops(count, size, section.crop_area, generator), "flip": torch.zeros(count, dtype=torch.bool)}
    if section.flip:
        own["flip"] = torch.rand(count, generator=generator) < 0.5
    if section.rand_augment:
        own["augment"] = randaugment.sample(count, section.rand_augment, section.magnitude, generator)
    if section.shuffle:
        strips = torch.rand(2, count, section.shuffle, generator=generator).argsort(2)
        own["shuffle"] = torch.cat([*strips], 1).to(torch.int16)

    partner = torch.arange(count)
    boxes, share = torch.zeros(count, 4, dtype=torch.int16), torch.ones(count)
    if section.mix != "none":
        partner = partners(count, generator)
        draws = 1 if section.mix_shared == "batch" else count
        share = beta(section.mix_alpha, draws, generator).float().expand(count)
        if section.mix == "cutmix":
            boxes, share = _boxes(share[:draws], section.view_size or size, generator)
            boxes, share = boxes.expand(count, 4), share.expand(count)
    mixed = section.mix != "none"
    table = {
        "epoch": torch.full((count,), epoch, dtype=torch.int16),
        "image_id": ids,
        "crop": own["crop"],
        "flip": own["flip"],
        "mix_image_id": ids[partner] if mixed else torch.full_like(ids, -1),
        "mix_crop": own["crop"][partner] if mixed else torch.zeros_like(own["crop"]),
        "mix_flip": own["flip"][partner] & mixed,
        "mix_box": boxes.contiguous(),
        "mix_lam": share.contiguous(),
    }
    for column in ("augment", "shuffle"):
        if column in own:
            table[column] = own[column]
            table[f"mix_{column}"] = own[column][partner] if mixed else torch.zeros_like(own[column])
    return table


def whole(count: int, size: int) -> ViewTable:
    """One view of each image of `count` that is the image itself: no other crop has all of its area."""
    section = ViewSettings(crop_area=[1.0, 1.0], flip=False, mix="none")
    return sample(section, torch.arange(count), size, torch.Generator())


def columns(table: ViewTable) -> list[str]:
    """The columns of a table in the order of the schema, whatever order it came in."""
    order = [
        "epoch", "image_id", "tile", "crop", "flip", "mix_image_id", "mix_tile", "mix_crop", "mix_flip", "mix_box",
        "mix_lam", "augment", "mix_augment", "shuffle", "mix_shuffle",
    ]  # fmt: skip
    return [name for name in order if name in table]


def take(table: ViewTable, rows: Tensor | slice) -> ViewTable:
    """Some rows of a table."""
    return {name: column[rows] for name, column in table.items()}


def join(tables: list[ViewTable]) -> ViewTable:
    """The rows of some tables, one table after the other."""
    return {name: torch.cat([table[name] for table in tables]) for name in tables[0]}


def at_once(size: int, batch: int, device: torch.device) -> int:
    """How many views of this size are made at once: whole batches."""
    count = (PIXELS if device.type == "cpu" else PIXELS_GPU) // size**2
    return batch * max(1, count // batch)


def _crops(count: int, size: int, area: list[float], generator: torch.Generator) -> Tensor:
    """Boxes of RandomResizedCrop, ratio 3/4 to 4/3: int16 (count, 4) as y, x, h, w."""
    tries = torch.rand(4, count, 10, generator=generator, dtype=torch.float64)
    pixels = size**2 * (area[0] + (area[1] - area[0]) * tries[0])
    ratio = (math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * tries[1]).exp()
    width, height = (pixels * ratio).sqrt().round().long(), (pixels / ratio).sqrt().round().long()
    fits = (width > 0) & (width <= size) & (height > 0) & (height <= size)
    first = fits.int().argmax(1, keepdim=True)
    found = fits.any(1)
    height, width, down, right = (x.gather(1, first).view(-1) for x in (height, width, tries[2], tries[3]))
    height, width = height.where(found, size), width.where(found, size)  # ten misses: the whole image
    top, left = ((size - height + 1) * down).long(), ((size - width + 1) * right).long()
    return torch.stack([top, left, height, width], 1).to(torch.int16)


def partners(count: int, generator: torch.Generator) -> Tensor:
    """With whom each of `count` is mixed, int64 (count,): one cycle through all, never itself,
    which in the papers' code one in `count` is."""
    order = torch.randperm(count, generator=generator)
    return torch.empty_like(order).index_copy_(0, order, order.roll(1))


def beta(alpha: float, count: int, generator: torch.Generator) -> Tensor:
    """Beta(alpha, alpha), float64 (count,); torch's own draws only from the global generator."""
    seed = int(torch.randint(2**62, (), generator=generator))
    return torch.from_numpy(np.random.Generator(np.random.PCG64(seed)).beta(alpha, alpha, count))


def _boxes(share: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """CutMix boxes (n, 4) y, x, h, w of area 1 - share about a uniform centre, clipped, and the share that is left."""
    half = (size * (1 - share.double()).sqrt()).long() // 2
    centre = torch.randint(size, (2, len(share)), generator=generator)
    low, high = (centre - half).clamp(min=0), (centre + half).clamp(max=size)
    boxes = torch.cat([low, high - low]).T
    return boxes.to(torch.int16), (1 - boxes[:, 2:].prod(1).double() / size**2).float()


def apply(images: Tensor, table: ViewTable, view_size: int) -> Tensor:
    """Makes the views of some rows.

    Args: images uint8 (N, 3, s, s), the stored images, on any device; table: any rows, in any order.
    Returns float32 (B, 3, view_size, view_size) in [0, 1] on the images' device.
    """
    mixed = table["mix_image_id"] >= 0
    columns = [name for name in _OWN if name in table]
    own = [table["image_id"], *(table[name] for name in columns)]
    other = [table["mix_image_id"], *(table[f"mix_{name}"] for name in columns)]
    pack = [torch.cat([x.long().view(len(mixed), -1) for x in side], 1) for side in (own, other)]
    # in a batch every view is also another's partner: each is made once
    wanted, where = torch.cat([pack[0], pack[1].where(mixed[:, None], pack[0])]).unique(dim=0, return_inverse=True)
    widths = [1] + [table[name].shape[1:].numel() for name in columns]
    ids, *parts = wanted.split(widths, dim=1)
    device = images.device
    chosen = images.index_select(0, ids.view(-1).to(device))
    single = _single(chosen, dict(zip(columns, parts, strict=True)), view_size)
    first, second = where.to(device).chunk(2)
    views = single.index_select(0, first)
    if not mixed.any():
        return views
    partners = single.index_select(0, second)
    top, left, height, width = table["mix_box"].long().to(device).view(-1, 4, 1, 1, 1).unbind(1)
    steps = torch.arange(view_size, device=device)
    down, right = steps.view(-1, 1), steps
    inside = (down >= top) & (down < top + height) & (right >= left) & (right < left + width)
    views = torch.where(inside, partners, views)
    blended = mixed & (table["mix_box"][:, 2:].prod(1) == 0)
    if blended.any():
        share = table["mix_lam"].where(blended, 1).to(device).view(-1, 1, 1, 1)
        views = (share * views + (1 - share) * partners).clamp_(0, 1)
    return views


def _single(images: Tensor, own: ViewTable, view_size: int) -> Tensor:
    """Views before mixing, of images that are already one a view."""
    if "shuffle" in own:
        images = _shuffle(images, own["shuffle"])
    if "augment" in own:
        images = randaugment.apply(images, own["augment"])
    count, channels, size, _ = images.shape
    top, left, height, width = own["crop"].to(images.device).unbind(1)
    rows, row_weights = _taps(top, height, view_size, size)
    columns, column_weights = _taps(left, width, view_size, size)
    flip = own["flip"].bool().to(images.device).view(-1, 1, 1)
    columns, column_weights = (x.flip(1).where(flip, x) for x in (columns, column_weights))
    # whole rows are gathered, which copies memory in long runs: (image, row, the rest)
    pixels = images.permute(0, 2, 3, 1).float()
    pixels = _gather(pixels.reshape(count, size, -1), rows, row_weights)
    pixels = pixels.view(count, view_size, size, channels).transpose(1, 2)
    pixels = _gather(pixels.reshape(count, size, -1), columns, column_weights)
    pixels = pixels.view(count, view_size, view_size, channels).permute(0, 3, 2, 1)
    return pixels.contiguous().div_(255).clamp_(0, 1)


def _taps(start: Tensor, length: Tensor, view_size: int, size: int) -> tuple[Tensor, Tensor]:
    """Where each of `view_size` pixels comes from along one axis: indices and weights (B, view_size, taps).

    The triangle filter of antialiased bilinear interpolation over `length` pixels that begin at `start`.
    """
    start, length = start.view(-1, 1, 1), length.view(-1, 1, 1)
    scale = length.double() / view_size
    support = scale.clamp(min=1)
    centre = scale * (torch.arange(view_size, device=start.device).view(1, -1, 1) + 0.5)
    low = (centre - support + 0.5).long().clamp(min=0)
    high = (centre + support + 0.5).long().minimum(length)
    taps = math.ceil(2 * max(1.0, size / view_size))
    index = low + torch.arange(taps, device=start.device)
    weight = (1 - (index + 0.5 - centre).abs() / support).clamp(min=0) * (index < high)
    total = weight[..., 0].clone()
    for tap in range(1, taps):  # in a fixed order, which a reduction does not promise
        total += weight[..., tap]
    return start + index.minimum(length - 1), (weight / total[..., None]).float()


def _gather(lines: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Weighted sums of whole lines: (B, s, L) at index and weight (B, v, taps) -> (B, v, L)."""
    count, size, length = lines.shape
    index = index + size * torch.arange(count, device=lines.device).view(-1, 1, 1)
    lines, total = lines.view(-1, length), None
    for tap in range(index.shape[2]):
        part = lines.index_select(0, index[..., tap].reshape(-1)).view(count, -1, length)
        part.mul_(weight[..., tap, None])
        total = part if total is None else total.add_(part)
    return total


def _shuffle(images: Tensor, order: Tensor) -> Tensor:
    """RDED's ShufflePatches: vertical strips in the order of the first half, then horizontal ones of the second."""
    across, down = (_strips(part, images.shape[-1]).to(images.device) for part in order.chunk(2, dim=1))
    which = torch.arange(len(images), device=images.device).view(-1, 1, 1)
    return images.permute(0, 2, 3, 1)[which, down[:, :, None], across[:, None, :]].permute(0, 3, 1, 2)


def _strips(order: Tensor, size: int) -> Tensor:
    """Source pixel (B, size) of each place when strips come in `order` (B, f); the last strip takes the remainder."""
    count = order.shape[1]
    starts = torch.arange(count) * (size // count)
    lengths = torch.cat([starts, torch.tensor([size])]).diff()[order]
    ends = lengths.cumsum(1)
    place = torch.arange(size).expand(len(order), -1)
    strip = torch.searchsorted(ends, place.contiguous(), right=True)
    return place - (ends - lengths).gather(1, strip) + starts[order.gather(1, strip)]
