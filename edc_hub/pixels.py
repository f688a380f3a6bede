"""From an encoded image to pixels: decoding, squaring, and the random crops that are decided by (seed, row) alone; and
the space in which pixels are optimised."""

import math
from io import BytesIO
from typing import Literal, NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from datasets.utils.file_utils import xopen
from torch import Tensor

from .recipe import Source


class View(NamedTuple):
    """A crop of each real image, decided by (seed, row) alone.

    `pad_crop`: `pad` black pixels around the square image, then a crop of its own size. `rrc`: torchvision's
    RandomResizedCrop of the original image, area range `area`, ratio 3/4 to 4/3. `flip` mirrors half of the images.
    """

    kind: Literal["pad_crop", "rrc"]
    seed: int
    pad: int = 4
    area: tuple[float, float] = (0.08, 1.0)
    flip: bool = True


CROP_DRAWS = 23  # ten attempts at (area, ratio), then top, left and flip


def uniforms(seed: int, rows: np.ndarray, count: int) -> np.ndarray:
    """Numbers in [0, 1), float64 (n, count), that depend on (seed, row, column) alone: splitmix64 from each row.

    A torch.Generator gives a stream, so a row's numbers would depend on the rows before it.
    """
    with np.errstate(over="ignore"):
        start = _splitmix(_splitmix(np.array([seed % 2**64], np.uint64)) + rows.astype(np.uint64))
        steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        return (_splitmix(start[:, None] + steps) >> np.uint64(11)) * 2.0**-53


def _splitmix(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def to_float(images: Tensor, device: torch.device) -> Tensor:
    """uint8 to float32 in [0, 1] on `device`."""
    return images.to(device).float().div_(255)


def decode(data: bytes | None, path: str | None) -> PIL.Image.Image:
    """An RGB image from encoded bytes, or from the file they are in (local or remote).

    Upright by EXIF, as `datasets` shows it; alpha is dropped and 16-bit grey is scaled, not clipped.
    """
    if data is None:
        if path is None:
            raise ValueError("the image is missing")
        with xopen(path, "rb") as file:
            data = file.read()
    image = PIL.Image.open(BytesIO(data))
    image.load()
    if image.getexif().get(PIL.Image.ExifTags.Base.Orientation) is not None:
        image = PIL.ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = PIL.Image.fromarray((np.asarray(image, np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, Pillow warns about transparency given as bytes
    return image if image.mode == "RGB" else image.convert("RGB")


def square(image: PIL.Image.Image, size: int, resize: str) -> np.ndarray:
    """uint8 (size, size, 3): squashed, or the shorter side resized and the centre kept; bilinear, antialiased."""
    width, height = image.size
    if resize == "squash":
        return np.asarray(image.resize((size, size), PIL.Image.Resampling.BILINEAR))
    side = min(width, height)
    left, top = round((width - side) / 2), round((height - side) / 2)
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), PIL.Image.Resampling.BILINEAR, box=box))


def crop(
    image: PIL.Image.Image,
    draws: np.ndarray,
    size: int,
    *,
    area: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = False,
) -> np.ndarray:
    """RandomResizedCrop, uint8 (size, size, 3), from CROP_DRAWS numbers in [0, 1): torchvision's way to a box."""
    box = crop_box(*image.size, draws, area, ratio)
    # not resize(box=...): that mixes in pixels from beyond the crop
    pixels = np.asarray(image.crop(box).resize((size, size), PIL.Image.Resampling.BILINEAR))
    return pixels[:, ::-1] if flip and draws[22] < 0.5 else pixels


def crop_box(
    width: int, height: int, draws: np.ndarray, area: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """The box (left, top, right, bottom) of a RandomResizedCrop.

    As in torchvision: the first of ten boxes of random area and log-uniform ratio that fits, at a random place; if
    none fits, the largest central box within the ratios.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for of_area, of_ratio in draws[:20].reshape(10, 2).tolist():
        target = width * height * (area[0] + of_area * (area[1] - area[0]))
        aspect = math.exp(low + of_ratio * (high - low))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(draws[20] * (height - h + 1)), int(draws[21] * (width - w + 1))
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def pad_crop(images: Tensor, draws: np.ndarray, pad: int, flip: bool) -> Tensor:
    """uint8 (b, 3, s, s) moved by up to `pad` pixels each way with black behind, mirrored where the draw says so.

    `draws` (b, 3) in [0, 1) are row, column and flip.
    """
    size = images.shape[-1]
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
    draws = torch.from_numpy(draws)
    offset = (draws[:, :2] * (2 * pad + 1)).long()[..., None] + torch.arange(size)  # (b, 2, s)
    ys, xs = offset.unbind(1)
    if flip:
        xs = torch.where(draws[:, 2:] < 0.5, xs.flip(1), xs)
    rows = torch.arange(len(images))[:, None, None]
    return padded[rows, :, ys[:, :, None], xs[:, None, :]].permute(0, 3, 1, 2).contiguous()


class Space:
    """The map between stored images, the optimised `z` and what networks see. Shapes (B, 3, s, s).

    In `z` learning rates, noise and penalties are in units of the source's std.
    """

    def __init__(self, source: Source, device: torch.device):
        self.mean = torch.tensor(source.mean, device=device).view(1, 3, 1, 1)
        self.std = torch.tensor(source.std, device=device).view(1, 3, 1, 1)

    def to_z(self, images: Tensor) -> Tensor:
        """uint8 to normalised float32."""
        return self.normalise(to_float(images, self.mean.device))

    def normalise(self, x: Tensor) -> Tensor:
        """[0, 1] to normalised float."""
        return (x - self.mean) / self.std

    def to_x(self, z: Tensor) -> Tensor:
        """Normalised float to [0, 1]."""
        return z * self.std + self.mean

    def clamp(self, z: Tensor) -> None:
        """Keeps x in [0, 1], in place."""
        with torch.no_grad():
            z.clamp_(-self.mean / self.std, (1 - self.mean) / self.std)

    def to_bytes(self, z: Tensor) -> Tensor:
        """Normalised float to uint8 on the CPU, rounded."""
        return self.to_x(z).mul(255).round().clamp(0, 255).to(torch.uint8).cpu()
