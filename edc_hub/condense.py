"""The main job: a real image-classification set becomes a condensed set.

    accelerate launch -m edc_hub.condense recipes/cifar100.yaml [--section.key value …]

Six stages, each an artefact that the next reads: observers, moments, initial images, synthesis, soft labels, the
dataset folder. The same command again goes on where it was; on several processes it gives the same bytes.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from . import launch, methods, recipes
from .errors import InputError
from .recipe import Recipe


if TYPE_CHECKING:  # torch is imported once the recipe is known to be right: a typo is answered at once
    from .source import RealSet
    from .work import Session


def command(argv: list[str]) -> None:
    """Parses, then prints the recipe or the plan, or does the job."""
    recipe, dry_run, print_recipe, resolved = recipes.parse(argv, prog="condense")
    if print_recipe:
        print(recipes.dump(recipe), end="")
        return
    if recipe.method == "relabel":  # the recipe that a relabelled set carries; it makes no images
        raise InputError("method: relabel labels images that are there; write edc-hub relabel RECIPE --images …")
    if launch.is_first() and not resolved and (line := recipes.without_values(recipe)):
        print(line, file=sys.stderr)
    function = methods.find(recipe.method)
    folder = launch.run_folder(recipe)
    launch.refuse_what_is_not_ours(folder)
    launch.refuse_another_recipe(recipe, folder / "dataset" / "recipe.yaml")
    if dry_run:
        from . import plan

        if function:
            print(f"synthesize: by {recipe.method}, whose time is not projected")
        plan.dry_run(methods.without_synthesis(recipe) if function else recipe)
        return
    launch.make(recipe, folder, lambda session: condense(recipe, folder, session))


main = launch.entry(command)


def condense(recipe: Recipe, folder: Path, session: "Session", real: "RealSet | None" = None) -> Path:
    """Does the whole job on every process of the group, with the source opened where it is not given; returns the
    dataset folder."""
    from . import initialize, labels, moments, observers, pictures, synthesize

    clock, function = pictures.Clock(session), methods.find(recipe.method)
    with clock("source"):
        real = launch.images(recipe, folder, real)
        initialize.check(recipe, real)
        labels.check(recipe, len(real.names))
        real.preload()
    clock.resume(recipe, folder)
    launch.begin(recipe, folder, session)
    with clock("observers"):
        watching = observers.obtain(recipe, real, session)
    with clock("moments"):
        matched = recipe.synthesize.iterations and not function
        targets = moments.obtain(recipe, real, watching, session) if matched else None
    with clock("initialize"):
        initial = initialize.obtain(recipe, real, watching, session)
    with clock("synthesize"):
        if function:
            images = methods.obtain(function, recipe, real, watching, initial, session)
        else:
            images = synthesize.obtain(recipe, real, watching, targets, initial, session)
    made = pictures.Pictures("relabel", folder / "dataset", images, initial, None)
    return pictures.finish(recipe, real, watching, made, clock, session)


if __name__ == "__main__":
    sys.exit(main())
