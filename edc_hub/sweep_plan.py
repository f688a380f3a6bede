"""What a sweep would do: its cells, their runs and students. Nothing here imports torch."""

import json
from pathlib import Path

from . import disk, keys
from .cells import Cell, Parsed
from .protocol import named_students, of_student
from .recipe import Recipe


def show(parsed: Parsed) -> str:
    """The cells with what they change and the runs that they need, and counts of what is made once."""
    sweep = parsed.sweep
    runs = {run.output_dir: run for cell in parsed.cells for run in cell.runs}
    lines = [sweep.title, f"tables: {parsed.folder}", f"runs and artifacts: {disk.beside(parsed.folder)}", ""]
    for cell in parsed.cells:
        layers = sweep.rows[cell.row], sweep.columns.get(cell.column, {})
        own = (item for layer in layers for item in keys.leaves(layer, Recipe).items())
        changed = (f"{key} {json.dumps(value)}" for key, value in own)
        lines.append(f"{cell.place}: {', '.join(changed) or 'as the recipe'}")
        lines += [f"    {Path(run.output_dir).name}" for run in cell.runs]
    made = [disk.json_of(Path(folder) / "dataset/manifest.json") for folder in runs]
    trained = {text for cell in parsed.cells for text in _students(cell)}
    there = {text for cell in parsed.cells if (cell.folder / "results.json").is_file() for text in _students(cell)}
    names = dict.fromkeys(name for cell in parsed.cells for name in named_students(cell.recipe.evaluation))
    counts = {
        "cells": len(parsed.cells),
        "condense runs, different": len(runs),
        "  not made yet": made.count({}),
        "images a class in all of them": sum(run.ipc for run in runs.values()),
        "bytes of those that are made": sum(file["bytes"] for it in made for file in it.get("files", {}).values()),
        "students, controls not counted": len(trained) * len(sweep.seeds),
        "  in cells without results": len(trained - there) * len(sweep.seeds),
    }
    width = max(map(len, counts))
    lines += ["", *(f"{what:<{width}}  {count:,}" for what, count in counts.items()), f"students: {', '.join(names)}"]
    return "\n".join(lines)


def _students(cell: Cell) -> list[str]:
    """Texts that are equal where two cells have a student of a set in common."""
    sets, section, shared = [run.output_dir for run in cell.runs], cell.recipe.evaluation, {"protocol", "students"}
    found = []
    for name, student in named_students(section).items():
        how = of_student(section, name, student.arch).model_dump(exclude=shared)
        found += [json.dumps([place, name, student.model_dump(), how]) for place in sets]
    return found
