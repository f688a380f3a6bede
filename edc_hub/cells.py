"""A sweep's file and its cells: a recipe, rows and columns of overrides, seeds, and what the paper reports.

A cell is a row under a column. For each set seed it is a run of `condense`, shared with every cell whose overrides
differ under `evaluation` alone, and all its sets together are one comparison of `evaluate`. Reading a sweep imports
no torch.
"""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from . import arguments, disk, documents, keys, published, recipes
from .errors import InputError, naming
from .protocol import Student, named_students
from .published import Paper
from .recipe import Recipe
from .section import Count, Distinct, Section


if TYPE_CHECKING:
    from .realset import RealSet


SHIPPED = recipes.ROOT / "sweeps"
_FLAGS = {"dry_run": "print the cells and what they share, write nothing"}
_ELSEWHERE = {  # keys that no cell may have of its own, and where they go
    "seed": "write set_seeds",
    "hub": "publish a run with edc-hub publish",
    "output_dir": "write --output_dir",
    "device": "write --device",
    "threads": "write --threads",
    "checkpoint_seconds": "write --checkpoint_seconds",
}


class Choices(Section):
    """What a command line may change besides the recipe's keys."""

    set_seeds: Distinct[Count] = Field([0], description="seeds of the sets; each is a run of condense")
    seeds: Distinct[Count] = Field([0, 1, 2], description="seeds of the students, each trained on each set")
    split: Literal["test", "holdout"] = Field("test", description="what accuracy is measured on; holdout for choices")
    controls: list[Literal["initial", "random", "hard", "real"]] = Field(
        [], description="rows beside each set: initial images, random real images, hard labels, real of equal bytes"
    )
    weights: Distinct[Literal["ema", "live"]] = Field(
        ["ema"], description="weights that the table shows; the CSV has both"
    )
    students: list[str | Student] | None = Field(None, description="short for evaluation.students")
    only: list[str] | None = Field(None, description="labels of the rows to do; all when not given")


class Sweep(Choices):
    """A file of `recipes/sweeps`."""

    title: str = Field(description="what the table shows")
    recipe: str = Field(description="the recipe below all cells: a shipped name or a file")
    common: dict[str, Any] = Field({}, description="overrides of every cell")
    rows: dict[str, dict[str, Any]] = Field(description="overrides of each row, by its label")
    columns: dict[str, dict[str, Any]] = Field({}, description="overrides of each column, by its label")
    paper: Paper | None = Field(None, description="figures to stand beside ours")


class _Known(Choices, Recipe):
    """Every key of the command line."""

    owner: ClassVar[str] = "this command"


class Cell(NamedTuple):
    """A row under a column."""

    row: str
    column: str  # "" where the sweep has none
    recipe: Recipe  # how its students are trained
    runs: list[Recipe]  # what is condensed, one a set seed; `output_dir` is the run's folder
    folder: Path  # of its results

    @property
    def place(self) -> str:
        return _place(self.row, self.column)


class Parsed(NamedTuple):
    sweep: Sweep
    cells: list[Cell]
    folder: Path  # of the tables; runs and artifacts lie beside it
    dry_run: bool


def parse(argv: list[str]) -> Parsed:
    """The sweep of a command line, every cell resolved.

    Raises InputError, naming row and column, on anything that looking at recipes can find.
    """
    arguments.help_asked(argv, _usage)
    named, given, flags = arguments.split(argv, _Known, _FLAGS)
    if len(named) != 1:
        raise InputError(
            f"sweep: expected one, got {len(named)}; write a YAML file or one of: {recipes.listing(SHIPPED)}"
        )
    file = recipes.find(named[0], SHIPPED, "sweep")
    for path in sorted(keys.leaves(given, _Known).keys() - keys.table(_Known)):
        if not path.startswith("options."):  # said of what was typed, not of a row
            raise InputError(f"{path}: unknown key{keys.meant(path, _Known)}")
    chosen = {name: given.pop(name) for name in Choices.model_fields if name in given}
    sweep = _model(documents.load(file) | chosen)
    if sweep.students is not None:
        students = [each if isinstance(each, str) else each.model_dump() for each in sweep.students]
        arguments.put_students(given, students)
    folder = disk.local(given.pop("output_dir", None) or f"runs/sweep-{file.stem}", "output_dir")
    return Parsed(sweep, _cells(sweep, given, folder), folder, flags["dry_run"])


def _model(content: dict[str, Any]) -> Sweep:
    sweep = keys.validated(Sweep, content)
    if not sweep.rows:
        raise InputError("rows: none given; write e.g. rows: {edc: {method: edc}, random: {method: random}}")
    for label in (*sweep.rows, *sweep.columns):
        if len(label.splitlines()) > 1:
            raise InputError(f"rows and columns: the label {label!r} breaks a table's line; write it in one line")
    published.check(sweep.paper, sweep.rows, sweep.columns)
    if sweep.only == []:
        raise InputError(f"only: an empty list; write labels of rows, e.g. --only '{json.dumps([*sweep.rows][:1])}'")
    for row in sweep.only or []:
        if row not in sweep.rows:
            listed = [label for label in sweep.rows if "," in label][:1]
            more = f"; a label with a comma stands in a list: write --only '{json.dumps(listed)}'" if listed else ""
            raise InputError(f"only: no row {row!r}; there are: {', '.join(map(repr, sweep.rows))}{more}")
    if sweep.only is None:
        return sweep
    return sweep.model_copy(update={"rows": {name: part for name, part in sweep.rows.items() if name in sweep.only}})


# Cells


def _cells(sweep: Sweep, given: dict[str, Any], folder: Path) -> list[Cell]:
    parts = [("common", sweep.common), *((f"row '{name}'", part) for name, part in sweep.rows.items())]
    parts += [(f"column '{name}'", part) for name, part in sweep.columns.items()]
    for name, part in parts:
        for key in part.keys() & _ELSEWHERE.keys():
            raise InputError(f"{name}: {key}: the same for the whole sweep; {_ELSEWHERE[key]}")
        if name != "common":
            for key in sorted(keys.leaves(part, Recipe).keys() & keys.leaves(given, Recipe).keys()):
                # the file's own `students` are given for all cells, too
                shown = "students" if sweep.students and key == "evaluation.students" else f"--{key}"
                raise InputError(f"{shown}: {name} sets it; remove it, or sweep over a file of your own")
    for key in given.keys() & {"seed", "hub"}:
        raise InputError(f"--{key}: not of a sweep; {_ELSEWHERE[key]}")
    for row, one in sweep.rows.items():
        for column, other in sweep.columns.items():
            for key in sorted(keys.leaves(one, Recipe).keys() & keys.leaves(other, Recipe).keys()):
                raise InputError(f"{_place(row, column)}: both set {key}; leave it to one of them")
    base = recipes.load(recipes.find(sweep.recipe))
    columns = sweep.columns or {"": {}}
    return [
        _cell(sweep, base, row, column, [sweep.common, one, other, given], folder)
        for row, one in sweep.rows.items()
        for column, other in columns.items()
    ]


def _cell(
    sweep: Sweep, base: dict[str, Any], row: str, column: str, layers: list[dict[str, Any]], folder: Path
) -> Cell:
    labelled = {"relabel": {"controls": bool({"initial", "random"} & set(sweep.controls))}}
    overrides = keys.layered([labelled, *layers], Recipe)
    with naming(_place(row, column)):
        recipe = recipes.resolve(base, overrides)
        if sweep.split == "holdout" and not recipe.source.holdout:
            raise InputError("source.holdout: 0 keeps no image back for --split holdout; write --source.holdout 0.1")
        made = _made(base, overrides) or recipe
    runs = [_run(made.model_copy(update={"seed": seed}), disk.beside(folder)) for seed in sweep.set_seeds]
    facts = {name: getattr(sweep, name) for name in ("seeds", "split", "controls")}
    facts |= {"evaluation": recipe.evaluation.model_dump(), "runs": [Path(run.output_dir).name for run in runs]}
    name = "--".join(_plain(label) for label in (row, column) if label)
    return Cell(row, column, recipe, runs, folder / "cells" / f"{name}-{_mark(json.dumps(facts))}")


def _made(base: dict[str, Any], overrides: dict[str, Any]) -> Recipe | None:
    """What is condensed: without the cell's evaluation, so that cells which differ there are one run. None for a set
    that asks for a way to be evaluated, as relabel.codec observers does."""
    try:
        return recipes.resolve(base, {name: value for name, value in overrides.items() if name != "evaluation"})
    except InputError:
        return None


def _run(recipe: Recipe, root: Path) -> Recipe:
    """With the folder of the run."""
    name = _plain(f"{recipe.name}-{recipe.method}-ipc{recipe.ipc}-seed{recipe.seed}")
    # with local paths as they are: two sources in folders of one name are two runs
    decides = recipe.model_dump(mode="json", exclude=_ELSEWHERE.keys() - {"seed"})
    mark = _mark(json.dumps(decides, sort_keys=True))
    return recipe.model_copy(update={"output_dir": str(root / f"{name}-{mark}")})


def _mark(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _plain(label: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", label).strip("-")


def _place(row: str, column: str) -> str:
    return f"row '{row}', column '{column}'" if column else f"row '{row}'"


def check(cells: list[Cell], open_source: "Callable[[Recipe], RealSet]") -> None:
    """Raises InputError, naming the cell, for sources, observers and students that do not work; trains nothing."""
    from . import initialize, labels, networks

    known = set()
    for cell in cells:
        recipe = cell.recipe  # from which its runs differ in the seed and in how nobody evaluates them
        with naming(cell.place):
            real = open_source(recipe)
            initialize.check(recipe, real)
            labels.check(recipe, len(real.names))
            named = [("evaluation.students", name, it) for name, it in named_students(recipe.evaluation).items()]
            named += [("observers.networks", net.name, net) for net in recipe.observers.networks]
            for key, name, net in named:
                mark = (net.model_dump_json(), recipe.source.model_dump_json())
                if mark not in known:
                    with naming(f"{key}: {name}"):
                        networks.described(net, len(real.names), seed=0, **recipe.source.face)
                known.add(mark)


# Texts


def _usage() -> str:
    head = (
        "usage: edc-hub sweep TABLE [--seeds 0,1,2 --split holdout …] [--section.key value ...]\n\n"
        f"TABLE is a YAML file or one of: {recipes.listing(SHIPPED)}\n"
        "A key of the recipe (edc-hub condense --help) is set for all cells. --output_dir is the folder of the\n"
        "tables, runs/sweep-TABLE when not given; runs and artifacts lie beside it."
    )
    return arguments.usage(head, Choices, _FLAGS)
