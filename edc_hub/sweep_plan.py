"""What a sweep would do: its cells, and how many different pieces of work they are. Nothing here imports torch."""

import json
from pathlib import Path

from . import cells, methods
from .cells import Cell, Parsed
from .protocol import of_student, student_name
from .recipe import Recipe


def show(parsed: Parsed) -> str:
    """The cells with what they change and the runs that they need, and counts of what is made once."""
    sweep = parsed.sweep
    runs = {run.output_dir: run for cell in parsed.cells for run in cell.runs}
    lines = [sweep.title, f"tables: {parsed.folder}", f"runs and artifacts: {parsed.folder.parent}", ""]
    for cell in parsed.cells:
        layers = [sweep.rows[cell.row], sweep.columns.get(cell.column, {})]
        changed = (f"{key} {json.dumps(value)}" for layer in layers for key, value in cells.leaves(layer).items())
        lines.append(f"{cell.place}: {', '.join(changed) or 'as the recipe'}")
        lines += [f"    {Path(run.output_dir).name}" for run in cell.runs]
    trained = {text for cell in parsed.cells for text in _students(cell)}
    names = dict.fromkeys(student_name(each) for cell in parsed.cells for each in cell.recipe.evaluation.students)
    counts = {
        "cells": len(parsed.cells),
        "condense runs, different": len(runs),
        "observers": len({text for run in runs.values() for text in _shared(run, "observers")}),
        "sets of initial images": len({text for run in runs.values() for text in _shared(run, "initialize")}),
        "sets of images": len({text for run in runs.values() for text in _shared(run, "synthesize")}),
        "students, controls not counted": len(trained) * len(sweep.seeds),
    }
    width = max(map(len, counts))
    lines += ["", *(f"{what:<{width}}  {count}" for what, count in counts.items()), f"students: {', '.join(names)}"]
    return "\n".join(lines)


def _students(cell: Cell) -> list[str]:
    """Texts that are equal where two cells have a student of a set in common."""
    sets, section, shared = [run.output_dir for run in cell.runs], cell.recipe.evaluation, {"protocol", "students"}
    own = {student_name(each): each if isinstance(each, str) else each.model_dump() for each in section.students}
    how = {name: of_student(section, name).model_dump(exclude=shared) for name in own}
    return [json.dumps([place, name, own[name], how[name]]) for place in sets for name in own]


def _shared(run: Recipe, stage: str) -> list[str]:
    """Texts that are equal where two runs have the work of a stage in common."""
    content = run.model_dump()
    source = content["source"]
    if stage == "observers":
        seed = content["observers"]["seed"]
        return [json.dumps([source, seed, net]) for net in content["observers"]["networks"]]
    decide = [content[name] for name in ("observers", "initialize", "ipc", "seed")]
    if stage == "synthesize" and methods.find(run.method):
        decide += [content]
    elif stage == "synthesize" and run.synthesize.iterations:
        decide += [content["moments"], content["synthesize"]]
    return [json.dumps([source, decide])]
