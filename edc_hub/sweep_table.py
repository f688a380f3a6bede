"""A sweep shown: the one table of all its cells as text, Markdown, CSV and picture."""

import csv
import io
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from . import disk, published
from .cells import Cell, Parsed
from .protocol import named_students
from .published import Reported
from .results import ROWS, WEIGHTS, amount, percent


WIDTH = 120
_COLUMNS = ("row", "column", "student", "trained on", "n", "live", "live std", "EMA", "EMA std", "bytes", "protocol")
_NAMES = {"ema": "EMA", "live": "live"}


class Line(NamedTuple):
    """A student of a cell, trained on the set or on a control; accuracies are fractions."""

    row: str
    column: str
    student: str
    trained: str  # a row of results.ROWS
    missing: str  # why there are no figures, else ""
    n: int
    figures: dict[str, dict[str, float | None]]  # by weights: mean, std
    bytes: int | None
    protocol: str
    paper: Reported | None  # beside the set alone


def lines(parsed: Parsed, failed: dict[str, Exception]) -> list[Line]:
    """Every figure that there is, in the order of the sweep, and a line for each that is missing."""
    found = []
    for cell in parsed.cells:
        results = _results(cell)
        for student in named_students(cell.recipe.evaluation):
            paper = published.reported(parsed.sweep.paper, cell.row, cell.column, student)
            where = (cell.row, cell.column, student)
            if results is None or cell.place in failed:
                missing = "failed" if cell.place in failed else "not yet"
                found.append(Line(*where, "set", missing, 0, {}, None, "", paper))
                continue
            about = results["about"]
            for trained, own in results["students"][student]["rows"].items():
                figures = {weights: own[weights] for weights in _NAMES}
                size = about["rows"][trained]["bytes"]
                beside = paper if trained == "set" else None
                found.append(Line(*where, trained, "", own["n"], figures, size, about["protocol"], beside))
    return found


def _results(cell: Cell) -> dict[str, Any] | None:
    return disk.json_of(cell.folder / "results.json") or None  # not there yet, or damaged: evaluated again


# Tables


class Block(NamedTuple):
    """One table: a column for each column of the sweep, or for each student where it has none."""

    title: str
    columns: list[tuple[str, str, str]]  # heading, column, student


def _blocks(parsed: Parsed, every: list[Line]) -> list[Block]:
    students, columns = dict.fromkeys(line.student for line in every), list(parsed.sweep.columns)
    if not columns:
        return [Block("", [(student, "", student) for student in students])]
    return [Block(student, [(column, column, student) for column in columns]) for student in students]


def _grid(parsed: Parsed, every: list[Line], block: Block) -> list[list[list[str]]]:
    """Texts by line and column of the sweep; the first of each line is its label, the first line the heading.

    Each column is the figures of the weights shown and, where the paper has any, the paper's.
    """
    weights = parsed.sweep.weights
    by_place = {(line.row, line.column, line.student, line.trained): line for line in every}
    quoted = [any(by_place[key].paper for key in by_place if key[1:3] == (c, s)) for _, c, s in block.columns]
    head = [[block.title]]
    for (heading, _, _), paper in zip(block.columns, quoted, strict=True):
        names = [heading] if len(weights) == 1 else [f"{heading}, {_NAMES[name]}" for name in weights]
        head.append([*names, *["paper"] * paper])
    grid = [[*head, ["bytes"]]]
    for row in parsed.sweep.rows:
        for trained, (title, *_) in ROWS.items():
            own = [by_place.get((row, column, student, trained)) for _, column, student in block.columns]
            if not any(own):
                continue
            texts = [[row if trained == "set" else f"  {title}"]]
            for line, paper in zip(own, quoted, strict=True):
                ours = [_ours(line, name) for name in weights]
                texts.append([*ours, *[_theirs(line.paper if line else None)] * paper])
            grid.append([*texts, [_bytes([line.bytes for line in own if line and line.bytes is not None])]])
    return grid


def _ours(line: Line | None, weights: str) -> str:
    """`48.6 ± 0.3 (9)`, in brackets the number of students."""
    if line is None or line.missing:
        return line.missing if line else "-"
    return f"{percent(**line.figures[weights])} ({line.n})"


def _theirs(paper: Reported | None) -> str:
    """`48.6 ± 0.3 last`, with the paper's decimals: how the figure was taken stands beside it."""
    if paper is None:
        return ""
    figures = [f"{value:.2f}".removesuffix("0") for value in (paper.accuracy, paper.std) if value is not None]
    return f"{' ± '.join(figures)} {paper.taken}"


def _bytes(sizes: list[int]) -> str:
    least, most = (amount(end(sizes)) if sizes else "" for end in (min, max))
    return least if least == most else f"{least} to {most}"


def _facts(parsed: Parsed, every: list[Line], failed: dict[str, Exception]) -> dict[str, str]:
    """What holds for the whole table, by what it is about."""
    sweep, found = parsed.sweep, [_results(cell) for cell in parsed.cells]
    abouts, waiting = [it["about"] for it in found if it], found.count(None)
    shown = " and ".join({"ema": "averaged weights (EMA)", "live": "live weights"}[name] for name in sweep.weights)
    choices = "" if sweep.split == "test" else ", kept from the training images, for choices"
    hardware = {_hardware(about["hardware"]) for about in abouts}
    tests = {
        f"{about['test']['images']:,} images of {about['test']['id']}, {about['test']['transform']}"
        for about in abouts
    }
    draws = ", of row (ii) set seeds x random draws" if "random" in sweep.controls else ""
    split = "" if sweep.split == "test" else "; the paper's figures are of its test split"
    wheres = dict.fromkeys(line.paper.where for line in every if line.paper)
    facts = {
        "accuracy": f"top-1 in % of the last epoch, split {sweep.split}{choices}, {shown}; mean ± sample std, in "
        f"brackets n: set seeds {_listed(sweep.set_seeds)} x student seeds {_listed(sweep.seeds)}{draws}",
        "measured on": "; ".join(sorted(tests)),
        "paper": "; ".join(wheres)
        and f"{'; '.join(wheres)}. Beside a figure the epoch it is of: last, best or unknown{split}",
        "hardware": "; ".join(sorted(hardware)),
        "cells": f"{waiting} of {len(parsed.cells)} are missing" if waiting else "",
    }
    facts |= {f"failed, {place}": " ".join(str(error).split()) for place, error in failed.items()}
    return {name: text for name, text in facts.items() if text}


def _hardware(facts: dict[str, Any]) -> str:
    return f"{facts['device']}, processes {facts['processes']}, threads {facts['threads']}, cores {facts['cores']}"


def _listed(values: list[int]) -> str:
    return ", ".join(map(str, values))


def text(parsed: Parsed, failed: dict[str, Exception]) -> str:
    """Plain text for a terminal, at most WIDTH wide where a single column is not wider."""
    every = lines(parsed, failed)
    parts = [parsed.sweep.title]
    for block in _blocks(parsed, every):
        grid = _grid(parsed, every, block)
        widths = [[max(len(line[c][i]) for line in grid) for i in range(len(grid[0][c]))] for c in range(len(grid[0]))]
        label = widths[0][0]
        for some in _fitting(widths, label):
            parts.append("")
            for number, line in enumerate(grid):
                texts = (t.rjust(w) for c in some for t, w in zip(line[c], widths[c], strict=True))
                parts.append("   ".join([line[0][0].ljust(label), *texts]).rstrip())
                parts += ["-" * (label + sum(3 + w for c in some for w in widths[c]))] if number == 0 else []
    facts = (f"{name}: {value}" for name, value in _facts(parsed, every, failed).items())
    parts += ["", *(textwrap.fill(fact, WIDTH, subsequent_indent="  ", break_on_hyphens=False) for fact in facts)]
    return "\n".join(parts)


def _fitting(widths: list[list[int]], label: int) -> Iterator[list[int]]:
    """Numbers of the columns after the label in parts that fit in WIDTH."""
    some, used = [], label
    for column in range(1, len(widths)):
        own = sum(3 + width for width in widths[column])
        if some and used + own > WIDTH:
            yield some
            some, used = [], label
        some, used = [*some, column], used + own
    yield some


def markdown(parsed: Parsed, every: list[Line], failed: dict[str, Exception]) -> str:
    """The same for a document, of the figures `every`."""
    parts = [f"**{parsed.sweep.title}**"]
    for block in _blocks(parsed, every):
        rows = [[t.strip().replace("|", "/") for cell in line for t in cell] for line in _grid(parsed, every, block)]
        rows.insert(1, ["---", *["--:"] * (len(rows[0]) - 1)])
        parts += ["", *(f"| {' | '.join(row)} |" for row in rows)]
    parts += ["", *(f"- {name}: {value}" for name, value in _facts(parsed, every, failed).items())]
    return "\n".join(parts) + "\n"


def table(every: list[Line]) -> str:
    """CSV, a line a figure; accuracies in per cent."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*_COLUMNS, "missing", "paper", "paper std", "as", "where"])
    for line in every:
        figures = [line.figures.get(name, {}).get(key) for name in WEIGHTS for key in ("mean", "std")]
        shown = [None if value is None else round(100 * value, 2) for value in figures]
        paper = line.paper
        theirs = [paper.accuracy, paper.std, paper.taken, paper.where] if paper else [None] * 4
        own = [line.row, line.column, line.student, line.trained, line.n, *shown, line.bytes, line.protocol]
        writer.writerow([*own, line.missing, *theirs])
    return file.getvalue()


def write(parsed: Parsed, failed: dict[str, Exception]) -> None:
    """Writes table.csv, table.md and table.png of the cells that are finished."""
    every = lines(parsed, failed)
    disk.write_text(parsed.folder / "table.csv", table(every))
    disk.write_text(parsed.folder / "table.md", markdown(parsed, every, failed))
    draw(parsed, every, parsed.folder / "table.png")


def draw(parsed: Parsed, every: list[Line], path: Path) -> None:
    """Writes a PNG: a panel a column of each block, a point with its spread a row, the paper's hollow."""
    from matplotlib.figure import Figure

    blocks, rows = _blocks(parsed, every), list(parsed.sweep.rows)
    across = max(len(block.columns) for block in blocks)
    size = (max(6, 1.5 + 4 * across), 1.2 + len(blocks) * (0.8 + 0.3 * len(rows)))
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    grid = figure.subplots(len(blocks), across, squeeze=False, sharey=True)
    weights = parsed.sweep.weights[0]
    for panels, block in zip(grid, blocks, strict=True):
        for axis, (heading, column, student) in zip(panels, block.columns, strict=True):
            for line in every:
                if (line.column, line.student, line.trained) != (column, student, "set"):
                    continue
                place = rows.index(line.row)
                if line.paper:
                    axis.plot(line.paper.accuracy, place, "D", color="#e69f00", markerfacecolor="none")
                if not line.missing:
                    mean, std = (100 * (line.figures[weights][key] or 0) for key in ("mean", "std"))
                    axis.errorbar(mean, place, xerr=std, fmt="o", color="#0072b2", capsize=2, markersize=5)
                beside = " | ".join(filter(None, [_ours(line, weights), _theirs(line.paper)]))
                style = {"transform": axis.get_yaxis_transform(), "va": "center", "fontsize": 7, "parse_math": False}
                axis.text(1.02, place, beside, **style)
            axis.set_title(", ".join(filter(None, [block.title, heading])), loc="left", fontsize=9, parse_math=False)
            axis.set_yticks(range(len(rows)), rows, fontsize=8, parse_math=False)
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(axis="x", color="0.92", linewidth=0.8)
            axis.tick_params(labelsize=8, color="0.6")
            axis.set_ylim(len(rows) - 0.5, -0.5)  # the first row on top
    said = f"{parsed.sweep.title}\ntop-1 in %, {_NAMES[weights]}, mean ± std (n); hollow: the paper"
    figure.suptitle(said, fontsize=9, parse_math=False)
    metadata = {"Software": None}  # a version, which is no part of the picture
    disk.write_atomically(path, lambda part: figure.savefig(part, format="png", metadata=metadata))
