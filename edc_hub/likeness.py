"""How much published images look like the real images that they started from: PSNR and SSIM."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from .realset import RealSet


BATCH = 64  # images compared at once: of 224 px, a few hundred MB in float64
WINDOW, SIGMA = 11, 1.5  # of SSIM, Wang et al. 2004


def facts(
    pictures: Callable[[list[int]], Tensor],
    source_rows: Tensor,
    real: RealSet,
    *,
    whole: bool,
) -> dict[str, Any]:
    """What a manifest says: medians over the pictures that started from one whole real image.

    A picture is an image, or what a tile of one that is a canvas decodes to.
    Args: pictures: those of some numbers, as published, uint8 (n, 3, s, s); source_rows: int (N, tiles) of all, -1 for
    none; whole: whether a picture with one row started from all of it, not from a crop.
    Returns compared; parts, noise (how many are left out, as they start from pieces or from nothing); identical; and
    the medians psnr in dB and ssim. They are None where nothing was compared, psnr also where the median is infinite.
    """
    tiles = (source_rows >= 0).sum(1)
    single = (tiles == 1).nonzero().flatten()[: None if whole else 0]
    rows = source_rows[single].long().max(1).values
    order = rows.argsort(stable=True)  # ascending, as a stream is read
    signal, structure = [torch.empty(0)], [torch.empty(0)]
    for first in range(0, len(order), BATCH):
        part = order[first : first + BATCH]
        published = pictures(single[part].tolist()).double()
        start = real.images(rows[part]).double()
        signal.append(psnr(published, start))
        structure.append(ssim(published, start))
    decibels, similarity = torch.cat(signal), torch.cat(structure)
    noise = int((tiles == 0).sum())
    found = {"compared": len(single), "parts": len(tiles) - len(single) - noise, "noise": noise}
    found |= {"identical": int(decibels.isinf().sum()), "psnr": None, "ssim": None}
    if len(single):
        median = decibels.median().item()  # the lower of two: never a mean with infinity
        found["psnr"] = round(median, 2) if math.isfinite(median) else None
        found["ssim"] = round(similarity.median().item(), 4)
    return found


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal to noise of each pair in dB, float (B,), infinite for equal ones. Of (B, 3, s, s), 0 to 255."""
    return 10 * torch.log10(255**2 / (x - y).square().mean((1, 2, 3)))


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity of each pair, float (B,), mean of the colour channels. Inputs (B, 3, s, s), 0 to 255.

    Gaussian window of 11 pixels, whole windows alone; the window of a smaller image is as large as fits.
    """
    size = min(WINDOW, x.shape[-1] - 1 + x.shape[-1] % 2)
    place = torch.arange(size, dtype=x.dtype) - size // 2
    line = torch.exp(-place.square() / (2 * SIGMA**2))
    line = line / line.sum()

    def blur(z: Tensor) -> Tensor:
        z = z.flatten(0, 1)[:, None]
        return conv2d(conv2d(z, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1)).view(*x.shape[:2], -1)

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    shared = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return (luminance * (2 * shared + c2) / (var_x + var_y + c2)).mean((1, 2))
