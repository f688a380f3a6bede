"""The command line of `edc-hub relabel`: which images, and the recipe whose observers label them.

Nothing here imports torch.
"""

from typing import NamedTuple

from pydantic import Field

from . import arguments, disk, keys, recipes
from .errors import InputError
from .recipe import Recipe
from .section import Numbered, Positive, Section
from .selection import selected


class Given(Section):
    """Images to label. Their keys are no recipe's, so that `--images` and `--images.format` are two things."""

    images: str = Field(description="what load_dataset takes, a Hub id or a folder, or a finished run")
    revision: str | None = Field(None, description="branch, tag or commit of images on the Hub")
    config: str | None = Field(None, description="configuration of the images")
    split: str = Field("train", description="split of the images")
    image_column: str | None = Field(None, description="image column; found by its feature when not given")
    label_column: str | None = Field(None, description="label column; found by its feature when not given")
    ipc: Numbered | None = Field(None, description="images of each class to take, the first ones; all when not given")
    size: Positive | None = Field(None, description="side in pixels to bring the images to; their own when not given")

    @property
    def place(self) -> str:
        """What `load_dataset` takes: of a run the set that it made."""
        made = disk.local(self.images, "images") / "dataset"
        return str(made) if (made / "manifest.json").is_file() else self.images


class Parsed(NamedTuple):
    given: Given
    rest: list[str]
    """What the command line says besides."""
    recipe: Recipe
    dry_run: bool
    print_recipe: bool


# nothing is condensed, so nothing that the recipe says of that can be wrong
_NOT_USED = [
    "--initialize.kind=real",
    "--initialize.factor=1",
    "--initialize.observers=null",
    "--synthesize.iterations=0",
    "--synthesize.observers=null",
]


def parse(argv: list[str]) -> Parsed:
    """The images and the recipe of a command line. `--help` prints to stdout and exits with 0.

    Raises InputError on anything wrong.
    """
    arguments.help_asked(argv, _usage)
    own, rest = _apart(argv)
    _, named, _ = arguments.split(own, Given, {})
    if "images" not in named:
        raise InputError("images: none given; write --images FOLDER or --images ORG/NAME")
    given = keys.validated(Given, named)
    known = {"ipc": given.ipc} if given.ipc else {}
    parsed = recipes.parse([*rest, *_NOT_USED], prog="relabel", **known)
    return Parsed(given, rest, _adapted(parsed.recipe, given), parsed.dry_run, parsed.print_recipe)


def _usage() -> str:
    theirs = next(line for line in keys.help_lines(Recipe) if line.startswith("  --ipc "))  # the word is the images'
    shown = recipes.usage("relabel --images FOLDER|ORG/NAME").replace(f"{theirs}\n", "")
    return "\n".join([shown, "\nimages to label:", *keys.help_lines(Given)])


def resolve(parsed: Parsed, ipc: int) -> Recipe:
    """The recipe for as many images a class as there are: methods and protocols have values of single IPCs."""
    return _adapted(recipes.parse([*parsed.rest, *_NOT_USED], prog="relabel", ipc=ipc).recipe, parsed.given)


def _apart(argv: list[str]) -> tuple[list[str], list[str]]:
    own, rest, words = [], [], list(argv)
    while words:
        word = words.pop(0)
        name, equals, _ = word.removeprefix("--").partition("=")
        mine = word.startswith("--") and name.replace("-", "_") in Given.model_fields
        (own if mine else rest).append(word)
        if mine and not equals and words and not words[0].startswith("--"):
            own.append(words.pop(0))
    return own, rest


def _adapted(recipe: Recipe, given: Given) -> Recipe:
    """With the method `relabel`, the observers that label alone, and a run folder named by the images."""
    used = {name for name, _ in selected(recipe, recipe.relabel.observers)}
    networks = [net for net in recipe.observers.networks if net.name in used]
    name = disk.local(given.images, "images").resolve().name
    changed = {
        "method": "relabel",
        "observers": recipe.observers.model_copy(update={"networks": networks}),
        "output_dir": recipe.output_dir or f"runs/{recipe.name}-relabel-{name}",
    }
    return recipe.model_copy(update=changed)
