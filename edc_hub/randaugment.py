"""RandAugment (arXiv 1909.13719) on a batch: torchvision's 14 operations, nearest, each image with its own two.

Every operation works on the images that drew it at once, and none of its results depends on the others: pixels come
from integer sums, table look-ups and single rounded float operations, never from a reduction over the batch.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


BINS = 31
_UNIT = torch.linspace(0, 1, BINS, dtype=torch.float64)


def _angles(function: Callable[[float], float]) -> Tensor:
    # a table from the C library: torch's vectorised cosine may differ in its last bit with the place in the batch
    return torch.tensor([function(math.radians(30 * x)) for x in _UNIT.tolist()], dtype=torch.float64)


_COS, _SIN = _angles(math.cos), _angles(math.sin)
_SHEAR = torch.linspace(0, 0.3, BINS).double()  # single precision, as torchvision's
_FACTOR = torch.linspace(0, 0.9, BINS).double()
_KEPT_BITS = 8 - (torch.arange(BINS) / ((BINS - 1) / 4)).round().long()
_THRESHOLD = torch.linspace(255, 0, BINS)


def _at(table: Tensor, level: Tensor) -> Tensor:
    """Entries of a magnitude table as (G, 1, 1, 1), with the sign of `level`."""
    level = level.view(-1, 1, 1, 1)
    return table.to(level.device)[level.abs()] * torch.where(level < 0, -1, 1)


def _nearest(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Pixels at the source coordinates x and y, broadcast to (G, 1, s, s) float64; 0 outside the image."""
    count, channels, side, _ = images.shape
    x, y = (c.round().long().expand(count, 1, side, side) for c in (x, y))  # half to even, as grid_sample rounds
    inside = (x >= 0) & (x < side) & (y >= 0) & (y < side)
    index = (y * side + x).where(inside, 0).view(count, 1, -1).expand(-1, channels, -1)
    return images.flatten(2).gather(2, index).view_as(images) * inside


def _grid(images: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates x (1, 1, 1, s) and y (1, 1, s, 1) of the pixels."""
    steps = torch.arange(images.shape[-1], dtype=torch.float64, device=images.device)
    return steps.view(1, 1, 1, -1), steps.view(1, 1, -1, 1)


def _shear_x(images: Tensor, level: Tensor) -> Tensor:
    x, y = _grid(images)
    return _nearest(images, x + _at(_SHEAR, level) * (y + 0.5), y)  # about the upper left corner


def _shear_y(images: Tensor, level: Tensor) -> Tensor:
    x, y = _grid(images)
    return _nearest(images, x, y + _at(_SHEAR, level) * (x + 0.5))


def _pixels(images: Tensor, level: Tensor) -> Tensor:
    # single precision, as torchvision's table, before it is cut to whole pixels
    shift = torch.linspace(0, 150 / 331 * images.shape[-1], BINS)
    return _at(shift.double(), level).trunc()


def _translate_x(images: Tensor, level: Tensor) -> Tensor:
    x, y = _grid(images)
    return _nearest(images, x - _pixels(images, level), y)


def _translate_y(images: Tensor, level: Tensor) -> Tensor:
    x, y = _grid(images)
    return _nearest(images, x, y - _pixels(images, level))


def _rotate(images: Tensor, level: Tensor) -> Tensor:
    centre = (images.shape[-1] - 1) / 2
    x, y = (c - centre for c in _grid(images))
    cos, sin = _at(_COS, level.abs()), _at(_SIN, level)
    return _nearest(images, cos * x - sin * y + centre, sin * x + cos * y + centre)


def _blend(images: Tensor, other: Tensor, level: Tensor) -> Tensor:
    factor = 1 + _at(_FACTOR, level)
    mixed = factor.float() * images + (1 - factor).float() * other
    return mixed.clamp_(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    red, green, blue = images.unbind(1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).to(torch.uint8).unsqueeze(1)


def _brightness(images: Tensor, level: Tensor) -> Tensor:
    return _blend(images, torch.zeros_like(images), level)


def _color(images: Tensor, level: Tensor) -> Tensor:
    return _blend(images, _grey(images), level)


def _contrast(images: Tensor, level: Tensor) -> Tensor:
    total = _grey(images).sum((1, 2, 3), keepdim=True)  # int64, exact in any order
    return _blend(images, (total.double() / images[0, 0].numel()).float(), level)


def _sharpness(images: Tensor, level: Tensor) -> Tensor:
    side = images.shape[-1]
    if side <= 2:
        return images
    wide = images.short()
    rows = wide[..., :-2] + wide[..., 1:-1] + wide[..., 2:]
    total = rows[..., :-2, :] + rows[..., 1:-1, :] + rows[..., 2:, :] + 4 * wide[..., 1:-1, 1:-1]
    smooth = images.clone()
    smooth[..., 1:-1, 1:-1] = (total / 13).round().to(torch.uint8)  # kernel of ones with 5 in the middle
    return _blend(images, smooth, level)


def _posterize(images: Tensor, level: Tensor) -> Tensor:
    dropped = 8 - _at(_KEPT_BITS, level)
    return images & (256 - (1 << dropped)).to(torch.uint8)


def _solarize(images: Tensor, level: Tensor) -> Tensor:
    return torch.where(images >= _at(_THRESHOLD, level), 255 - images, images)


def _auto_contrast(images: Tensor, level: Tensor) -> Tensor:
    low, high = images.amin((2, 3), keepdim=True).float(), images.amax((2, 3), keepdim=True).float()
    flat = low == high
    scale = 255 / (high - low).where(~flat, 255.0)
    return ((images - low.where(~flat, 0.0)) * scale).clamp_(0, 255).to(torch.uint8)


def _equalize(images: Tensor, level: Tensor) -> Tensor:
    flat = images.flatten(0, 1).flatten(1).long()  # one row a channel
    counts = torch.zeros(len(flat), 256, dtype=torch.long, device=images.device)
    counts.scatter_add_(1, flat, torch.ones_like(flat))
    step = (flat.shape[1] - counts.gather(1, flat.amax(1, keepdim=True))) // 255
    table = (counts.cumsum(1) + step // 2) // step.clamp(min=1)
    table = pad(table, (1, 0))[:, :-1].clamp(0, 255)
    return torch.where(step > 0, table.gather(1, flat), flat).to(torch.uint8).view_as(images)


# name: (function, magnitudes from bin 0 to bin 30, takes a sign, what the magnitude is)
_OPERATIONS: dict[str, tuple[Callable | None, tuple[float, float], bool, str]] = {
    "Identity": (None, (0, 0), False, "none"),
    "ShearX": (_shear_x, (0, 0.3), True, "pixels a pixel, about the upper left corner"),
    "ShearY": (_shear_y, (0, 0.3), True, "pixels a pixel, about the upper left corner"),
    "TranslateX": (_translate_x, (0, 150 / 331), True, "of the side, cut to whole pixels"),
    "TranslateY": (_translate_y, (0, 150 / 331), True, "of the side, cut to whole pixels"),
    "Rotate": (_rotate, (0, 30), True, "degrees"),
    "Brightness": (_brightness, (0, 0.9), True, "factor - 1"),
    "Color": (_color, (0, 0.9), True, "factor - 1"),
    "Contrast": (_contrast, (0, 0.9), True, "factor - 1"),
    "Sharpness": (_sharpness, (0, 0.9), True, "factor - 1"),
    "Posterize": (_posterize, (8, 4), False, "bits, rounded"),
    "Solarize": (_solarize, (255, 0), False, "threshold"),
    "AutoContrast": (_auto_contrast, (0, 0), False, "none"),
    "Equalize": (_equalize, (0, 0), False, "none"),
}


def table() -> dict[str, Any]:
    """What the numbers of an `augment` column mean, for a manifest."""
    return {
        "bins": BINS,
        "interpolation": "nearest",
        "fill": 0,
        "operations": [
            {"name": name, "first": first, "last": last, "signed": signed, "unit": unit}
            for name, (_, (first, last), signed, unit) in _OPERATIONS.items()
        ],
    }


def sample(count: int, operations: int, magnitude: int, generator: torch.Generator) -> Tensor:
    """Draws (count, 2 * operations) int16: for each operation its number and its magnitude's bin, with the sign."""
    chosen = torch.randint(len(_OPERATIONS), (count, operations), generator=generator)
    sign = 1 - 2 * torch.randint(2, (count, operations), generator=generator)
    ranges = list(_OPERATIONS.values())
    signed = torch.tensor([signed for _, _, signed, _ in ranges])[chosen]
    unused = torch.tensor([first == last for _, (first, last), _, _ in ranges])[chosen]
    level = torch.where(signed, sign, 1) * torch.where(unused, 0, magnitude)
    return torch.stack([chosen, level], 2).flatten(1).to(torch.int16)


def apply(images: Tensor, augment: Tensor) -> Tensor:
    """Applies each image's operations, in order.

    Args: images uint8 (B, 3, s, s) on any device; augment as drawn by `sample`, on the CPU.
    Returns uint8 (B, 3, s, s).
    """
    images = images.clone()
    for slot in augment.long().split(2, dim=1):
        chosen, level = slot.unbind(1)
        for number, (function, *_) in enumerate(_OPERATIONS.values()):
            rows = (chosen == number).nonzero().view(-1)
            if function is not None and len(rows):
                there = rows.to(images.device)
                images[there] = function(images[there], level[rows].to(images.device))
    return images
