"""The manifest of a condensed set: what it was made from and what it consists of, the same from run to run."""

import functools
import hashlib
import importlib.metadata
import io
import json
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from . import __version__, canvas, codecs, disk, randaugment, views
from .errors import InputError
from .recipe import Recipe
from .selection import roles, title
from .tables import Written


if TYPE_CHECKING:
    from .labels import Labels
    from .observers import Observers
    from .source import RealSet


version = functools.cache(importlib.metadata.version)  # reads a file of the package

FORMAT_VERSION = "2.0"  # what is read
_PLAIN = "1.0"  # of a set whose images are no canvases, which a reader of 1.0 understands
_NOT_SEEN = {None: (), "initial": ("synthesize",), "random": ("initialize", "synthesize")}  # stages, by control
_READ = {  # what readers rely on
    **dict.fromkeys(("name", "method", "fingerprint", "recipe_sha256"), str),
    **dict.fromkeys(("images", "source", "soft_labels", "versions", "configs", "files"), dict),
    **dict.fromkeys(("classes", "observers"), list),
    "ipc": int,
    "seed": int,
    "control": str | None,
}
_LIBRARIES = ("torch", "torchvision", "datasets", "transformers", "timm", "accelerate", "pyarrow", "pillow", "numpy")


def facts(
    recipe: Recipe,
    files: list[bytes],
    real: "RealSet",
    labels: "Labels",
    observers: "Observers",
    control: str | None,
    published: str,
) -> dict[str, Any]:
    """The manifest without what is known only of written files. Nothing in it varies from run to run."""
    section, source = recipe.relabel, recipe.source
    with Image.open(io.BytesIO(files[0])) as first:
        kind, size = first.format.lower(), first.size[0]
    soft = section.model_dump(exclude={"observers", "controls", "random_draws", *codecs.KEYS})
    return {
        "format_version": FORMAT_VERSION if recipe.images.grid > 1 else _PLAIN,
        "name": recipe.name,
        "method": recipe.method,
        "control": control,
        "ipc": len(files) // len(real.names),
        "seed": recipe.seed,
        "classes": list(real.names),
        "images": {"count": len(files), "size": size, "format": kind, "mean": source.mean, "std": source.std},
        **canvas.facts(recipe.images.grid),
        "source": {
            "id": real.id,
            "name": source.name,
            "split": source.train_split,
            "commit": real.commit,
            "fingerprint": real.fingerprint,
        },
        "observers": [
            {"name": title(name, epoch), "roles": stages, **observers.facts(name, epoch)}
            for (name, epoch), stages in roles(recipe, but=_NOT_SEEN[control]).items()
        ],
        "soft_labels": {
            **codecs.facts(section),
            **soft,
            "epochs": labels.epochs,
            **({"full_epochs": labels.full.epochs} if labels.full else {}),
            "view_size": section.view_size or size,
            "view_version": views.VERSION,
            "randaugment": randaugment.table() if section.rand_augment else None,
        },
        "recipe_sha256": hashlib.sha256(published.encode()).hexdigest(),
        "versions": {
            "edc_hub": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in _LIBRARIES},
        },
    }


def folder_of(place: Path, called: str | None = None, key: str = "dataset") -> Path:
    """The dataset folder that `place` is, or that of the run that it is; absolute, as a run is looked for above it.

    Errors: InputError where there is no finished set; `called` is what the user wrote for the place, under `key`.
    """
    place = Path(os.path.abspath(place))
    for folder in (place, place / "dataset"):
        if (folder / "manifest.json").is_file():
            return folder
    remedy = "give a finished run, or its dataset folder"
    if (place / "recipe.yaml").is_file():
        remedy = f"edc-hub condense {place}/recipe.yaml goes on with the run"
    raise InputError(f"{key}: no finished set in {called or place}, manifest.json is missing; {remedy}")


def run_of(folder: Path, control: str | None) -> Path | None:
    """The run folder that a dataset folder lies in, where it is one's own; None for a set on its own."""
    above = {None: 0, "initial": 1, "random": 2}[control]  # RUN/dataset, RUN/controls/initial, RUN/controls/random/0
    if len(folder.parents) <= above:
        return None
    run = folder.parents[above]
    return run if (run / "recipe.yaml").is_file() and (run / "dataset").is_dir() else None


def read(path: Path, place: str | None = None, content: bytes | None = None) -> dict[str, Any]:
    """The manifest of the set at `place`, or in the folder of `path`; `content`: of the file, where read already.

    Errors: InputError for another or a damaged file, and for a format that is newer.
    """
    place = place or str(path.parent)
    try:
        found = json.loads(path.read_bytes() if content is None else content)
        written = str(found["format_version"])
        newer = int(written.split(".")[0]) > int(FORMAT_VERSION.split(".")[0])
        whole = newer or all(isinstance(found[key], kind) for key, kind in _READ.items())
    except (ValueError, KeyError, TypeError):
        newer = whole = False
    if not whole:
        raise InputError(f"{path}: not the manifest of a condensed set; load or write the set again")
    if newer:
        raise InputError(
            f"{place}: the set is newer than this edc_hub: its format is {written}, edc_hub {__version__} reads "
            f"up to {FORMAT_VERSION}; pip install --upgrade edc-hub, or load an older revision of the set"
        )
    return found


def complete(known: dict[str, Any], folder: Path, data: dict[str, Written]) -> dict[str, Any]:
    """Adds the files of each configuration, with their hashes, and one hash a configuration."""
    files, configs = {}, {}
    for config, written in data.items():
        for name, rows in written.rows.items():
            path = folder / config / name
            files[f"{config}/{name}"] = {"sha256": disk.sha256(path), "bytes": path.stat().st_size, "rows": rows}
        hashes = [file["sha256"] for path, file in files.items() if path.startswith(f"{config}/")]
        configs[config] = hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    return {**known, "configs": configs, "files": files}


def grid(found: dict[str, Any]) -> int:
    """Pictures a side of each image; 1: images are no canvases."""
    return found.get("decode", {"grid": 1})["grid"]


def there(folder: Path) -> dict[str, Any]:
    """The manifest in a dataset folder; empty where there is none, or one that a killed process left."""
    return disk.json_of(folder / "manifest.json")


def is_whole(folder: Path, found: dict[str, Any]) -> bool:
    """Whether a folder has every file that its manifest names, each of its size."""
    try:
        return all((folder / path).stat().st_size == file["bytes"] for path, file in found["files"].items())
    except (OSError, KeyError, TypeError, AttributeError):
        return False
