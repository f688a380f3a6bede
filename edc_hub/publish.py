"""A finished run goes to the Hub: one commit that holds images, labels and card, and one tag on it.

    edc-hub publish RUN ORG/NAME [--tag v1.0.0] [--private] [--dry_run] [--observers ORG/NAME]

The same command again does nothing where the version is there, and goes on where one was stopped.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

from huggingface_hub import constants
from pydantic import Field, ValidationError

from . import arguments, hub, keys, launch
from .errors import InputError
from .hub import File, Plan, Version
from .section import Section


_FLAGS = {
    "private": "where the repository is made, only its owner sees it",
    "dry_run": "print the operations with their sizes and the tag, write nothing",
}
_TEXTS = ("README.md", "manifest.json", "recipe.yaml")


class Options(Section):
    """What `edc-hub publish` takes beside the run and the name."""

    tag: str | None = Field(None, description="v1.0.0; by the rules when not given: schema, data, card or results")
    observers: str | None = Field(None, description="ORG/NAME: a model repository ORG/NAME-<observer> for each")


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status (0, 1, 2)."""
    return launch.status(lambda: command(sys.argv[1:] if argv is None else argv))


def command(argv: list[str]) -> None:
    """Parses, then prints the plan or publishes."""
    if "--help" in argv or "-h" in argv:
        print(_usage())
        return
    named, given, flags = arguments.split(argv, Options, _FLAGS)
    try:
        options = Options.model_validate(given)
    except ValidationError as error:
        raise InputError(keys.complaint(error, Options)) from error
    if len(named) != 2:
        raise InputError(f"publish: expected RUN and ORG/NAME, got {' '.join(named) or 'nothing'}; see --help")
    if not launch.is_first():  # under a launcher
        return
    run, id = Path(named[0]).expanduser(), named[1]
    folder = dataset_folder(run)
    hub.check(id, options.tag)
    with tempfile.TemporaryDirectory() as place:
        models = []
        if options.observers:
            hub.check(options.observers)
            models = observers(folder.resolve().parent, options.observers, id, Path(place))
        if flags["dry_run"]:
            for version, tag in [*((model, None) for model in models), (dataset(folder, id), options.tag)]:
                print(described(version, hub.look(version, tag)))
            return
        if models:
            hub.may_write(options.observers, _say)
        for model in models:  # before the set whose card names them
            print(_address(model, hub.publish(model, private=flags["private"], say=_say)))
    print(_address(*push(folder, id, tag=options.tag, private=flags["private"])))


def _usage() -> str:
    flags = "\n".join(f"  --{name}  {meaning}" for name, meaning in _FLAGS.items())
    head = (
        "usage: edc-hub publish RUN ORG/NAME [--tag v1.0.0] [--private] [--dry_run] [--observers ORG/NAME]\n\n"
        "RUN is the folder of a finished run, or a dataset folder. The token is HF_TOKEN's or that of `hf auth login`."
        f"\n\n{flags}\n"
    )
    return "\n".join([head, *keys.help_lines(Options)])


def dataset_folder(run: Path) -> Path:
    """The dataset folder of a run, or the folder itself where it is one. InputError where there is none."""
    for folder in (run, run / "dataset"):
        if (folder / "manifest.json").is_file():
            return folder
    if not run.is_dir():
        raise InputError(f"publish: {run} is no folder; give the folder of a finished run")
    raise InputError(f"publish: no finished set in {run}; edc-hub condense {run}/recipe.yaml goes on with a run")


def push(folder: Path, id: str, *, tag: str | None = None, private: bool = False) -> tuple[Version, Plan]:
    """Publishes a dataset folder; what was published, and as what. Errors: InputError in one line."""
    hub.check(id, tag)
    hub.may_write(id, _say)  # before the files are read
    version = dataset(folder, id)
    return version, hub.publish(version, tag=tag, private=private, say=_say)


def observers(run: Path, id: str, dataset_id: str, place: Path) -> list[Version]:
    """What is published of a run's observers, written below `place`: a model repository `<id>-<observer>` each."""
    from . import observer_repo

    versions = []
    for name, folder in observer_repo.write(run, place, id, dataset=dataset_id).items():
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = [_file(folder, path.relative_to(folder).as_posix()) for path in paths]
        versions.append(Version(name, "model", observer_repo.FACTS, {file.path: file for file in files}))
    return versions


def dataset(folder: Path, id: str) -> Version:
    """What is published of a dataset folder: what its manifest names, and the texts and pictures beside it.

    Errors: InputError for a file that is not the one of the manifest.
    """
    from . import card

    texts = {path: _file(folder, path, text=True) for path in _TEXTS}
    manifest = json.loads(texts["manifest.json"].content)
    data = {path: _file(folder, path) for path in manifest["files"]}
    wrong = [path for path, file in data.items() if file.sha256 != manifest["files"][path]["sha256"]]
    if texts["recipe.yaml"].sha256 != manifest["recipe_sha256"]:
        wrong.append("recipe.yaml")
    if wrong:
        raise InputError(f"{folder / wrong[0]}: not the file that manifest.json names; condense into another folder")
    beside = [path for path in ("results.json", "assets/grid.png", "assets/curves.png") if (folder / path).is_file()]
    texts |= {path: _file(folder, path, text=True) for path in beside}
    texts["README.md"] = File.read("README.md", card.again(folder, id).encode())

    def following(own: str) -> str:
        return card.again(folder, id, own=own)

    return Version(id, "dataset", "manifest.json", {**data, **texts}, following)


def _file(folder: Path, path: str, text: bool = False) -> File:
    """A file of a folder; a text is read once, whatever becomes of it on the disk."""
    place = folder / path
    try:
        if text or path.endswith((".md", ".json", ".yaml")):
            return File.read(path, place.read_bytes())
        with open(place, "rb") as file:
            return File(path, place, place.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
    except OSError as error:
        raise InputError(f"{place}: cannot be read ({error.strerror}); condense the set again") from error


def described(version: Version, todo: Plan) -> str:
    """The operations of a plan, a line each, with sizes and the tag."""
    if todo.done:
        return f"{version.id} is there as {todo.tag} already; nothing to do"
    lines = [] if todo.head else [f"create    {version.type} {version.id}"]
    lines += [f"add       {file.path:<44} {file.size:>14,} bytes" for file in todo.add]
    lines += [f"delete    {path}" for path in todo.delete]
    total = sum(file.size for file in todo.add)
    commit = f"there as {todo.commit[:8]}" if todo.commit else f"{len(todo.add)} files, {total:,} bytes"
    return "\n".join([*lines, f"commit    {commit}", f"tag       {todo.tag}"])


def _address(version: Version, done: Plan) -> str:
    prefix = "datasets/" if version.type == "dataset" else ""
    return f"{constants.ENDPOINT}/{prefix}{version.id}/tree/{done.tag}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
