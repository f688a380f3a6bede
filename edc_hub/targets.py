"""What images are asked to have: targets that follow from the moments of the real set (EDC Eq. 2 and 5).

Every class, block or global variance is a weighted sum of the kept moments of classes, by the law of total variance.
"""

import json
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import work
from .recipe import Moments as Section
from .recipe import Recipe
from .taps import Layout
from .work import Session, Unit


STAGE, VERSION = "moments", 1
Key = tuple[str, int]  # observer and epoch


class Targets(NamedTuple):
    """What a block of images of one observer is matched to: float32 over the features F of `layout`, on the device."""

    layout: Layout
    global_mean: Tensor
    """(F,): of all real images; also what moments of the block are measured about."""
    global_var: Tensor
    """(F,)."""
    class_ids: Tensor
    """(G,) int64, ascending: the classes of the block."""
    class_mean: Tensor
    """(G, F)."""
    class_var: Tensor
    """(G, F)."""
    mixture_mean: Tensor
    """(F,): of the block's classes together, weighted by their shares of it."""
    mixture_var: Tensor
    """(F,)."""


class Moments:
    """The finished moments of every matched observer, one file each."""

    def __init__(self, recipe: Recipe, units: dict[Key, Unit], session: Session):
        self._recipe, self._units, self._session = recipe, units, session

    def fingerprint(self, chosen: Sequence[Key]) -> str:
        """Stands for the targets of these observers."""
        section = self._recipe.moments
        files = [self._units[key].fingerprint for key in chosen]
        return work.fingerprint(STAGE, VERSION, files=files, target=section.target, bn_target=section.bn_target)

    def targets(self, name: str, epoch: int, counts: Tensor) -> Targets:
        """Targets of a block with `counts` (C,) int64 images of each class. Reads only the rows of its classes."""
        unit, section = self._units[name, epoch], self._recipe.moments
        ids = counts.nonzero().flatten()
        with self._session.store.open(unit) as file:
            facts = json.loads(file.metadata()["facts"])
            whole = {key: file.get_tensor(key) for key in file.keys() if key.split("_")[0] in ("global", "running")}
            slices = [file.get_slice(key) for key in ("mean", "within", "between")]
            mean, within, between = (torch.cat([part[i : i + 1] for i in ids.tolist()]) for part in slices)
        layout = Layout.of(tuple(part) for part in facts["layout"])
        counts = counts[ids].float()
        mixture = mix(mean, within, between, counts / counts.sum(), section.target, counts)
        global_mean, global_var = whole["global_mean"], global_variance(whole, section, float(counts.mean()))
        if section.bn_target == "running":
            known = whole["running_mean"].isfinite()
            global_mean = torch.where(known, whole["running_mean"], global_mean)
            global_var = torch.where(known, whole["running_var"], global_var)
        layout, columns = layout.keep(self._recipe.synthesize.layers)
        var = class_variance(within, between, section.target, counts[:, None])
        parts = (global_mean, global_var, ids, mean, var, *mixture)
        device = self._session.device
        return Targets(layout, *(t.to(device) if t is ids else t[..., columns].to(device) for t in parts))


def class_variance(within: Tensor, between: Tensor, target: str, counts: Tensor) -> Tensor:
    """Variance asked of the images of one class, `counts` of them.

    `reference`: within images alone, as EDC's code has it; `exact`: of the class; `finite`: what so many images drawn
    from the class have on average.
    """
    factor = {"reference": torch.zeros_like(counts), "exact": torch.ones_like(counts), "finite": 1 - 1 / counts}
    return within + factor[target] * between


def mix(
    mean: Tensor, within: Tensor, between: Tensor, shares: Tensor, target: str, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and variance (F,) of classes together. Moments (G, F), `shares` and `counts` (G,).

    `reference` leaves out the spread of the class means, as EDC's code does. `finite` asks for class means that are
    met exactly; means of images drawn at random would spread a little more.
    """
    average = shares @ mean
    var = shares @ class_variance(within, between, target, counts[:, None])
    if target != "reference":
        var = var + shares @ (mean - average).square()
    return average, var


def global_variance(whole: dict[str, Tensor], section: Section, images: float) -> Tensor:
    """Global target (F,), of within + between + spread of class means, with `images` of a class in the block.

    `reference`: both of the latter times 1 - 1/batch, what the variances of batches are on average; `finite`: between
    times 1 - 1/images, as in the block's mixture, so that the two agree where a block holds all classes.
    """
    within, between, spread = (whole[f"global_{name}"] for name in ("within", "between", "spread"))
    if section.target == "reference":
        return within + (1 - 1 / section.batch) * (between + spread)
    return within + (1 - 1 / images if section.target == "finite" else 1.0) * between + spread
