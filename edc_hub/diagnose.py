"""What a finished run is like inside: curvature, gradients, moments, and what observers and students see.

    edc-hub diagnose RUN [--measures hessian,gradients,moments,views,agreement] [--every 25] [--student convnet3]

The artefacts of the run are found again and no observer is trained. `diagnosis.json` and `diagnosis.png`, a panel for
each measure as in EDC's Figure 2, go into the run folder; measures of an earlier call stay there.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import Field

from . import arguments, disk, launch, methods, recipes
from .errors import InputError
from .section import Positive, Section, Threads


if TYPE_CHECKING:
    from .finished import Finished

Name = Literal["hessian", "gradients", "moments", "views", "agreement"]
MEASURES = get_args(Name)
EPOCHS = 100  # of a student that is trained here, where nobody says how many
Measure = Callable[[], dict[str, Any]]


class Options(Section):
    """What `edc-hub diagnose` takes beside the run."""

    measures: list[Name] = Field([*MEASURES], description="what to measure; when not given, all that the run can tell")
    every: Positive = Field(25, description="hessian: steps of synthesis between two looks, each at all observers")
    samples: Annotated[int, Field(ge=2)] = Field(8, description="hessian: random vectors of an estimate")
    student: str | None = Field(None, description="gradients, agreement: the first of the protocol when not given")
    batches: list[Positive] = Field([5, 10, 25, 50], description="gradients: sizes of batches")
    steps: Positive = Field(100, description="gradients: steps of training before the second look")
    epochs: Positive | None = Field(
        None, description=f"agreement: epochs of the student; as evaluated, else at most {EPOCHS}, when not given"
    )
    output_dir: str | None = Field(None, description="where the files go; the run folder when not given")
    device: Literal["auto", "cpu", "cuda"] | None = Field(None, description="where networks run; as the run's if null")
    threads: Threads | None = Field(None, description="CPU threads; as the run's when not given")


def command(argv: list[str]) -> None:
    """Parses, measures, writes."""
    run, options = arguments.of_run(argv, "diagnose", Options)
    from . import finished

    recipe = recipes.of_run(run)
    recipe = recipe.model_copy(update=options.model_dump(include={"device", "threads"}, exclude_none=True))
    folder = disk.local(options.output_dir, "output_dir") if options.output_dir else run
    with launch.lock(folder), launch.session(recipe, disk.beside(run.absolute()) / "artifacts") as session:
        diagnose(finished.Finished(run, recipe, session), options, folder)


main = launch.entry(command)


def diagnose(found: "Finished", options: Options, folder: Path) -> dict[str, Any]:
    """Makes the measures, writes both files, prints the table; returns the content of `diagnosis.json`.

    What a measure needs is looked for before the first one starts. Raises InputError where a measure that was asked
    for cannot be made; of those that nobody named the file says why.
    """
    from . import panels, pictures

    ready, unavailable = {}, {}
    for name in dict.fromkeys(options.measures):
        try:
            ready[name] = _PREPARE[name](found, options)
        except InputError as error:
            if "measures" in options.model_fields_set:
                raise InputError(f"{name}: {error}") from error
            unavailable[name] = " ".join(str(error).split())
    if not ready:
        raise InputError(f"measures: nothing to measure; {next(iter(unavailable.values()), 'name one')}")
    made, clock = {}, pictures.Clock(found.session)
    for name, measure in ready.items():
        with clock(name):
            made[name] = measure()
    place = folder / "diagnosis.json"
    content = _merged(place, found.about, made, clock.seconds, unavailable)
    if found.session.state.is_main_process:
        disk.write_text(place, json.dumps(content, indent=2) + "\n")
        panels.picture(folder / "diagnosis.png", content)
        print(panels.table({**made, "unavailable": unavailable}), end="")
        found.session.report(f"\ndiagnosis.json and diagnosis.png in {folder}")
    return content


def _merged(path: Path, about: dict, made: dict, seconds: dict, unavailable: dict) -> dict[str, Any]:
    """The file's content, with what an earlier call measured of the same set."""
    old = disk.json_of(path)
    old = old if old.get("about", {}).get("set") == about["set"] else {}
    times = {name: value for name, value in {**old.get("seconds", {}), **seconds}.items() if name in MEASURES}
    measures = {name: made.get(name) or old[name] for name in MEASURES if name in made or name in old}
    missing = {name: reason for name, reason in unavailable.items() if name not in measures}
    return {"about": about, "seconds": times, **measures, "unavailable": missing}


def _hessian(found: "Finished", options: Options) -> Measure:
    from . import curvature

    recipe, method = found.recipe, found.condensed.manifest["method"]
    if recipe.synthesize.iterations == 0:
        raise InputError("the run synthesised nothing (synthesize.iterations 0); leave this measure out")
    if methods.place(recipe.method):
        raise InputError(f"the images were made by {method}, not by synthesize; leave this measure out")
    given = recipe, found.real, found.observers, found.moments(recipe), found.initial, found.condensed, found.session
    return lambda: curvature.along_synthesis(*given, every=options.every, samples=options.samples)


def _gradients(found: "Finished", options: Options) -> Measure:
    from . import diagnosis

    _refuse_without_views(found)
    sizes = diagnosis.fitting(options.batches, found.condensed)
    bench, name = found.bench(options.student, None)
    return lambda: diagnosis.gradients(bench, name, sizes, options.steps)


def _moments(found: "Finished", options: Options) -> Measure:
    from . import diagnosis

    exact = diagnosis.exactly(found.recipe)
    known = found.moments(exact)
    return lambda: diagnosis.moment_distances(exact, found.sets, found.observers, known, found.session)


def _views(found: "Finished", options: Options) -> Measure:
    from . import diagnosis

    _refuse_without_views(found)
    watching = found.observers
    return lambda: diagnosis.views_seen(found.recipe, found.condensed, watching, found.session)


def _agreement(found: "Finished", options: Options) -> Measure:
    from . import diagnosis

    bench, name = found.trained(options.student, options.epochs, EPOCHS)
    watching = found.observers
    return lambda: diagnosis.agreement(bench, name, found.recipe, found.condensed, watching, found.session)


def _refuse_without_views(found: "Finished") -> None:
    if not found.condensed.epochs:
        raise InputError("the set stores no labelled views (relabel.codec observers); leave this measure out")


_PREPARE = {
    "hessian": _hessian,
    "gradients": _gradients,
    "moments": _moments,
    "views": _views,
    "agreement": _agreement,
}


if __name__ == "__main__":
    sys.exit(main())
