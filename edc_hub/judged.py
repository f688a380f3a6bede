"""The split that accuracy is measured on."""

import torch
from torch import Tensor

from . import source
from .comparison import Comparison
from .errors import InputError
from .realset import RealSet


BATCH = 500  # images that are decoded at a time


def open_split(comparison: Comparison, size: int, names: list[str]) -> RealSet:
    """The comparison's split, at `test_resize` where the protocol has one, else at `size` pixels.

    Args: names: classes of the condensed set, in order.
    Errors: InputError where the classes are not the set's, and for a `test_resize` below the images' size.
    """
    resize = comparison.evaluation.test_resize
    section = comparison.source.model_copy(update={"size": resize or size})
    split = source.load(section, comparison.split)
    if names != split.names:
        wrong = next((pair for pair in zip(names, split.names, strict=False) if pair[0] != pair[1]), None)
        what = f"class '{wrong[1]}' where the set has '{wrong[0]}'" if wrong else f"{len(split.names)} classes"
        raise InputError(
            f"source.path: {split.id} has {what} ({len(names)} in the set); give the set that it was condensed "
            "from, or the same source.classes"
        )
    if resize and split.size < size:
        raise InputError(f"evaluation.test_resize: {split.size} is less than the images' {size} px; raise it")
    return split


def centres(split: RealSet, size: int) -> tuple[Tensor, Tensor]:
    """The middle `size` pixels of every image of a split, uint8 (T, 3, size, size), and the classes int64 (T,)."""
    rows, edge = split.rows(), (split.size - size) // 2
    inner = slice(edge, edge + size)
    found = torch.empty((len(rows), 3, size, size), dtype=torch.uint8)
    for index, (images, *_) in enumerate(split.batches(rows, BATCH)):  # at `test_resize` they may not all fit
        found[index * BATCH : (index + 1) * BATCH] = images[..., inner, inner]
    return found, split.labels[rows]
