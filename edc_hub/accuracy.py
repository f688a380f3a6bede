"""Top-1 accuracy as a metric of `evaluate` that lies here: loading one by its name would ask the Hub."""

import datasets
import evaluate
from torch import Tensor


class Top1(evaluate.Metric):
    """The share of predictions that are the reference's class."""

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
