"""Anyone's images become a condensed set of ours, labelled by our observers.

    accelerate launch -m edc_hub.relabel RECIPE --images <Hub id or folder> [--image_column … --section.key value …]

Source and observers are those of the recipe, found again where a run of `condense` beside this one has them; nothing
is synthesised. So any published set can be put under one protocol.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from . import given, launch, recipes
from .errors import InputError
from .given import Parsed
from .recipe import Recipe


if TYPE_CHECKING:
    from .foreign import Foreign
    from .source import RealSet
    from .work import Session


def command(argv: list[str]) -> None:
    """Parses, then prints the recipe or the plan, or labels the images."""
    parsed = given.parse(argv)
    recipe = parsed.recipe
    if parsed.print_recipe:
        print(recipes.dump(recipe), end="")
        return
    folder = launch.run_folder(recipe)
    launch.refuse_what_is_not_ours(folder)
    if parsed.dry_run:
        with TemporaryDirectory() as nothing, launch.session(recipe, Path(nothing)) as session:
            show_plan(parsed, session)
        return
    launch.make(recipe, folder, lambda session: relabel(parsed, folder, session))


main = launch.entry(command)


def relabel(parsed: Parsed, folder: Path, session: "Session") -> Path:
    """Labels the images, and random real ones as controls, on every process of the group; returns the dataset."""
    import torch

    from . import observers, pictures, source
    from .initialize import Initial

    clock = pictures.Clock(session)
    with clock("source"):
        foreign, recipe, real = read(parsed)
        real.preload()
    clock.resume(recipe, folder)
    launch.begin(recipe, folder, session)
    with clock("observers"):
        watching = observers.obtain(recipe, real, session)
    unknown = Initial(foreign.images, torch.full((len(foreign.images), 1), -1, dtype=torch.int32), "")
    made = pictures.Pictures("relabel", folder / "dataset", foreign.images, unknown, None, foreign.facts)
    alike, size = real, foreign.images.shape[-1]
    if recipe.relabel.controls and size != real.size:  # of the same commit, which a finished run keeps to
        again = {"size": size, "revision": real.commit or recipe.source.revision}
        alike = source.load(recipe.source.model_copy(update=again))
    pictures.finish(recipe, real, watching, made, clock, session, alike=alike)
    if session.state.is_main_process:
        _say_agreement(made.place, session)
    return made.place


def read(parsed: Parsed) -> "tuple[Foreign, Recipe, RealSet]":
    """The images, the recipe for as many a class, and the recipe's source.

    Raises InputError where they do not go together, and for a run folder that is finished and of others.
    """
    from . import foreign, labels, rules, source

    folder = launch.run_folder(parsed.recipe)
    real = launch.images(parsed.recipe, folder)
    with _naming_flags():
        found = foreign.load(parsed.given, parsed.recipe.source, real)
    recipe = given.resolve(parsed, found.ipc)
    size, grid = found.images.shape[-1], recipe.images.grid
    labels.check(recipe, len(real.names), size)
    if found.grid > 1 and found.grid != grid:
        what = f"--images: those of {found.facts['id']} are canvases of {found.grid} x {found.grid} pictures"
        raise InputError(f"{what}; write --images.grid {found.grid}")
    rules.validate_cuts(recipe, size)
    if recipe.relabel.controls:
        source.check_ipc(real, recipe.ipc, grid**2)
    launch.refuse_another_recipe(recipe, folder / "dataset" / "recipe.yaml")
    _refuse_other_images(folder / "dataset", found)
    return found, recipe, real


@contextmanager
def _naming_flags() -> Iterator[None]:
    """What `source` says about its keys, said about the flags that stand for them here."""
    flags = {"path": "images", "name": "config", "train_split": "split"}
    try:
        yield
    except InputError as error:
        key, colon, text = str(error).partition(": ")
        name = key.removeprefix("source.")
        raise InputError(str(error) if name == key else f"--{flags.get(name, name)}{colon}{text}") from error


def _refuse_other_images(folder: Path, foreign: "Foreign") -> None:
    """A finished set is never overwritten by one of other images."""
    from . import manifest

    if not (found := manifest.there(folder)):
        return
    there = found.get("origin", {})
    if any(there.get(key) != foreign.facts[key] for key in ("id", "commit", "split", "fingerprint")):
        other = there.get("id", "images that were made here")
        changed = ", which has changed since" if other == foreign.facts["id"] else ""
        raise InputError(f"output_dir: {folder} is finished and of {other}{changed}; give this run another output_dir")


def _say_agreement(dataset: Path, session: "Session") -> None:
    """How many images the observers put in the class they came with: next to none where classes are mixed up."""
    from .condensed import CondensedSet
    from .observers import least_accuracy

    made = CondensedSet.load(dataset)
    share = (made.soft_labels.argmax(1) == made.labels).float().mean().item()
    doubt = "; are the classes numbered as in the recipe's source?" if share < least_accuracy(len(made.names)) else ""
    session.report(f"the observers see the given class in {share:.1%} of the images{doubt}")


def show_plan(parsed: Parsed, session: "Session") -> None:
    """Prints what would be made on stdout; trains, labels and writes nothing."""
    from . import plan

    foreign, recipe, real = read(parsed)
    count, classes = len(foreign.images), len(real.names)
    networks = plan.untrained(recipe, classes, session)
    if session.state.is_main_process:
        print(f"{foreign.facts['id']}: {classes} classes, {recipe.ipc} images each, {foreign.images.shape[-1]} px")
        print(f"run folder: {launch.run_folder(recipe)}")
        print(f"observers: {', '.join(net.name for net in recipe.observers.networks)}")
        print(f"sets: {plan.sets(recipe)}", flush=True)
    seconds = plan.project(recipe, real, networks, session, foreign.images)
    if session.state.is_main_process:
        plan.times({stage: seconds[stage] for stage in ("observers", "relabel")})
        plan.show(recipe, plan.sizes(recipe, foreign.images, count, classes))


if __name__ == "__main__":
    sys.exit(main())
