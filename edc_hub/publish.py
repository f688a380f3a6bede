"""A finished run goes to the Hub: one commit that holds images, labels and card, and one tag on it.

    edc-hub publish RUN ORG/NAME [--tag v1.0.0] [--private] [--dry_run] [--observers ORG/NAME]

The same command again does nothing where the version is there, and goes on where one was stopped.
"""

import sys
from pathlib import Path

from huggingface_hub import constants
from pydantic import Field

from . import arguments, launch, pushing
from .errors import InputError
from .hub import Plan
from .section import Section
from .versions import Version


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
    for version, plan in pushing.push(dataset_folder(run), id, **options.model_dump()):
        print(pushing.described(version, plan) if options.dry_run else _address(version, plan))


main = launch.entry(command)


def dataset_folder(run: Path) -> Path:
    """The dataset folder of a run, or the folder itself where it is one. InputError where there is none."""
    for folder in (run, run / "dataset"):
        if (folder / "manifest.json").is_file():
            return folder
    if not run.is_dir():
        raise InputError(f"publish: {run} is no folder; give the folder of a finished run")
    remedy = "give the folder of a finished run"
    if (run / "recipe.yaml").is_file():
        remedy = f"edc-hub condense {run}/recipe.yaml goes on with the run"
    raise InputError(f"publish: no finished set in {run}; {remedy}")


def _address(version: Version, done: Plan) -> str:
    prefix = "datasets/" if version.type == "dataset" else ""
    return f"{constants.ENDPOINT}/{prefix}{version.id}/tree/{done.tag}"


if __name__ == "__main__":
    sys.exit(main())
