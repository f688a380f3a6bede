"""A finished run goes to the Hub: one commit that holds images, labels and card, and one tag on it.

    edc-hub publish RUN ORG/NAME [--tag v1.0.0] [--private] [--dry_run] [--observers ORG/NAME]

The same command again does nothing where the version is there, and goes on where one was stopped.
"""

import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from huggingface_hub import constants
from pydantic import Field

from . import arguments, contents, disk, hub, launch
from .hub import Plan
from .hub_errors import may_write
from .recipe import Recipe
from .section import Section
from .versions import OBSERVERS, Version


class Options(Section):
    """What `edc-hub publish` takes beside the run and the name; the token is HF_TOKEN's or that of `hf auth login`."""

    tag: str | None = Field(
        None, description="vMAJOR.MINOR.PATCH; else the next: major for other columns, minor for other rows, or patch"
    )
    observers: str | None = Field(None, description="ORG/NAME: publish each observer as a model ORG/NAME-<observer>")
    private: bool = Field(False, description="make the repository private where it is new")
    dry_run: bool = Field(False, description="print what would be sent, with sizes, and the tag; send nothing")


def command(argv: list[str]) -> None:
    """Parses, then prints the plan or publishes."""
    folder = "the folder of a finished run, or a dataset folder"
    run, id, options = arguments.of_run(argv, "publish", Options, "RUN ORG/NAME", folder)
    if not launch.is_first():  # under a launcher
        return
    for version, plan in push(run, id, **options.model_dump()):
        print(described(version, plan) if options.dry_run else _address(version, plan))


main = launch.entry(command)


def _address(version: Version, done: Plan) -> str:
    prefix = "datasets/" if version.type == "dataset" else ""
    return f"{constants.ENDPOINT}/{prefix}{version.id}/tree/{done.tag}"


def push(
    folder: Path,
    id: str,
    *,
    tag: str | None = None,
    private: bool = False,
    observers: str | None = None,
    dry_run: bool = False,
) -> list[tuple[Version, Plan]]:
    """Publishes a finished run or dataset folder and, where `observers` names ORG/NAME, its run's observers before it.

    Returns what was published, or with `dry_run` would be, and as what, the set last. Errors: InputError in one line.
    """
    from . import manifest  # which imports torch, as all that reads sets does

    folder = manifest.folder_of(folder, key="run")
    names = [id, *([observers] if observers else [])]
    for name in names:
        hub.check(name, tag)
    for name in names if not dry_run else ():
        may_write(name, say)  # before the files are read
    with tempfile.TemporaryDirectory() as place:
        models = contents.models(folder, observers, id, Path(place)) if observers else []

        def dataset(plans: list[tuple[Version, Plan]]) -> Version:
            tags = [plan.tag for _, plan in plans]
            return contents.dataset(
                folder, id, contents.observers(folder, observers, models, tags) if models else None
            )

        looks = [(model, hub.look(model, private=private)) for model in models]
        version = dataset(looks)
        if models or dry_run:  # a set that would be refused leaves no observers behind
            planned = hub.look(version, tag, private)
        if dry_run:
            return [*looks, (version, planned)]
        done = [(model, hub.publish(model, private=private, say=say)) for model in models]
        if [plan.tag for _, plan in looks] != [plan.tag for _, plan in done]:
            version = dataset(done)
        done.append((version, hub.publish(version, tag=tag, private=private, say=say)))
        if models:
            with suppress(OSError):  # where the folder may be written, the next version names them too
                (folder / OBSERVERS).write_bytes(version.files[OBSERVERS].content)
        measured = disk.json_of(folder / "results.json")
        commands = {"students": "edc-hub evaluate", "prefixes": "edc-hub showcase"}
        if missing := [command for part, command in commands.items() if part not in measured]:
            say(f"the card of {id} misses accuracies: run {' and '.join(missing)}, then publish again")
        return done


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


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def before(recipe: Recipe, folder: Path) -> None:
    """Raises InputError, before hours of work, for what the Hub would refuse of the set to be made in `folder`."""
    from .weights import OURS  # which imports torch, for a run alone

    section = recipe.hub
    for name in filter(None, (section.id, section.observers)):
        may_write(name, say)
    finished = (folder / "manifest.json").is_file()  # the tag may hold this very set
    _newest(section.id, tag=None if finished else section.tag, private=section.private)
    for net in recipe.observers.networks if section.observers else ():
        id = f"{section.observers}-{net.name}"
        hub.newest(id, type="model", mark=OURS, tag=None, private=section.private)


def planned(recipe: Recipe, sizes: dict[str, float]) -> str:
    """What publishing would do with a set that is not made yet.

    Args: sizes: projected bytes of each configuration. Errors: as those of `before`, but for the token.
    """
    section = recipe.hub
    newest = _newest(section.id, tag=section.tag, private=section.private)
    lines = [f"create    dataset {section.id}{' (private)' if section.private else ''}"] if newest is None else []
    if section.observers:
        lines += [f"commit    model {section.observers}-{net.name}" for net in recipe.observers.networks]
    lines += [f"add       {f'{name}/train-*.parquet':<44} {size / 1e6:>14,.1f} MB" for name, size in sizes.items()]
    lines += [f"add       {name}" for name in ("README.md", "assets/grid.png", "manifest.json", "recipe.yaml")]
    lines.append(f"commit    dataset {section.id}, {sum(sizes.values()) / 1e6:,.1f} MB")
    default = f"what follows {newest}: schema, data, card or results" if newest else "v1.0.0"
    return "\n".join([*lines, f"tag       {section.tag or default}"])


def _newest(id: str, *, tag: str | None, private: bool) -> str | None:
    return hub.newest(id, type="dataset", mark="manifest.json", tag=tag, private=private)


if __name__ == "__main__":
    sys.exit(main())
