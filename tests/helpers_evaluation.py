"""A toy that can be told apart, and a finished run of it, for the tests of `edc-hub evaluate`."""

from pathlib import Path

import numpy as np
import PIL.Image
import yaml
from toys import png, write_parquet

from edc_hub import condense


NAMES = ["red", "green", "blue"]
STUDENT = {"name": "narrow", "arch": "convnet", "args": {"depth": 2, "width": 8}}
RECIPE = {
    "name": "toy",
    "ipc": 2,
    "source": {"size": 8, "holdout": 0.25},
    "observers": {
        "train": {"epochs": 3, "batch": 8, "augment": "none", "flip": False},
        "networks": [
            {"name": "plain", "arch": "convnet", "args": {"depth": 1, "width": 8, "norm": "batch"}},
            {"name": "other", "arch": "convnet", "args": {"depth": 2, "width": 8, "norm": "instance"}},
        ],
    },
    "synthesize": {"iterations": 2, "block": 6},
    "relabel": {"epochs": 3, "batch": 3, "rand_augment": 0, "random_draws": 2},
    "evaluation": {"students": [STUDENT], "epochs": 2, "batch": 4, "ema": {"decay": 0.5}},
}
MACHINE = ["--threads", "1", "--device", "cpu"]


def coloured(label: int, seed: int, side: tuple[int, int] = (8, 8)) -> PIL.Image.Image:
    """Noise of (width, height) `side` in which the channel `label` is brighter."""
    pixels = np.random.default_rng(seed).integers(0, 120, (*side[::-1], 3))
    pixels[..., label] += 110
    return PIL.Image.fromarray(pixels.astype(np.uint8))


def write_source(folder: Path, *, test: int = 15, side: tuple[int, int] = (8, 8), names: list[str] = NAMES) -> Path:
    """Writes 36 images for training and `test` of them for the test: rows 0, 1, 2, 0, … are of class 0, 1, 2, 0, …"""
    splits = {"train": [row % 3 for row in range(36)], "test": [row % 3 for row in range(test)]}
    write_parquet(folder, splits, names=names, encoded=[png(coloured(row % 3, row, side)) for row in range(36)])
    return folder


def condensed(root: Path, run: str, *more: str) -> Path:
    """The run folder `root/runs/<run>`, made in this process from `root/toy`."""
    recipe = root / "toy.yaml"
    if not recipe.is_file():
        recipe.write_text(yaml.safe_dump({**RECIPE, "source": {**RECIPE["source"], "path": str(root / "toy")}}))
        write_source(root / "toy")
    folder = root / "runs" / run
    assert condense.main([str(recipe), "--output_dir", str(folder), *MACHINE, *more]) == 0
    return folder
