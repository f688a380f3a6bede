"""Method by design choice, as Markdown, from the files of the methods: every choice, and the main ones for the README.

python benchmarks/matrix.py    # writes both between their marks
"""

import re
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

from edc_hub import recipes
from edc_hub.recipe import Recipe
from edc_hub.selection import selected


LARGE, SMALL, IPC = "imagenet1k", "cifar10", 10
"""The data sets whose values are shown, the second where it differs, and images a class."""

ROOT = Path(__file__).parent.parent
Cell = Callable[[Recipe], str]


def markdown(tables: list[dict[str, Cell]]) -> str:
    """A table for each set of columns; a method a row."""
    files = {name: [_recipe(data, name) for data in (LARGE, SMALL)] for name in recipes.methods()}
    order = ["random", "rded", "sre2l", "cda", "gvbsm", *(name for name in files if name.startswith("edc-")), "edc"]
    names = [*(name for name in order if name in files), *(name for name in files if name not in order)]
    shown = []
    for columns in tables:
        rows = [["method", *columns], ["---"] * (len(columns) + 1)]
        for name in names:
            rows.append([f"`{name}`", *(_both(cell, *files[name]) for cell in columns.values())])
        shown.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
    return "\n\n".join(shown)


def filled(text: str, tables: list[dict[str, Cell]]) -> str:
    """`text` with the tables between its marks."""
    marks = r"(?s)(<!-- matrix[^>]*-->\n).*(\n<!-- /matrix -->)"
    return re.sub(marks, lambda found: f"{found[1]}{markdown(tables)}{found[2]}", text)


def _recipe(data: str, method: str) -> Recipe:
    return recipes.resolve(recipes.load(recipes.find(data)), {"method": method, "ipc": IPC})


def _both(cell: Cell, large: Recipe, small: Recipe) -> str:
    first, second = cell(large), cell(small)
    return first if first == second else f"{first} / {second}"


def _start(recipe: Recipe) -> str:
    section = recipe.initialize
    if section.kind != "rded":
        return section.kind
    chosen = "" if section.difficulty == "easiest" else f", {section.difficulty}"
    return f"rded {section.factor}x{section.factor}{chosen}"


def _optimised(cell: Cell) -> Cell:
    """A cell that stands empty where nothing is optimised."""
    return lambda recipe: cell(recipe) if recipe.synthesize.iterations else "–"


def _observers(recipe: Recipe) -> str:
    section = recipe.synthesize
    count = len(selected(recipe, section.observers))
    drawn = "" if section.pick == "turn" else f", {section.pick}"
    return f"{count}{drawn}{f', {section.together} a step' * (section.together > 1)}"


def _classes(recipe: Recipe) -> str:
    section = recipe.synthesize
    return "none" if section.alpha == 1 else f"{1 - section.alpha:g} {section.class_scope.replace('_', ' ')}"


def _crop(recipe: Recipe) -> str:
    area, curriculum = recipe.synthesize.crop_area, recipe.synthesize.curriculum
    if area == [1.0, 1.0]:
        return "whole"
    start = "" if curriculum.kind == "none" else f"{curriculum.start:g} → "
    return f"{start}{area[0]:g}{f' ({curriculum.kind})' if start else ''}"


def _flatness(recipe: Recipe) -> str:
    section = recipe.synthesize.flatness
    return section.kind if section.kind in ("none", "sam") else f"{section.kind} {section.weight:g}"


def _later(recipe: Recipe) -> str:
    """What came after EDC; none for all of the older methods."""
    section = recipe.synthesize
    used = {
        f"residual {section.residual.weight:g}": section.residual.every,
        f"sides {'/'.join(map(str, section.sizes or []))}": section.sizes,
        section.mix: section.mix != "none",
        f"grid {recipe.images.grid}": recipe.images.grid > 1,
    }
    return ", ".join(text for text, on in used.items() if on) or "none"


def _labelled(recipe: Recipe) -> str:
    return str(len(selected(recipe, recipe.relabel.observers)))


def _views(recipe: Recipe) -> str:
    section = recipe.relabel
    extras = {"RandAugment": section.rand_augment, "shuffle": section.shuffle}
    area = "whole" if section.crop_area == [1.0, 1.0] else f"{section.crop_area[0]:g}"
    return ", ".join([area, *(name for name, used in extras.items() if used)])


def _loss(recipe: Recipe) -> str:
    section = recipe.evaluation
    return {
        "mse_ce": f"MSE + {section.ce_weight:g} CE",
        "kl": f"KL, T {section.temperature:g}",
        "cosine": "cosine",
        "ce": "CE",
    }[section.loss]


def _schedule(recipe: Recipe) -> str:
    section = recipe.evaluation
    zeta = section.schedule in ("smooth", "ssrs", "linear")
    return f"{section.schedule}{f' {section.zeta:g}' if zeta else ''}"


def _key(key: str) -> Cell:
    """A cell of one key, given as section.key."""

    def cell(recipe: Recipe) -> str:
        value: Any = attrgetter(key)(recipe)
        if isinstance(value, list):
            return ", ".join(value)
        return f"{value:g}" if isinstance(value, float) else str(value).replace("_", " ")

    return cell


_IMAGES: dict[str, Cell] = {
    "start": _start,
    "iterations": _key("synthesize.iterations"),
    "observers matched": _optimised(_observers),
    "lr": _optimised(_key("synthesize.lr")),
    "layers": _optimised(_key("synthesize.layers")),
    "their weight": _optimised(_key("synthesize.weight")),
    "their average": _optimised(_key("synthesize.ema")),
    "conv dropped": _optimised(_key("synthesize.drop_rate")),
    "class form": _optimised(_classes),
    "variance": _optimised(_key("moments.target")),
    "block": _optimised(_key("synthesize.block")),
    "block order": _optimised(_key("synthesize.block_order")),
    "crop": _optimised(_crop),
    "jitter": _optimised(_key("synthesize.jitter")),
    "flatness": _optimised(_flatness),
    "densification": _optimised(_key("synthesize.densification.weight")),
    "later ideas": _later,
}
_LABELS: dict[str, Cell] = {
    "label observers": _labelled,
    "their BatchNorm": _key("relabel.observer_mode"),
    "crop": _views,
    "mix": _key("relabel.mix"),
    "codec": _key("relabel.codec"),
    "protocol": _key("evaluation.protocol"),
    "labels": _key("evaluation.labels"),
    "loss": _loss,
    "optimiser": _key("evaluation.optimizer"),
    "schedule": _schedule,
    "batch": _key("evaluation.batch"),
    "epochs": _key("evaluation.epochs"),
    "EMA": _key("evaluation.ema.decay"),
}


_MAIN = ("start", "iterations", "observers matched", "class form", "flatness", "crop")
_MAIN_LABELS = ("label observers", "their BatchNorm", "loss", "schedule", "batch", "EMA")
PLACES: dict[Path, list[dict[str, Cell]]] = {
    ROOT / "README.md": [{name: _IMAGES[name] for name in _MAIN} | {name: _LABELS[name] for name in _MAIN_LABELS}],
    ROOT / "recipes/methods/README.md": [_IMAGES, _LABELS],
}
"""The tables of each file: in the README the choices that tell its methods apart, beside the methods all of them."""


if __name__ == "__main__":
    for place, tables in PLACES.items():
        place.write_text(filled(place.read_text("utf-8"), tables), "utf-8")
