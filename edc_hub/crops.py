"""What observers see of a block in one step: a crop, flip and roll that its images share, and how they are mixed."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import pixels, views
from .recipe import Synthesize


def smallest_area(section: Synthesize, step: int) -> float:
    """Smallest area of a crop at `step`: `crop_area`'s, to which CDA's curriculum comes down."""
    curriculum, last = section.curriculum, section.crop_area[0]
    steps = curriculum.milestone * section.iterations
    if curriculum.kind == "none" or step >= steps:
        return last
    part = step / steps
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * part)), "linear": 1 - part, "step": 1.0}[curriculum.kind]
    return last + left * (curriculum.start - last)


class Crop:
    """One RandomResizedCrop, flip and roll, shared by the whole block, drawn anew each step.

    `size` is the side of the images. That of the view is the same, or one of `section.sizes`: the next after each
    merge, else after each round of the `among` observers, so that every one of them sees every side.
    """

    def __init__(self, size: int, section: Synthesize, generator: torch.Generator, step: int = 0, among: int = 1):
        draws = torch.rand(pixels.CROP_DRAWS + 2, generator=generator, dtype=torch.float64).numpy()
        area = smallest_area(section, step), section.crop_area[1]
        turn = step // section.residual.every if section.residual.every else step * section.together // among
        self.size = section.sizes[turn % len(section.sizes)] if section.sizes else size
        self.box = pixels.crop_box(size, size, draws, area, (3 / 4, 4 / 3))
        self.flip = section.flip and draws[22] < 0.5
        roll = [int(draw * (2 * section.jitter + 1)) - section.jitter for draw in draws[pixels.CROP_DRAWS :]]
        self.roll = roll if any(roll) else None

    def __call__(self, x: Tensor) -> Tensor:
        """(B, 3, s, s) to (B, 3, size, size), differentiable."""
        left, top, right, bottom = self.box
        x = x[:, :, top:bottom, left:right]
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", align_corners=False)
        if self.flip:
            x = x.flip(-1)
        return x if self.roll is None else x.roll(self.roll, (-2, -1))

    def places(self, side: int) -> Tensor:
        """This view of images of `side` pixels as numbers alone, for `placed`: float32 (2, size, side), on the CPU."""
        left, top, right, bottom = self.box
        rows, columns = (_interpolation(side, *ends, self.size) for ends in ((top, bottom), (left, right)))
        if self.flip:
            columns = columns[::-1]
        down, across = self.roll or (0, 0)
        return torch.from_numpy(np.stack([np.roll(rows, down, 0), np.roll(columns, across, 0)]))


def placed(places: Tensor, x: Tensor) -> Tensor:
    """A `Crop` of x (B, 3, s, s) by the matrices of its rows and columns: steps change numbers, not shapes.

    `places` float32 (2, size, s). Returns (B, 3, size, size), differentiable.
    """
    rows, columns = places
    return rows @ x @ columns.t()


def _interpolation(side: int, start: int, end: int, size: int) -> np.ndarray:
    """The matrix (size, side) that makes the stretch from `start` to `end` of a line `size` long, bilinearly."""
    length, out = end - start, np.arange(size)
    place = np.maximum((out + 0.5) * length / size - 0.5, 0)
    low = place.astype(np.int64)
    matrix, share = np.zeros((size, side), np.float32), place - low
    matrix[out, start + low] = 1 - share
    matrix[out, start + np.minimum(low + 1, length - 1)] += share
    return matrix


class Mix:
    """MixUp, CutMix or CutOut of a block's views, drawn anew each step; with `mix: none` nothing is drawn or changed.

    mixup: each view with another's of the block, one share for all, from Beta(mix_alpha, mix_alpha). cutmix: a square
    of the other's, its area that share's rest, as far as it lies inside. cutout: a hole, its side half of the view's
    (DeVries and Taylor's 16 px of 32), in the colour `fill` (1, 3, 1, 1), the 0 of the normalised space. Squares lie
    about a uniform pixel, are clipped, and all views share them.
    """

    def __init__(self, section: Synthesize, count: int, size: int, fill: Tensor, generator: torch.Generator):
        self.partner, self.share, self.hole, self.fill = None, 1.0, None, fill
        if section.mix in ("mixup", "cutmix"):
            self.partner = views.partners(count, generator).to(fill.device)
            self.share = float(views.beta(section.mix_alpha, 1, generator))
        if section.mix in ("cutmix", "cutout"):
            side = size // 2 if section.mix == "cutout" else round(size * math.sqrt(1 - self.share))
            corner = [int(draw) - side // 2 for draw in torch.rand(2, generator=generator, dtype=torch.float64) * size]
            (top, bottom), (left, right) = ((max(0, at), min(size, at + side)) for at in corner)
            self.hole = top, bottom, left, right
        if section.mix == "cutmix":
            self.share = 1 - (bottom - top) * (right - left) / size**2

    def __call__(self, x: Tensor) -> Tensor:
        """(B, 3, s, s) in [0, 1] to the same, differentiable."""
        other = self.fill if self.partner is None else x[self.partner]
        if self.hole is None:
            return x if self.partner is None else self.share * x + (1 - self.share) * other
        top, bottom, left, right = self.hole
        place = torch.arange(x.shape[-1], device=x.device)
        down, across = (place >= top) & (place < bottom), (place >= left) & (place < right)
        return torch.where(down[:, None] & across, other, x)

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean over the block; of two mixed views both classes count, by their shares. (B, C) and int64 (B,)."""
        loss = F.cross_entropy(logits, labels)
        if self.partner is None:
            return loss
        return self.share * loss + (1 - self.share) * F.cross_entropy(logits, labels[self.partner])
