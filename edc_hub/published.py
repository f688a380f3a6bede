"""Accuracies that papers report, to stand beside measured ones: `recipes/published.yaml`."""

from functools import cache
from typing import Any, TypedDict

from . import documents, recipes


# accuracy and std (None where none is given) as fractions; as: the epoch it is of, last | best | unknown
Figure = TypedDict("Figure", {"method": str, "accuracy": float, "std": float | None, "as": str, "where": str})

_SAME = {"shufflenet_v2_x0_5": "shufflenet_v2"}


def lookup(name: str, ipc: int, student: str) -> list[Figure]:
    """What papers report for a data set (by its recipe's name), an IPC and a student; empty where nothing is known."""
    found = _table().get(name, {}).get(ipc, {}).get(_SAME.get(student, student), [])
    return [
        {
            "method": it["method"],
            "accuracy": _fraction(it["accuracy"]),
            "std": _fraction(it["std"]) if "std" in it else None,
            "as": it["as"],
            "where": it["where"],
        }
        for it in found
    ]


@cache
def _table() -> dict[str, Any]:
    return documents.load(recipes.ROOT / "published.yaml")


def _fraction(percent: float) -> float:
    return round(percent / 100, 6)  # 0.326, not 0.32600000000000001
