"""A table of overrides x seeds: every cell condensed and evaluated, what cells share made once.

    accelerate launch -m edc_hub.sweep recipes/sweeps/table5.yaml [--seeds 0,1,2 --split holdout --section.key value …]

A cell is `condense` for each set seed and `evaluate` of these sets, by the functions of those commands and in their
folders, so the same command again goes on where it was. The tables are written after every cell.
"""

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import cells, launch, methods
from .cells import Cell, Parsed
from .errors import InputError, OtherFailed, OtherStopped, naming
from .recipe import Recipe


if TYPE_CHECKING:  # torch is imported once the sweep is known to be right
    from .realset import RealSet
    from .work import Session


def command(argv: list[str]) -> None:
    """Parses, then prints the plan, or does the sweep."""
    parsed = cells.parse(argv)
    if parsed.dry_run:
        from . import sweep_plan

        print(sweep_plan.show(parsed))
        return
    for cell in parsed.cells:
        with naming(cell.place):
            for run in cell.runs:
                methods.find(run.method)
                folder = launch.run_folder(run)
                launch.refuse_what_is_not_ours(folder)
                launch.refuse_another_recipe(run, folder / "dataset" / "recipe.yaml", folder / "recipe.yaml")
    first = parsed.cells[0].runs[0]
    with launch.lock(parsed.folder), launch.session(first, launch.artifacts(first)) as session:
        failed = sweep(parsed, session)
    if failed:
        kind = InputError if all(isinstance(error, InputError) for error in failed.values()) else RuntimeError
        text = "; ".join(f"{place}: {error}" for place, error in failed.items())
        raise kind(f"{len(failed)} of {len(parsed.cells)} cells failed, the others are in the tables: {text}")


main = launch.entry(command)


def sweep(parsed: Parsed, session: "Session") -> dict[str, Exception]:
    """Does every cell on every process of the group; returns the errors of those that failed, by `Cell.place`."""
    from . import sweep_table

    open_source = _opener()
    cells.check(parsed.cells, open_source)
    made: dict[Path, Exception | None] = {}  # run folders that this command has seen to
    failed: dict[str, Exception] = {}
    if session.state.is_main_process:
        sweep_table.write(parsed, failed)
    for number, cell in enumerate(parsed.cells, 1):
        session.report(f"\ncell {number} of {len(parsed.cells)}: {cell.place}")
        try:
            for run in cell.runs:
                _condense(run, made, open_source, session)
            _evaluate(parsed, cell, session)
        except OtherStopped:
            raise
        except Exception as error:
            failed[cell.place] = _of_all(error, session)
            session.report(f"{cell.place} failed: {error}")
        if session.state.is_main_process:
            sweep_table.write(parsed, failed)
    if session.state.is_main_process:
        print(sweep_table.text(parsed, failed), flush=True)  # a launcher may end this process before it does
        session.report(f"table.csv, table.md and table.png in {parsed.folder}")
    session.wait()
    return failed


def _opener() -> "Callable[[Recipe], RealSet]":
    """Opens a recipe's source; the last one stays, with what it has decoded."""
    from . import source

    last: dict[str, RealSet] = {}

    def open_source(recipe: Recipe) -> "RealSet":
        key = recipe.source.model_dump_json()
        if key not in last:
            last.clear()
            last[key] = source.load(recipe.source)
        return last[key]

    return open_source


def _condense(
    run: Recipe, made: dict[Path, Exception | None], open_source: "Callable[[Recipe], RealSet]", session: "Session"
) -> None:
    """Makes the set of a run, or fails as it did in an earlier cell."""
    from . import condense

    folder = launch.run_folder(run)
    if folder not in made:
        try:
            with launch.lock(folder, waits=session.report):  # another sweep has this run, too
                condense.condense(run, folder, session.with_precision(run.precision), open_source(run))
            made[folder] = None
        except Exception as error:
            made[folder] = error.error if isinstance(error, OtherFailed) else error
            raise
    if made[folder] is not None:
        raise made[folder]


def _evaluate(parsed: Parsed, cell: Cell, session: "Session") -> None:
    """Trains the students of a cell's sets; its results go into the cell's folder and nowhere else."""
    from . import comparison, evaluate, record

    given: dict[str, Any] = {name: getattr(parsed.sweep, name) for name in ("split", "seeds", "controls")}
    given |= {name: getattr(cell.recipe, name) for name in ("device", "threads", "checkpoint_seconds")}
    given |= {"dataset": [run.output_dir for run in cell.runs], "evaluation": cell.recipe.evaluation.model_dump()}
    asked = comparison.resolve(given)
    found, done, _ = evaluate.measure(asked, cell.folder, session.with_precision(asked.comparison.precision))
    if session.state.is_main_process:
        record.write(found, record.curves(done), cell.folder)
    session.wait()


def _of_all(error: Exception, session: "Session") -> Exception:
    """Tells the other processes of `error`, which stops them at their next wait; returns what is wrong with the cell.

    So all of them are here, and go on with the next cell together.
    """
    if isinstance(error, OtherFailed):
        return error.error
    if not isinstance(error, InputError):
        traceback.print_exc()
    session.wait(failed=error)
    return error.with_traceback(None)  # whose frames hold tensors


if __name__ == "__main__":
    sys.exit(main())
