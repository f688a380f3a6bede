"""The main job: a real image-classification set becomes a condensed set.

    accelerate launch -m edc_hub.condense recipes/cifar100.yaml [--section.key value …]

Six stages, each an artefact that the next reads: observers, moments, initial images, synthesis, soft labels, the
dataset folder. The same command again goes on where it was; on several processes it gives the same bytes.
"""

import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from . import launch, recipes
from .errors import InputError
from .recipe import Recipe


if TYPE_CHECKING:  # torch is imported once the recipe is known to be right: a typo is answered at once
    from .work import Session


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status (0, 1, 2)."""
    return launch.status(lambda: command(sys.argv[1:] if argv is None else argv))


def command(argv: list[str]) -> None:
    """Parses, then prints the recipe or the plan, or does the job."""
    recipe, dry_run, print_recipe = recipes.parse(argv, prog="condense")
    if print_recipe:
        print(recipes.dump(recipe), end="")
        return
    if recipe.method == "relabel":  # the recipe that a relabelled set carries; it makes no images
        raise InputError("method: relabel labels images that are there; write edc-hub relabel RECIPE --images …")
    if dry_run:
        from . import plan

        plan.dry_run(recipe)
        return
    folder = launch.run_folder(recipe)
    launch.refuse_what_is_not_ours(folder)
    launch.refuse_another_recipe(recipe, folder / "dataset" / "recipe.yaml")
    if recipe.hub.push and launch.is_first():
        from . import pushing

        pushing.before(recipe, folder / "dataset")
    with launch.lock(folder), launch.session(recipe, launch.artifacts(recipe)) as session:
        dataset = condense(recipe, folder, session)
        if session.state.is_main_process:
            print(dataset)
    if recipe.hub.push and launch.is_first():
        pushing.after(recipe, dataset)


def condense(recipe: Recipe, folder: Path, session: "Session") -> Path:
    """Does the whole job on every process of the group; returns the dataset folder."""
    from . import initialize, labels, moments, observers, pictures, source, synthesize, work

    clock = pictures.Clock(session)
    with clock("source"):
        real = source.load(recipe.source)
        initialize.check(recipe, real)
        labels.check(recipe, len(real.names))
        real.preload()
    if session.state.is_main_process:
        work.sweep(launch.artifacts(recipe))
        work.write_atomically(folder / "recipe.yaml", lambda path: path.write_text(recipes.dump(recipe), "utf-8"))
    with clock("observers"):
        watching = observers.obtain(recipe, real, session)
    with clock("moments"):
        targets = moments.obtain(recipe, real, watching, session) if recipe.synthesize.iterations else None
    with clock("initialize"):
        initial = initialize.obtain(recipe, real, watching, session)
    with clock("synthesize"):
        images = synthesize.obtain(recipe, real, watching, targets, initial, session)
    made, wrote = pictures.Pictures("relabel", folder / "dataset", images, initial, None), False
    others = pictures.controls(recipe, real, initial, folder) if recipe.relabel.controls else []
    for each in itertools.chain([made], others):  # one at a time in memory
        with clock(each.label):
            wrote |= pictures.label_and_write(recipe, real, watching, each, session)
    if session.state.is_main_process:
        if wrote or not (folder / "run.json").exists():  # else all was there, and the times are of finding it
            pictures.write_facts(real, clock, folder, session)
        pictures.say_where(recipe, real, made.place, session)
    return made.place


if __name__ == "__main__":
    sys.exit(main())
