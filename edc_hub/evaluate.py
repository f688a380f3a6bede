"""Students trained from a condensed set, beside honest controls, in one command.

    accelerate launch -m edc_hub.evaluate [recipes/evaluation/cifar100.yaml] --dataset ORG/NAME|FOLDER [--key value …]

Students x sets x seeds x rows, one unit of work each. Accuracy is that of the last epoch on the whole split, of the
live weights and of their average; nothing is selected on it.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import comparison, disk, documents, launch
from .comparison import Comparison, Parsed
from .errors import InputError


if TYPE_CHECKING:
    from . import results
    from .condensed import CondensedSet
    from .trials import Done
    from .work import Session


def command(argv: list[str]) -> None:
    """Parses, then prints the recipe or the plan, or trains and reports."""
    parsed = comparison.parse(argv)
    if parsed.print_recipe:
        print(documents.write(parsed.comparison.model_dump()), end="")
        print(f"# rows are called: {parsed.protocol}", file=sys.stderr)
        return
    folder, store = places(parsed.comparison, parsed.sets[0])
    if parsed.dry_run:
        from . import evaluate_plan

        with launch.session(parsed.comparison, store) as session:
            evaluate_plan.show(parsed, folder, session)
        return
    with launch.lock(folder), launch.session(parsed.comparison, store) as session:
        evaluate(parsed, folder, session)


main = launch.entry(command)


def places(asked: Comparison, first: "CondensedSet") -> tuple[Path, Path]:
    """Where results go, and where students are kept: beside the run that made the set, else under runs/."""
    run = first.run
    name = f"{Path(asked.called).name}-{first.manifest['fingerprint'][:8]}"  # many are called alike
    own = run / "evaluation" if run else Path("runs") / f"{name}-evaluation"
    if run and first.manifest["control"]:
        own /= first.manifest["control"]  # beside the results of the run's set
    if asked.evaluation.protocol != first.recipe["evaluation"]["protocol"]:
        own /= asked.evaluation.protocol
    if asked.split != "test":
        own /= asked.split
    folder = disk.local(asked.output_dir, "output_dir") if asked.output_dir else own
    if (folder / "manifest.json").exists():
        raise InputError(f"output_dir: {folder} is a data set; choose another (a run's own set gets its results too)")
    return folder, disk.beside(run or folder) / "artifacts"


def evaluate(parsed: Parsed, folder: Path, session: "Session") -> dict[str, Any]:
    """Trains what is missing and writes the results; every process of the group calls it."""
    from . import record, report, trackers

    asked = parsed.comparison
    trackers.check(asked.report_to)
    found, done, outcomes = measure(parsed, folder, session)
    if session.state.is_main_process:
        picture = record.curves(done)
        record.write(found, picture, folder)
        print(report.table(found), flush=True)
        places = [folder]
        if asked.split == "test":  # what is measured for a choice is no result of the set
            own = [each.run / "dataset" for each in parsed.sets if each.run and not each.manifest["control"]]
            places += [place for place in own if record.replaces(found, place, session)]
        for place in places[1:]:
            with disk.turn(place.parent):
                if record.replaces(found, place, session):  # still, after those who came first
                    record.write(found, picture, place)
        session.report(f"\nresults.json and curves.png in {', '.join(map(str, places))}")
        trackers.log(asked, folder, done, outcomes)
    session.wait()
    return found


def measure(
    parsed: Parsed, folder: Path, session: "Session"
) -> "tuple[dict[str, Any], list[Done], list[results.Outcome]]":
    """Trains what is missing; the content of results.json, and what it is of. Writes no results."""
    from . import record, results
    from .trials import Bench

    bench = Bench(parsed.comparison, parsed.sets, session, folder)
    bench.check()
    session.report(bench.heading(parsed.protocol))
    done = bench.run(bench.trials())
    outcomes = [record.outcome(each, bench) for each in done]
    return results.summarise(outcomes, record.about(parsed, bench, done, session)), done, outcomes


if __name__ == "__main__":
    sys.exit(main())
