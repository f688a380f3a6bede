"""Several pictures on one canvas, inside the pixel budget of one image: the multi-formation of IDC (Kim et al. 2022).

With `images.grid: g` a condensed image is a canvas of g x g small pictures of one class. Canvases are what is stored
and counted; whatever learns from a set or labels it sees the decoded pictures alone. Picture i of a set is tile
i % g^2, counted row by row, of canvas i // g^2.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from . import encoding, rded, views
from .views import ViewTable


CANVASES = 64  # decoded at once: of 224 px and 2 x 2, 150 MB in float32


def facts(grid: int) -> dict[str, Any]:
    """What manifests say of canvases; nothing where there are none."""
    resize = (
        "each tile to the size of the image: bilinear, align_corners=False, float32, rounded half to even to uint8"
    )
    return {"decode": {"grid": grid, "resize": resize}} if grid > 1 else {}


def decode(images: Tensor, grid: int) -> Tensor:
    """Canvases (N, 3, s, s) to their pictures (N * grid^2, 3, s, s) of the same dtype; at grid 1 as they are.

    Tiles of side s / grid are resized bilinearly (align_corners=False, not antialiased). Floats are differentiable.
    uint8 is rounded, half to even, and the same on every machine: at grid 2 and 4 the sums are exact in float32, and
    at 3 they are ninths, of which none lies near a half.
    """
    if grid == 1:
        return images
    count, channels, size, _ = images.shape
    if images.is_floating_point():
        tiles = images.unflatten(3, (grid, -1)).unflatten(2, (grid, -1)).permute(0, 2, 4, 1, 3, 5)
        return interpolate(tiles.flatten(0, 2), (size, size), mode="bilinear", align_corners=False)
    pictures = images.new_empty((count, grid**2, channels, size, size))
    for canvases, place in zip(images.split(CANVASES), pictures.split(CANVASES), strict=True):
        place.copy_(decode(canvases.float(), grid).round().view_as(place))
    return pictures.flatten(0, 1)


def turn(images: Tensor, epoch: int, grid: int) -> Tensor:
    """Numbers of the pictures that an epoch shows of these images (ids, int64): one each, every tile in its turn.

    An epoch so has a view of each image, whatever the grid: steps and label bytes are those of plain images.
    """
    return images * grid**2 + (images + epoch) % grid**2


def compose(pictures: Tensor, grid: int) -> Tensor:
    """Pictures uint8 (N * grid^2, 3, s, s), shrunk (bilinear, antialiased), on canvases (N, 3, s, s)."""
    return pictures if grid == 1 else rded.tile(pictures.unflatten(0, (-1, grid**2)), pictures.shape[-1])


def of_files(files: list[bytes], grid: int, numbers: list[int]) -> Tensor:
    """Some pictures of encoded images, by their numbers: uint8 (n, 3, s, s)."""
    tiles, chosen = grid**2, torch.tensor(numbers)
    pictures = decode(encoding.decode(files[number // tiles] for number in numbers), grid)
    return pictures[torch.arange(len(chosen)) * tiles + chosen % tiles]


def stored(table: ViewTable, grid: int) -> ViewTable:
    """Views of pictures as rows are stored: ids of canvases, with `tile` and `mix_tile` int8 (-1 none) beside them."""
    if grid == 1:
        return table
    rows = dict(table)
    for mix in ("", "mix_"):
        picture = table[f"{mix}image_id"]
        rows[f"{mix}image_id"] = picture.div(grid**2, rounding_mode="floor")  # -1 stays -1
        rows[f"{mix}tile"] = (picture % grid**2).where(picture >= 0, -1).to(torch.int8)
    return {name: rows[name] for name in views.columns(rows)}


def joined(table: ViewTable, grid: int) -> ViewTable:
    """Stored rows as views of pictures: `image_id` and `mix_image_id` count pictures. The inverse of `stored`."""
    if grid == 1:
        return table
    joined = {name: column for name, column in table.items() if name not in ("tile", "mix_tile")}
    for mix in ("", "mix_"):
        canvas = table[f"{mix}image_id"]
        joined[f"{mix}image_id"] = (canvas * grid**2 + table[f"{mix}tile"]).where(canvas >= 0, -1)
    return joined
