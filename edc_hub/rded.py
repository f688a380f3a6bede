"""RDED's selector and EDC's variant of it: crops that networks find easy, tiled to images (EDC section 3.2, Eq. 3)."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from . import work
from .pixels import CROP_DRAWS, to_float
from .recipe import Recipe
from .source import RealSet
from .work import Session, Unit


if TYPE_CHECKING:
    from .networks import Network

VERSION = 1
ROWS = 8192  # rows a unit of the whole-image scores
EDC_IMAGES, EDC_CROPS = 4 * 64, 4  # the edc variant takes 4 batches of 64 images, 4 crops each


def score_all(
    recipe: Recipe, real: RealSet, networks: Callable[[], list["Network"]], seen: dict, session: Session
) -> Tensor:
    """Cross-entropy float32 (N,) of every whole image, step a of the edc variant; infinite for rows not used.

    `seen` stands for the set and the networks. Ranges of rows are the units, not classes: a stream passes once.
    """
    inputs = work.fingerprint("scores", VERSION, batch=recipe.initialize.batch, **seen)
    rows = real.rows()
    parts = {Unit("scores", f"rows-{index:05d}", inputs): part for index, part in enumerate(rows.split(ROWS))}

    def make(unit: Unit, _generator: Generator, _progress: work.Progress) -> tuple[dict[str, Tensor], dict]:
        batches = real.batches(parts[unit], recipe.initialize.batch)
        found = [score(networks(), images, labels, real.size, session) for images, labels, _ in batches]
        return {"scores": torch.cat(found)}, {}

    work.run(list(parts), make, session, seed=recipe.seed, label="scores of real images")
    scores = torch.full((len(real.labels),), torch.inf)
    scores[rows] = torch.cat([session.store.load(unit)["scores"] for unit in parts])
    return scores


@torch.no_grad()
def score(networks: list["Network"], images: Tensor, labels: Tensor, size: int, session: Session) -> Tensor:
    """Cross-entropy float32 (n,) of the networks' mean logits against `labels` (n,), on the CPU.

    Images uint8 (n, 3, h, w) smaller than `size` are centred in zeros of each network's normalised space, as in RDED.
    """
    x, logits = to_float(images, session.device), 0
    for network in networks:
        with session.autocast():
            logits = logits + network(_centred(x, size, network.facts["mean"])).float()
    return F.cross_entropy(logits / len(networks), labels.to(session.device), reduction="none").cpu()


def _centred(x: Tensor, size: int, mean: list[float]) -> Tensor:
    height, width = x.shape[-2:]
    if (height, width) == (size, size):
        return x
    top, left = (size - height) // 2, (size - width) // 2
    canvas = torch.tensor(mean, device=x.device)[:, None, None].repeat(len(x), 1, size, size)
    canvas[..., top : top + height, left : left + width] = x
    return canvas


def select(
    recipe: Recipe,
    real: RealSet,
    label: int,
    rows: Tensor,
    networks: list["Network"],
    session: Session,
    generator: Generator,
) -> tuple[Tensor, Tensor]:
    """Images uint8 (ipc, 3, s, s) of factor x factor crops with the lowest cross-entropy, and their rows (ipc, tiles).

    Ranks are `ranked`'s: with another `difficulty` than easiest, other crops come first.

    rded: of each of `rows` the best of `crops` square crops of the tile's side; tile t of image j has rank t*ipc + j.
    edc: the best of 1,024 crops of the image's side with the usual ratios, several from one image; tile t of image j
    has rank j*factor^2 + t. The crops are of the first 256 of `rows`, which `score_all` has sorted; fewer serve again.
    (The code cuts them from the image squashed to a square, one box for 64 images; here from the original, each its
    own.)
    """
    section = recipe.initialize
    edc, tiles = section.variant == "edc", section.factor**2
    side, count, ratio = real.size // section.factor, section.crops, (1.0, 1.0)
    if edc:
        rows = rows.repeat(-(-EDC_IMAGES // len(rows)))[:EDC_IMAGES]
        side, count, ratio = real.size, EDC_CROPS, (3 / 4, 4 / 3)
    draws = torch.rand((len(rows), count, CROP_DRAWS), generator=generator, dtype=torch.float64)
    area, images_a_pass = tuple(section.crop_area), max(1, section.batch // count)
    crops, scores, sources = [], [], []
    for images, source in real.crops(rows, images_a_pass, draws, side, area=area, ratio=ratio, flip=edc):
        labels = torch.full((len(images) * count,), label)
        found = score(networks, images.flatten(0, 1), labels, real.size, session).view(-1, count)
        if not edc:
            best = found.argmin(1)
            each = torch.arange(len(images))
            found, images = found[each, best, None], images[each, best, None]
        crops.append(images.flatten(0, 1))
        scores.append(found.flatten())
        sources.append(source.repeat_interleave(found.shape[1]))
    ranks = ranked(torch.cat(scores), section.difficulty)[: recipe.ipc * tiles]
    order = ranks.view(recipe.ipc, tiles) if edc else ranks.view(tiles, recipe.ipc).T
    return tile(torch.cat(crops)[order], real.size), torch.cat(sources)[order]


def ranked(scores: Tensor, difficulty: str) -> Tensor:
    """Indices int64 (n,) of crops in the order of choice: by ascending score, descending, or from the median outwards.

    medium (DELT, CV-DD) begins at the median, so that the first images of a class are the medium ones at any IPC.
    """
    order = scores.argsort(stable=True, descending=difficulty == "hardest")
    if difficulty != "medium":
        return order
    return order[(torch.arange(len(order)) - (len(order) - 1) / 2).abs().argsort(stable=True)]


def tile(crops: Tensor, size: int) -> Tensor:
    """uint8 (n, 3, size, size) from crops uint8 (n, factor^2, 3, h, w), laid out row by row.

    The first `size % factor` rows and columns of tiles are a pixel larger, as in RDED; resizing is bilinear.
    """
    factor = round(crops.shape[1] ** 0.5)
    sides = [size // factor + (index < size % factor) for index in range(factor)]
    grid = crops.unflatten(1, (factor, factor))
    strips = [torch.cat([_resized(grid[:, i, j], h, w) for j, w in enumerate(sides)], -1) for i, h in enumerate(sides)]
    return torch.cat(strips, -2)


def _resized(images: Tensor, height: int, width: int) -> Tensor:
    if images.shape[-2:] == (height, width):
        return images
    resized = F.interpolate(images.float(), (height, width), mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)
