"""Accuracies that papers report, to stand beside measured ones: `recipes/published.yaml`, and those of a sweep."""

import functools
from collections.abc import Collection
from typing import Any, Literal

from pydantic import Field, ValidationError

from . import documents, keys, recipes
from .errors import InputError
from .section import Section


Taken = Literal["last", "best", "unknown"]

_SAME = {"shufflenet_v2_x0_5": "shufflenet_v2"}


def lookup(name: str, ipc: int, student: str) -> list[dict[str, Any]]:
    """What papers report for a data set (by its recipe's name), an IPC and a student; empty where nothing is known.

    Each has method, where, accuracy and std (None where none is given) as fractions, and `as`, the epoch it is of.
    """
    found = _shipped().get(name, {}).get(ipc, {}).get(_SAME.get(student, student), [])
    return [{**it, "accuracy": _fraction(it["accuracy"]), "std": _fraction(it.get("std"))} for it in found]


@functools.cache
def _shipped() -> dict[str, Any]:
    return documents.load(recipes.ROOT / "published.yaml")


def _fraction(percent: float | None) -> float | None:
    return None if percent is None else round(percent / 100, 6)  # 0.326, not 0.32600000000000001


class Paper(Section):
    """What a paper reports for the cells of a sweep."""

    where: str = Field(description="the paper and its table")
    taken: Taken = Field("unknown", alias="as", description="the epoch a figure is of")
    figures: dict[str, dict[str, Any]] = Field(
        description="row, column where there are any, student: per cent, or {accuracy, std, as, where}"
    )


class Reported(Section):
    """One figure of a paper."""

    accuracy: float = Field(description="top-1 in per cent")
    std: float | None = Field(None, description="its spread, where one is given")
    taken: Taken = Field(alias="as", description="the epoch it is of")
    where: str = Field(description="the paper and its table")


def reported(paper: Paper | None, row: str, column: str, student: str) -> Reported | None:
    """What the paper has for a student of a cell; `column` is "" in a sweep without columns."""
    own = paper.figures.get(row, {}) if paper else {}
    figure = (own.get(column, {}) if column else own).get(student)
    if paper is None or figure is None:
        return None
    figure = figure if isinstance(figure, dict) else {"accuracy": figure}
    try:
        return Reported.model_validate({"as": paper.taken, "where": paper.where, **figure})
    except ValidationError as error:
        raise InputError(f"paper.figures.{row}: {student}: {keys.complaint(error, Reported)}") from error


def check(paper: Paper | None, rows: Collection[str], columns: Collection[str]) -> None:
    """Raises InputError for a figure of no row or column of the sweep, or one that is none."""
    for row, own in (paper.figures if paper else {}).items():
        if row not in rows:
            raise InputError(f"paper.figures: '{row}' is no row; there are: {', '.join(rows)}")
        for column, students in own.items() if columns else [("", own)]:
            if columns and (column not in columns or not isinstance(students, dict)):
                known = ", ".join(columns)
                raise InputError(f"paper.figures.{row}: '{column}' is no column with students; there are: {known}")
            for student in students:
                reported(paper, row, column, student)
