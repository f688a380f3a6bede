"""Images as files: encoded for publishing, decoded as every reader sees them."""

import io
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .recipe import Images


def encode(images: Tensor, section: Images) -> list[bytes]:
    """Encoded files of uint8 (N, 3, s, s): PNG up to 64 px, above it `images.format`."""
    kind, options = "png", {"optimize": True}
    if images.shape[-1] > 64 and section.format != "png":
        kind, options = section.format, {"quality": section.quality}
        if kind == "jpeg":
            options["subsampling"] = 0  # full-size colour planes
    return [_encode(pixels.permute(1, 2, 0).contiguous().numpy(), kind, options) for pixels in images]


def _encode(pixels: np.ndarray, kind: str, options: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def decode(files: Iterable[bytes]) -> Tensor:
    """Images of encoded files: uint8 (N, 3, s, s)."""
    files, images = list(files), torch.empty(0)
    for index, file in enumerate(files):
        pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(file)).convert("RGB"))).permute(2, 0, 1)
        if index == 0:
            images = torch.empty((len(files), *pixels.shape), dtype=torch.uint8)  # once: ImageNet's are 7.5 GB
        images[index] = pixels
    return images
