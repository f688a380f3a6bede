"""A small sweep of two by two cells, and what its tests have in common."""

import csv
import os

import yaml


RECIPE = {
    "name": "digits",
    "ipc": 1,
    "source": {"path": "sklearn/digits", "size": 8, "holdout": 0.1},
    "observers": {
        "train": {"epochs": 1, "batch": 50, "augment": "none", "flip": False},
        "networks": [{"name": "plain", "arch": "convnet", "args": {"depth": 1, "width": 16, "norm": "batch"}}],
    },
    "synthesize": {"iterations": 2, "block": 10},
    "relabel": {"epochs": 2, "batch": 10, "rand_augment": 0},
    "evaluation": {
        "students": [{"name": "narrow", "arch": "convnet", "args": {"depth": 1, "width": 8}}],
        "epochs": 2,
        "batch": 5,
    },
}
SWEEP = {
    "title": "Steps and zeta",
    "set_seeds": [0, 1],
    "seeds": [0, 1],
    "rows": {"two": {}, "none": {"synthesize": {"iterations": 0}}},
    "columns": {"zeta 2": {}, "zeta 1": {"evaluation": {"zeta": 1.0}}},
    "paper": {
        "where": "The paper, Table 1",
        "as": "best",
        "figures": {
            "two": {"zeta 2": {"narrow": 48.6}, "zeta 1": {"narrow": {"accuracy": 40, "std": 1, "as": "last"}}}
        },
    },
}
MACHINE = ["--threads", "1", "--device", "cpu"]
ENVIRONMENT = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}


def begun(root):
    """`root` with the recipe of `RECIPE` in it."""
    (root / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    return root


def written(root, name="table", **changes):
    """The file of a sweep like SWEEP."""
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**SWEEP, "recipe": str(root / "tiny.yaml"), **changes}, sort_keys=False))
    return path


def arguments(file, out, *more):
    return [str(file), "--output_dir", str(out), *MACHINE, *map(str, more)]


def figures(folder):
    """table.csv, a dictionary a line."""
    with (folder / "table.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))
