"""What students reached: the summary that is `results.json`. `report.py` shows it.

Accuracies are top-1 of the last epoch as fractions, live weights and their average (EMA) side by side.
"""

import json
import math
from itertools import groupby
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal, NamedTuple

from . import disk


class Row(NamedTuple):
    """What students are trained on."""

    title: str
    images: Literal["set", "control", "real", "whole"]  # real: of equal bytes; whole: all real ones
    hard: bool = False  # labels, whatever the protocol's
    mixed: bool | None = None  # views; None: as the protocol has it


ROWS = {
    "set": Row("condensed set", "set"),
    "initial": Row("(i) initial images", "control"),
    "random": Row("(ii) random real images", "control"),
    "hard_mixed": Row("(iii) hard labels, mixed", "set", hard=True, mixed=True),
    "hard_unmixed": Row("(iii) hard labels, unmixed", "set", hard=True, mixed=False),
    "real_mixed": Row("(iv) real images, equal bytes, mixed", "real", hard=True, mixed=True),
    "real_unmixed": Row("(iv) real images, equal bytes, unmixed", "real", hard=True, mixed=False),
    "upper_bound": Row("whole real set", "whole", hard=True),
}
"""In the order of a table."""

PAIRS = {"hard": ("hard_mixed", "hard_unmixed"), "real": ("real_mixed", "real_unmixed")}
"""Controls of two variants, of which the better one counts."""

WEIGHTS = ("live", "ema")


def percent(mean: float, std: float | None, sign: str = "") -> str:
    """Fractions for readers, `52.1 ± 0.4`, or `52.1` without a spread; sign "+": `+3.2 ± 0.4`."""
    return f"{100 * mean:{sign}.1f}" + ("" if std is None else f" ± {100 * std:.1f}")


def amount(count: int) -> str:
    """A number of bytes for readers, `1.36 MB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 999.5:  # which three digits show as 1e+03
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


class Outcome(NamedTuple):
    """One trained student."""

    row: str  # of ROWS
    student: str
    set: int  # which condensed set
    draw: int  # which draw of random images, else 0
    seed: int
    live: float  # top-1 in [0, 1]
    ema: float
    steps: int
    seconds: float


def summarise(outcomes: list[Outcome], about: dict[str, Any]) -> dict[str, Any]:
    """The content of `results.json`, the same for outcomes in any order.

    Args: about: set, protocol, evaluation, split, test, bytes, rows, unavailable, hardware, versions; kept as it is.
    Returns `about` and for each student its rows with n, mean and std (None where n is 1), its margin over the
    initial images, the better variants, DD-Ranking's scores and published figures of its architecture.
    """
    order, hard = list(ROWS), about["evaluation"]["labels"] == "hard"  # then the set's own row is that of hard labels
    outcomes = sorted(outcomes, key=lambda it: (it.student, order.index(it.row), it.set, it.draw, it.seed))
    students = {}
    for student, own in groupby(outcomes, lambda it: it.student):
        rows = {row: list(part) for row, part in groupby(own, lambda it: it.row)}
        better = _better(rows)
        students[student] = {
            "rows": {row: _row(part) for row, part in rows.items()},
            "margin": _margin(rows),
            "better": better,
            "dd_ranking": _dd_ranking(rows, ("set",) if hard else PAIRS["hard"]),
            "published": _published(about, student),
        }
    return {"about": about, "students": students}


def _published(about: dict[str, Any], student: str) -> list[dict[str, Any]]:
    """What papers report for this architecture as they have it; nothing for one with arguments of its own."""
    from . import published

    arch = about["published_as"].get(student)
    if about["split"] != "test" or about["set"].get("part"):  # papers' figures are of other images
        return []
    return published.lookup(about["set"]["name"], about["set"]["ipc"], arch) if arch else []


def write(results: dict[str, Any], folder: Path) -> None:
    """Writes `results.json` in `folder`; what `showcase` measured there stays."""
    place = folder / "results.json"
    old = disk.json_of(place)
    results = {**{key: old[key] for key in ("prefixes",) if key in old}, **results}
    disk.write_text(place, json.dumps(results, indent=2, ensure_ascii=False) + "\n")


def _row(part: list[Outcome]) -> dict[str, Any]:
    each = []
    for outcome in part:
        facts = outcome._asdict()
        del facts["row"], facts["student"]
        each.append(
            {**facts, **{name: round(facts[name], 4) for name in WEIGHTS}, "seconds": round(facts["seconds"], 2)}
        )
    figures = {name: _figure([getattr(outcome, name) for outcome in part]) for name in WEIGHTS}
    return {"n": len(part), **figures, "each": each}


def _figure(values: list[float]) -> dict[str, float | None]:
    """Mean and sample standard deviation."""
    return {"mean": round(fmean(values), 4), "std": round(stdev(values), 4) if len(values) > 1 else None}


def _margin(rows: dict[str, list[Outcome]]) -> dict[str, Any] | None:
    """Set minus initial images, over the pairs of students of one set and one seed; std is of these differences."""
    initial = {(it.set, it.seed): it for it in rows.get("initial", [])}
    pairs = [(it, initial[it.set, it.seed]) for it in rows.get("set", []) if (it.set, it.seed) in initial]
    if not pairs:
        return None
    figures = {name: _figure([getattr(a, name) - getattr(b, name) for a, b in pairs]) for name in WEIGHTS}
    means = {name: figure["mean"] for name, figure in figures.items()}
    return {"n": len(pairs), **means, "std": {name: figure["std"] for name, figure in figures.items()}}


def _better(rows: dict[str, list[Outcome]]) -> dict[str, str]:
    """Of each control of two variants, the one of the higher mean with averaged weights."""
    there = {pair: [row for row in variants if row in rows] for pair, variants in PAIRS.items()}
    return {pair: max(found, key=lambda row: _mean(rows[row], "ema")) for pair, found in there.items() if found}


def _mean(part: list[Outcome], name: str) -> float:
    return fmean(getattr(outcome, name) for outcome in part)


def _dd_ranking(rows: dict[str, list[Outcome]], hard: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """DD-Ranking's scores of fractions, where the rows that they need are there; `hard`: those of its hard labels.

    Hard-label recovery gap hlr = Acc(whole, hard) - Acc(set, hard), improvement over random ior = Acc(set) -
    Acc(random), a = (ior - hlr) / 2, label-robust score lrs = (e^a - 1/e) / (e - 1/e). Of two variants of hard labels
    the better one counts, with live and with averaged weights by themselves.
    """
    gap = _difference(rows, "upper_bound", hard)
    gain = _difference(rows, "set", ("random",))
    scores = {"hlr": gap, "ior": gain}
    if gap and gain:
        scores["lrs"] = {name: _squash((gain[name] - gap[name]) / 2) for name in WEIGHTS}
    return {score: {name: round(by[name], 4) for name in WEIGHTS} for score, by in scores.items() if by}


def _difference(rows: dict[str, list[Outcome]], row: str, minus: tuple[str, ...]) -> dict[str, float] | None:
    others = [rows[other] for other in minus if other in rows]
    if row not in rows or not others:
        return None
    return {name: _mean(rows[row], name) - max(_mean(part, name) for part in others) for name in WEIGHTS}


def _squash(alpha: float) -> float:
    return (math.exp(alpha) - math.exp(-1)) / (math.e - math.exp(-1))
