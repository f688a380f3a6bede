"""The split that accuracy is measured on, and top-1 accuracy."""

import datasets
import evaluate
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


class Top1(evaluate.Metric):
    """The share of predictions that are the reference's class. It lies here: loading one by its name asks the Hub."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(
            description="Top-1 accuracy.", citation="", inputs_description="Numbers of classes.", features=features
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        right = sum(a == b for a, b in zip(predictions, references, strict=True))
        return {"top1": right / len(references)}


def top1(predictions: Tensor, references: Tensor) -> float:
    """Accuracy in [0, 1] of predicted classes (T,) against the true ones (T,), both integers on any device.

    Meant for the end of a training, once over the whole test split. ValueError where the lengths differ.
    """
    given = {"predictions": predictions, "references": references}
    columns = {name: column.cpu().long().numpy() for name, column in given.items()}
    return Top1(keep_in_memory=True).compute(**columns)["top1"]
