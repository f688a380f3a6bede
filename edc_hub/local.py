"""The class form of `class_scope: local`: real images drawn anew for every block, and their statistics."""

import torch
from torch import Tensor

from . import matching, moments
from .networks import Network
from .recipe import Recipe
from .source import RealSet
from .taps import Taps
from .targets import Targets
from .work import Session


def draw(real: RealSet, counts: Tensor, each: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Freshly drawn real images of a block's classes, and what each counts in the block's statistics.

    Args:
        counts: int64 (C,), images of each class in the block.
        each: real images drawn of each of these classes, fewer where a class has fewer.

    Returns:
        uint8 (n, 3, s, s) and float32 (n,), which sums to 1: each class has its share of the block.
    """
    rows, weights = [], []
    for label in counts.nonzero().flatten().tolist():
        of_class = real.rows(label)
        drawn = of_class[torch.randperm(len(of_class), generator=generator)[:each]]
        rows.append(drawn)
        weights.append(torch.full((len(drawn),), float(counts[label]) / float(counts.sum()) / len(drawn)))
    return real.images(torch.cat(rows)), torch.cat(weights)


def retarget(
    targets: Targets, network: Network, images: Tensor, weights: Tensor, recipe: Recipe, session: Session
) -> Targets:
    """`targets` with the class form of `class_scope: local`: the statistics of these real images together.

    The alternative that the released code has under this name; the global form stays as it is.
    """
    taps = Taps(network, patch=recipe.moments.patch, layers=recipe.synthesize.layers)
    taps.shift = targets.global_mean
    parts = [moments.forward(network, taps, part, session) for part in images.split(recipe.moments.batch)]
    first, second = (torch.cat(each) for each in zip(*parts, strict=True))
    weights = weights.to(session.device)[None]
    mean, var = matching.group(first, second, targets.global_mean, weights)
    return targets._replace(mixture_mean=mean[0], mixture_var=var[0])
