"""What is published, and where: the files of a dataset folder, and those of its observers."""

import json
from pathlib import Path
from typing import Any

from . import disk, documents, recipes
from .errors import InputError
from .versions import BESIDE, DATA, OBSERVERS, File, Version


def models(folder: Path, id: str, dataset_id: str, place: Path) -> list[Version]:
    """What is published of the observers of a dataset folder, written below `place`: `<id>-<observer>` each."""
    from . import observer_repo

    versions = []
    for name, written in observer_repo.write(folder, place, id, dataset=dataset_id).items():
        paths = sorted(path for path in written.rglob("*") if path.is_file())
        files = [_file(written, path.relative_to(written).as_posix()) for path in paths]
        versions.append(Version(name, "model", observer_repo.FACTS, {file.path: file for file in files}))
    return versions


def observers(folder: Path, id: str, versions: list[Version], tags: list[str]) -> dict[str, Any]:
    """The content of OBSERVERS for a dataset folder whose observers are published as `versions` with these tags."""
    from . import manifest, observer_repo

    found, there = {}, {version.id: (version, tag) for version, tag in zip(versions, tags, strict=True)}
    for entry in manifest.read(folder / "manifest.json")["observers"]:
        version, tag = there[f"{id}-{entry['name'].partition('@')[0]}"]
        snapshots = json.loads(version.files[observer_repo.FACTS].content)["snapshots"]
        file = next(snapshot["file"] for snapshot in snapshots if snapshot["epochs"] == entry["epochs"])
        place = version.id if file == observer_repo.WEIGHTS else f"{version.id}/{file}"
        found[entry["name"]] = {
            "weights": f"{place}@{tag}",
            "arch": entry["arch"],
            "bytes": version.files[file].size,
        }
    return found


def dataset(folder: Path, id: str, published: dict[str, Any] | None = None) -> Version:
    """What is published of a dataset folder: what its manifest names, and the texts and pictures beside it.

    Args: published: the content of OBSERVERS; that of the folder where not given.
    Errors: InputError for a file that is not the one of the manifest, damaged results, and a set without stored views
    whose observers are not published.
    """
    from . import card
    from . import manifest as manifests

    texts = {path: _file(folder, path) for path in ("README.md", "manifest.json", "recipe.yaml")}
    manifest = manifests.read(folder / "manifest.json", content=texts["manifest.json"].content)
    data = {path: _file(folder, path) for path in manifest["files"]}
    wrong = [path for path, file in data.items() if file.sha256 != manifest["files"][path]["sha256"]]
    if texts["recipe.yaml"].sha256 != manifest["recipe_sha256"]:
        wrong.append("recipe.yaml")
    if wrong:
        raise InputError(f"{folder / wrong[0]}: not the file that manifest.json names; condense into another folder")
    texts |= {path: _file(folder, path) for path in BESIDE if (folder / path).is_file()}
    if published:
        texts[OBSERVERS] = File.read(OBSERVERS, (json.dumps(published, indent=2) + "\n").encode())
    elif OBSERVERS in texts:
        published = json.loads(texts[OBSERVERS].content)
    elif manifest["soft_labels"]["codec"] == "observers":
        raise InputError(
            f"observers: {folder} stores no labelled views, and readers need the networks that label; write "
            "--observers ORG/NAME (hub.observers in a recipe)"
        )
    old, recipe = (texts[path].content.decode() for path in ("README.md", "recipe.yaml"))
    evaluation = recipes.resolve(documents.read(recipe, "recipe.yaml")).evaluation
    try:
        measured = json.loads(texts["results.json"].content) if "results.json" in texts else {}
    except ValueError as error:
        raise InputError(f"{folder / 'results.json'}: damaged; remove it and measure again") from error
    text = card.render(manifest, evaluation, id, old=old, measured=measured, published=published)
    texts["README.md"] = File.read("README.md", text.encode())
    return Version(id, "dataset", "manifest.json", {**data, **texts}, lambda own: card.kept(text, own))


def _file(folder: Path, path: str) -> File:
    """A file of a folder; what is no data is read once, whatever becomes of it on the disk."""
    place = folder / path
    try:
        if not DATA.fullmatch(path):
            return File.read(path, place.read_bytes())
        return File(path, place, place.stat().st_size, disk.sha256(place))
    except OSError as error:
        raise InputError(f"{place}: cannot be read ({error.strerror}); condense the set again") from error
