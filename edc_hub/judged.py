"""The split that accuracy is measured on."""

from collections.abc import Callable

import torch
from torch import Tensor

from . import source
from .comparison import Comparison
from .condensed import CondensedSet
from .errors import InputError
from .realset import RealSet
from .recipe import Source


BATCH = 500  # images that are decoded at a time


def open_split(comparison: Comparison, section: Callable[[int], Source], size: int, names: list[str]) -> RealSet:
    """The comparison's split, at `test_resize` where the protocol has one, else at `size` pixels.

    Args: section: the source at a size; names: classes of the condensed set, in order.
    Errors: InputError where the classes are not the set's, and for a `test_resize` below the images' size.
    """
    resize = comparison.evaluation.test_resize
    split = source.load(section(resize or size), comparison.split)
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


def refuse_other_images(section: Source, split: RealSet, condensed: CondensedSet) -> None:
    """Raises InputError where `split`, a hold-out, was kept from other training images than the set's.

    A row's lot hangs on its number, so of other images the set may have seen some.
    """
    made = condensed.manifest["source"]
    if split.commit and (split.id, split.commit) == (made["id"], made["commit"]):
        return
    there = source.load(section.model_copy(update={"size": condensed.source_size}))
    if there.fingerprint != made["fingerprint"]:
        raise InputError(
            f"split: holdout, but the set was condensed from other training images than {there.id} has here, and may "
            "have seen some of these; give source.path and source.revision of its own, or write --split test"
        )


def centres(split: RealSet, size: int) -> tuple[Tensor, Tensor]:
    """The middle `size` pixels of every image of a split, uint8 (T, 3, size, size), and the classes int64 (T,)."""
    rows, edge = split.rows(), (split.size - size) // 2
    inner = slice(edge, edge + size)
    found = torch.empty((len(rows), 3, size, size), dtype=torch.uint8)
    for index, (images, *_) in enumerate(split.batches(rows, BATCH)):  # at `test_resize` they may not all fit
        found[index * BATCH : (index + 1) * BATCH] = images[..., inner, inner]
    return found, split.labels[rows]
