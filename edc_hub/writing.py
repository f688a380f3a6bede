"""How a dataset folder is written: two configurations of parquet files, a manifest, the recipe, a card and a picture.

Equal inputs give equal bytes. A folder is built beside its place and renamed into it.
"""

import hashlib
import json
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import canvas, card, disk, encoding, likeness, manifest, recipes, tables, terms, work
from .errors import InputError
from .labels import Labels
from .recipe import Recipe, Relabel


if TYPE_CHECKING:
    from .initialize import Initial
    from .observers import Observers
    from .source import RealSet


VERSION = 2  # of how a folder is made from its inputs; raised when equal inputs would give other files


def write(
    folder: Path,
    *,
    recipe: Recipe,
    files: list[bytes],
    initial: "Initial",
    real: "RealSet",
    labels: Labels,
    observers: "Observers",
    control: str | None = None,
    origin: dict[str, Any] | None = None,
) -> bool:
    """Writes the dataset folder, or leaves it alone if it holds these very rows. Returns whether it wrote.

    Args: files: encoded images, class-major, the first k of each class a usable set; initial: what they started from;
    observers: those of the run, for their facts; control: `initial` or `random` for a control set; origin: where
    images come from that were not made here.
    Errors: InputError where the disk refuses, and where the folder holds a whole set of other images or labels.
    """
    published = recipes.published(recipe)
    known = manifest.facts(recipe, files, real, labels, observers, control, published)
    if origin:
        known["origin"] = origin
    known["source"] |= terms.of(real.id, recipe.source.path, real.commit)
    made_here = control is None and origin is None
    known["fingerprint"] = work.fingerprint(
        "dataset",
        VERSION,
        facts=known,
        labels=labels.fingerprint,
        files=[hashlib.sha256(file).hexdigest() for file in files],
        source_rows=initial.source_rows.tolist(),
    )
    for left in folder.parent.glob(f".{folder.name}.*.tmp"):
        shutil.rmtree(left)  # of a run that was killed; a run folder has one writer
    old = manifest.there(folder)
    if old.get("fingerprint") == known["fingerprint"] and manifest.is_whole(folder, old):
        return False
    part = disk.temporary(folder)
    try:
        rows = {"images": tables.image_rows(files, initial.source_rows, labels.mean, real.names)}
        if labels.epochs:
            rows["soft_labels"] = tables.label_rows(labels, recipe.relabel)
        if labels.full:
            rows["soft_labels_full"] = tables.label_rows(labels.full, Relabel())  # dense
        with disk.disk_errors(part):
            data = {config: tables.write(part / config, groups) for config, groups in rows.items()}
        disk.write_text(part / "recipe.yaml", published)
        shown, shape = card.grid_rows(len(real.names), recipe.ipc, pairs=made_here)
        pictures = [encoding.decode(files[row] for row in shown.tolist())]
        pictures = [initial.images[shown], *pictures] if made_here else pictures
        disk.write_atomically(part / "assets/grid.png", partial(card.grid, pictures, shape))
        if made_here:
            whole = recipe.initialize.kind != "rded"  # which cuts crops, though there may be one an image
            grid, tiles = recipe.images.grid, initial.source_rows
            of_pictures, tiles = partial(canvas.of_files, files, grid), tiles.view(len(files) * grid**2, -1)
            known["likeness"] = likeness.facts(of_pictures, tiles, real, whole=whole)
        facts = manifest.complete(known, part, data)
        disk.write_text(part / "manifest.json", json.dumps(facts, indent=2) + "\n")
        if manifest.is_whole(folder, old):
            if old.get("configs") == facts["configs"]:  # the very rows, by another release of a library
                return False
            raise InputError(
                f"output_dir: {folder} is finished, of other images or labels than this recipe gives now (a method's "
                "file, weights or a library have changed); give this run another output_dir"
            )
        place = f"./{folder.name}"  # no Hub id: load_dataset takes whatever set of such a name is cached
        disk.write_text(part / "README.md", card.render(facts, recipe.evaluation, place, data=data))
        with disk.disk_errors(folder):
            if folder.exists():  # half written
                shutil.rmtree(folder)
            part.rename(folder)
        return True
    finally:
        shutil.rmtree(part, ignore_errors=True)
