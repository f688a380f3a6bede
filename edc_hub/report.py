"""Results shown: a table for terminals, a section for the card, learning curves."""

import io
import math
import textwrap
from collections.abc import Iterator
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .results import PAIRS, ROWS, WEIGHTS, amount, percent


WIDTH = 120
_MARGIN = "margin over (i)"
_NONE = "-" + " " * 6  # as wide as a figure without a spread is behind its point
_STYLES = {
    "set": {"color": "#0072b2", "linewidth": 2.2},
    "initial": {"color": "#e69f00", "linewidth": 1.4},
    "random": {"color": "#009e73", "linewidth": 1.4},
    "hard_mixed": {"color": "#cc79a7", "linewidth": 1.4},
    "hard_unmixed": {"color": "#cc79a7", "linewidth": 1.4, "linestyle": "--"},
    "real_mixed": {"color": "#d55e00", "linewidth": 1.4},
    "real_unmixed": {"color": "#d55e00", "linewidth": 1.4, "linestyle": "--"},
    "upper_bound": {"color": "0.45", "linewidth": 1.4},
}


class Line(NamedTuple):
    """A row as a table shows it; `missing` says why there is none, `flag` what asks for it where nobody did."""

    title: str
    n: str = ""
    live: str = ""
    ema: str = ""
    images: str = ""
    bytes: str = ""
    note: str = ""
    missing: str = ""
    flag: str = ""


def table(results: dict[str, Any]) -> str:
    """Plain text for a terminal, at most WIDTH wide."""
    parts = [_filled(f"{name}: {text}") for name, text in _facts(results["about"]).items()]
    for student in results["students"]:
        width = max(len(row.title) for row in ROWS.values())
        head = f"{student[-width:]:<{width}}{'n':>5}{'live':>13}{'EMA':>13}{'images':>10}{'bytes':>10}"
        parts += ["", head, "-" * len(head)]
        for line in _lines(results, student):
            if line.missing:
                why = f"not asked for ({line.flag})" if line.flag else f"not available: {line.missing}"
                parts.append(_filled(f"{line.title:<{width}}    -   {why}", width + 8))
                continue
            start = f"{line.title:<{width}}{line.n:>5}{line.live:>13}{line.ema:>13}{line.images:>10}{line.bytes:>10}"
            parts.append(_filled(f"{start}  {line.note}", len(start) + 2))
        parts += [_filled(text) for text in _beside(results, student)]
    return "\n".join(line.rstrip() for line in parts) + "\n"


def markdown(results: dict[str, Any]) -> str:
    """The same for a card: a table of all students, and what holds for all of its rows."""
    parts = ["| student | trained on | n | live | EMA | images | bytes | |", "|---|---|--:|--:|--:|--:|--:|---|"]
    for student in results["students"]:
        rows = []
        for line in _lines(results, student):
            note = f"not available: {line.missing}" if line.missing else line.note
            bold = "**" if line.title == _MARGIN else ""
            title, live, ema = (f"{bold}{text.strip()}{bold}" for text in (line.title, line.live, line.ema))
            rows.append([title, line.n, live, ema, line.images, line.bytes, note])
        for number, row in enumerate(rows):
            cells = ["" if number else f"**{student}**", *row]
            parts.append(f"| {' | '.join(cell.strip().replace('|', '/') for cell in cells)} |")
    parts += ["", *(f"- {name}: {text}" for name, text in _facts(results["about"]).items())]
    for student in results["students"]:
        parts += [f"- {student}, {text}" for text in _beside(results, student)]
    return "\n".join(parts)


def prefixes(results: dict[str, Any], sha: str) -> list[tuple[int, str, str]]:
    """What the example of this hash reaches on the first k images of each class: k, accuracy, number of students."""
    shown = [it for it in results.get("prefixes", ()) if it["example_sha256"] == sha]
    return [(it["images_per_class"], accuracy(it["accuracy"]), _count(len(it["accuracy"]), "student")) for it in shown]


def accuracy(values: list[float]) -> str:
    """Mean and sample standard deviation of fractions, in %."""
    return f"{percent(fmean(values), stdev(values) if len(values) > 1 else None)} %"


def _facts(about: dict[str, Any]) -> dict[str, str]:
    """What holds for every row, by what it is about."""
    made, test, size, hardware = (about[name] for name in ("set", "test", "bytes", "hardware"))
    test = {"split": "test", "own": True} | test  # results of earlier commits do not say
    revision = f" at {made['revision']}" if made["revision"] else ""
    commit = f" at {test['commit'][:12]}" if test["commit"] else ""
    parts = {"images": "images", "labels": "soft labels", "views": "view parameters", "observers": "observers"}
    split = test["split"] if about["split"] == "test" else "holdout (kept from the training images, for choices)"
    split += "" if test["own"] else " (not the test images of the set's own recipe)"
    return {
        "set": f"{made['id']}{revision}: {made['name']}, {made['ipc']} images a class, method {made['method']}, "
        f"{'seed' if len(made['seeds']) == 1 else 'seeds'} {', '.join(map(str, made['seeds']))}",
        "protocol": about["protocol"],
        "accuracy": "top-1 in % of the last epoch, mean ± sample std over n students; live weights and their average "
        "(EMA) side by side; nothing is selected on the test split, but of a control's two variants the better counts",
        "measured on": f"{test['id']}{commit}, split {split}, {test['images']:,} images, {test['transform']}",
        "bytes of the set": ", ".join(f"{text} {amount(size[name])}" for name, text in parts.items() if size[name]),
        "hardware": f"{hardware['device']}, {_count(hardware['processes'], 'process', 'es')} of "
        f"{_count(hardware['threads'], 'thread')}, {_count(hardware['cores'], 'core')}",
    }


def _lines(results: dict[str, Any], student: str) -> Iterator[Line]:
    about, own = results["about"], results["students"][student]
    averaged = _averaged(about, student)
    steps = _steps(own["rows"].get("set"))
    for row, (title, *_) in ROWS.items():
        if row not in own["rows"]:
            reason = about["unavailable"].get(row)
            flag = "--upper_bound" if row == "upper_bound" else f"--controls {row.partition('_')[0]}"
            yield Line(title, missing=reason or "not measured", flag="" if reason else flag)
            continue
        found, about_row = own["rows"][row], about["rows"][row]
        notes = _notes(found["each"])
        if any(row == name and len(own["rows"].keys() & PAIRS[pair]) == 2 for pair, name in own["better"].items()):
            notes.append("the better")
        if row == "random" and len({(one["set"], one["draw"]) for one in found["each"]}) < 3:
            notes.append("fewer than 3 draws")
        if steps and _steps(found) != steps:
            notes.append(f"{_steps(found):,} steps")
        live, ema = (_column(**found[weights]) for weights in WEIGHTS)
        ema = ema if averaged else _NONE
        images = f"{about_row['images']:,}"
        size = "" if about_row["bytes"] is None else amount(about_row["bytes"])
        yield Line(title, str(found["n"]), live, ema, images, size, "; ".join(notes))
    if margin := own["margin"]:
        live, ema = (_column(margin[it], margin["std"][it], "+") for it in WEIGHTS)
        yield Line(_MARGIN, str(margin["n"]), live, ema if averaged else _NONE)


def _notes(each: list[dict[str, Any]]) -> list[str]:
    """What n is made of, where that is not seeds alone."""
    numbers = {name: len({one[name] for one in each}) for name in ("set", "draw", "seed")}
    if numbers["set"] == numbers["draw"] == 1:
        return []
    draws = len({(one["set"], one["draw"]) for one in each})
    if draws != numbers["set"] * numbers["draw"]:  # sets of other numbers of draws
        return [f"{_count(draws, 'draw')} of {_count(numbers['set'], 'set')}"]
    if math.prod(numbers.values()) != len(each):  # each draw of random images has its own seed
        del numbers["seed"]
    return [" x ".join(_count(number, name) for name, number in numbers.items() if number > 1)]


def _steps(row: dict[str, Any] | None) -> int | None:
    return row["each"][0]["steps"] if row else None


def _averaged(about: dict[str, Any], student: str) -> bool:
    """Whether a student's weights were averaged; results of earlier commits do not say."""
    return student in about.get("averaged", [student])


def _beside(results: dict[str, Any], student: str) -> list[str]:
    """DD-Ranking's scores and published figures of one student, where there are any."""
    own, averaged = results["students"][student], _averaged(results["about"], student)
    parts, scores = [], own["dd_ranking"]
    if scores:
        weights = WEIGHTS if averaged else ("live",)
        shown = (f"{name.upper()} {' / '.join(f'{by[it]:.3f}' for it in weights)}" for name, by in scores.items())
        parts.append(f"DD-Ranking as fractions, live{' / EMA' if averaged else ''}: {', '.join(shown)}")
    if own["published"]:
        shown = (f"{it['method']} {percent(it['accuracy'], it['std'])} ({it['as']})" for it in own["published"])
        parts.append(f"published: {', '.join(shown)}; in brackets the epoch")
    return parts


def _column(mean: float, std: float | None, sign: str = "") -> str:
    """`52.1 ± 0.4`, or as wide without a spread, so that points stand below each other."""
    return percent(mean, std, sign) + " " * 6 * (std is None)


def _count(number: int | str, what: str, ending: str = "s") -> str:
    return f"{number} {what}{'' if number == 1 else ending}"


def _filled(text: str, indent: int = 2) -> str:
    """Broken into lines of at most WIDTH, the later ones indented."""
    whole = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(text, WIDTH, subsequent_indent=" " * indent, **whole)


def curves(panels: dict[str, dict[str, list[Tensor]]]) -> bytes:
    """A PNG of learning curves: a row of panels for each student, a line for each row of ROWS.

    Args: panels: by student and row, for each seed the training loss of each epoch, float (epochs,), and, where
    accuracy was measured on the way, float (points, 3): epoch, accuracy live, accuracy EMA in [0, 1]. Seeds are
    averaged.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    panels = dict(sorted(panels.items()))
    shown = [row for row in ROWS if any(row in rows for rows in panels.values())]
    measured = any(len(x) for rows in panels.values() for tensors in rows.values() for x in tensors if x.ndim == 2)
    figure = Figure(figsize=(11 if measured else 7.5, 0.9 + 3.2 * len(panels)), dpi=120, layout="constrained")
    grid = figure.subplots(len(panels), 1 + measured, squeeze=False)
    for axes, (student, rows) in zip(grid, panels.items(), strict=True):
        for row in (row for row in reversed(shown) if row in rows):  # the set is drawn last, above the others
            losses = torch.stack([x for x in rows[row] if x.ndim == 1]).mean(0)
            axes[0].plot(range(1, len(losses) + 1), losses, **_STYLES[row])
            points = [x for x in rows[row] if x.ndim == 2 and len(x)]
            if points:
                epoch, live, ema = torch.stack(points).mean(0).T
                axes[1].plot(epoch, 100 * ema, marker="o", markersize=4, **_STYLES[row])
                open_points = {"marker": "o", "markersize": 4, "markerfacecolor": "white", "linestyle": "none"}
                axes[1].plot(epoch, 100 * live, **{**_STYLES[row], **open_points})
        axes[0].set_yscale("log")
        axes[0].set_title(f"{student}: training loss", loc="left", fontsize=10)
        if measured:
            axes[1].set_title("top-1 in %, filled: EMA, open: live weights", loc="left", fontsize=10)
    for axis in grid.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="0.92", linewidth=0.8)
        axis.tick_params(labelsize=8, color="0.6")
        axis.set_axisbelow(True)
    for axis in grid[-1]:
        axis.set_xlabel("epoch", fontsize=9)
    handles = [Line2D([], [], label=ROWS[row].title, **_STYLES[row]) for row in shown]
    columns = 4 if measured else 3
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})  # a version, which is no part of the picture
    return picture.getvalue()
