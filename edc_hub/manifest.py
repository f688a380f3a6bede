"""The manifest of a condensed set: what it was made from and what it consists of, the same from run to run."""

import hashlib
import io
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from . import __version__, randaugment, views
from .recipe import Recipe, selected
from .tables import Written


FORMAT_VERSION = "1.0"
_LIBRARIES = ("torch", "torchvision", "datasets", "transformers", "timm", "accelerate", "pyarrow", "pillow", "numpy")


def _facts(recipe: Recipe, files: list[bytes], real: Any, observers: dict, control: str | None, published: str) -> dict:
    """The manifest without what is known only of written files. Nothing in it varies from run to run."""
    section, source = recipe.relabel, recipe.source
    stages = {"relabel": section.observers}
    if recipe.initialize.kind in ("rded", "kmeans"):
        stages["initialize"] = recipe.initialize.observers
    if recipe.synthesize.iterations:
        stages["synthesize"] = recipe.synthesize.observers
    uses = {stage: selected(recipe, entries) for stage, entries in stages.items()}
    with Image.open(io.BytesIO(files[0])) as first:
        kind, size = first.format.lower(), first.size[0]
    soft = section.model_dump(exclude={"observers", "controls", "random_draws"})
    return {
        "format_version": FORMAT_VERSION,
        "name": recipe.name,
        "method": recipe.method,
        "control": control,
        "ipc": len(files) // len(real.names),
        "seed": recipe.seed,
        "classes": list(real.names),
        "images": {"count": len(files), "size": size, "format": kind, "mean": source.mean, "std": source.std},
        "source": {
            "id": real.id,
            "name": source.name,
            "split": source.train_split,
            "commit": real.commit,
            "fingerprint": real.fingerprint,
        },
        "observers": [
            {
                "name": name,
                "roles": [s for s in uses if name in {f"{n}@{e}" if e else n for n, e in uses[s]}],
                **known,
            }
            for name, known in observers.items()
        ],
        "soft_labels": {
            "codec": "dense_float16",
            **soft,
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


def _manifest(facts: dict, part: Path, data: dict[str, tuple[Features, int, dict[str, int]]]) -> dict:
    listed, configs = {}, {}
    for config, (_, _, rows) in data.items():
        digest = hashlib.sha256()
        for name, count in rows.items():
            path = part / config / name
            with open(path, "rb") as file:
                sha = hashlib.file_digest(file, "sha256").hexdigest()
            listed[f"{config}/{name}"] = {"sha256": sha, "bytes": path.stat().st_size, "rows": count}
            digest.update(f"{name} {sha}\n".encode())
        configs[config] = digest.hexdigest()
    return {**facts, "configs": configs, "files": listed}


