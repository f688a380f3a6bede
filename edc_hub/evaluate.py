"""Students trained from a condensed set, beside honest controls, in one command.

    accelerate launch -m edc_hub.evaluate [recipes/evaluation/cifar100.yaml] --dataset ORG/NAME|FOLDER [--key value …]

Students x sets x seeds x rows, one unit of work each. Accuracy is that of the last epoch on the whole split, of the
live weights and of their average; nothing is selected on it.
"""

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import comparison, documents, launch
from .comparison import Comparison, Parsed


if TYPE_CHECKING:
    from .condensed import CondensedSet
    from .trials import Bench, Done
    from .work import Session


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status (0, 1, 2)."""
    return launch.status(lambda: command(sys.argv[1:] if argv is None else argv))


def command(argv: list[str]) -> None:
    """Parses, then prints the recipe or trains and reports."""
    parsed = comparison.parse(argv)
    if parsed.print_recipe:
        print(documents.write(parsed.comparison.model_dump()), end="")
        print(f"# rows are called: {parsed.protocol}", file=sys.stderr)
        return
    folder, store = places(parsed.comparison, parsed.sets[0])
    with launch.lock(folder), launch.session(parsed.comparison, store) as session:
        evaluate(parsed, folder, session)


def places(asked: Comparison, first: "CondensedSet") -> tuple[Path, Path]:
    """Where results go, and where students are kept: beside the run that made the set, else under runs/."""
    run = first.run
    own = run / "evaluation" if run else Path("runs") / f"{Path(asked.dataset[0]).absolute().name}-evaluation"
    if run and first.manifest["control"]:
        own /= first.manifest["control"]  # beside the results of the run's set
    folder = Path(asked.output_dir).expanduser() if asked.output_dir else own
    return folder, (run or folder).parent / "artifacts"


def evaluate(parsed: Parsed, folder: Path, session: "Session") -> dict[str, Any]:
    """Trains what is missing and writes the results; every process of the group calls it."""
    from . import report, results, trackers
    from .trials import Bench

    asked = parsed.comparison
    trackers.check(asked.report_to)
    bench = Bench(asked, parsed.sets, session)
    session.report(f"{bench.judged_on.id}, split {bench.judged_on.split}: protocol {parsed.protocol}")
    bench.check()
    done = bench.run(bench.trials())
    outcomes = [outcome(each, bench) for each in done]
    found = results.summarise(outcomes, about(parsed, bench, done, session))
    if session.state.is_main_process:
        places = [folder]
        if asked.split == "test":  # what is measured for a choice is no result of the set
            places += [place for place in map(_own_folder, parsed.sets) if place]
        for place in places:
            publish(found, done, place)
        trackers.log(asked, folder, done, outcomes)
        print(report.table(found))
        session.report(f"\nresults.json and curves.png in {', '.join(map(str, places))}")
    session.wait()
    return found


def outcome(done: "Done", bench: "Bench"):
    """The accuracy of a trial, from its predictions."""
    from .accuracy import top1
    from .results import Outcome

    trial, truth = done.trial, bench.test[1]
    live, ema = (top1(done.tensors[key].long(), truth) for key in ("live", "ema"))
    steps, seconds = done.facts["steps"], done.facts["seconds"]
    return Outcome(trial.row, trial.student, trial.set, trial.draw, trial.seed, live, ema, steps, seconds)


def about(parsed: Parsed, bench: "Bench", done: "list[Done]", session: "Session") -> dict[str, Any]:
    """Everything that a reader of the figures must know, for results.json."""
    import torch

    asked, first, judged = parsed.comparison, parsed.sets[0], bench.judged_on
    size, resize = bench.size, asked.evaluation.test_resize
    gpu = session.device.type == "cuda"
    bytes_ = bench.bytes(first, asked.evaluation.labels)
    rows = {}
    for row, facts in {each.trial.row: each.facts for each in done}.items():
        row_bytes = sum(bytes_.values())
        if row.startswith("hard"):
            row_bytes = bytes_["images"]
        rows[row] = {"images": facts["images"], "bytes": row_bytes if row != "upper_bound" else None, "note": ""}
    return {
        "set": {
            "id": Path(asked.dataset[0]).absolute().name if _is_local(asked.dataset[0]) else asked.dataset[0],
            "revision": asked.revision,
            "name": first.manifest["name"],
            "method": first.manifest["method"],
            "ipc": first.ipc,
            "seeds": [condensed.manifest["seed"] for condensed in parsed.sets],
            "fingerprints": [condensed.manifest["fingerprint"] for condensed in parsed.sets],
        },
        "protocol": parsed.protocol,
        "evaluation": _portable(asked, first),
        "split": asked.split,
        "test": {
            "id": judged.id,
            "commit": judged.commit,
            "fingerprint": judged.fingerprint,
            "images": len(bench.test[1]),
            "transform": f"shorter side {resize}, centre crop {size}" if resize else f"{size} px, none",
        },
        "bytes": bytes_,
        "rows": rows,
        "unavailable": bench.unavailable,
        "hardware": {
            "device": torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine(),
            "processes": session.state.num_processes,
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
        },
        "versions": {name: version(name) for name in ("torch", "timm", "transformers", "datasets")},
    }


def _is_local(place: str) -> bool:
    return Path(place).expanduser().is_dir()


def _portable(asked: Comparison, first: "CondensedSet") -> dict[str, Any]:
    """The protocol as a recipe publishes it: local paths by their last part."""
    from . import recipes

    recipe = recipes.resolve(first.recipe).model_copy(update={"evaluation": asked.evaluation})
    return documents.read(recipes.published(recipe), "evaluation")["evaluation"]


def _own_folder(condensed: "CondensedSet") -> Path | None:
    """The dataset folder of the run that made the set; a control's results are none of the run's set."""
    return condensed.run / "dataset" if condensed.run and not condensed.manifest["control"] else None


def publish(found: dict[str, Any], done: "list[Done]", folder: Path) -> None:
    """Writes results.json and the curves; into a dataset folder, the table into its card too."""
    from . import card, report, results, work

    results.write(found, folder)
    lines: dict[str, list] = {}
    for each in done:
        curves = lines.setdefault(f"{each.trial.student}/{each.trial.row}", [])
        curves += [each.tensors["loss"], each.tensors["curve"]]
    readme, is_set = folder / "README.md", (folder / "manifest.json").is_file()
    report.curves((folder / "assets" if is_set else folder) / "curves.png", lines)
    if is_set and readme.is_file():
        text = card.with_results(readme.read_text(encoding="utf-8"), report.markdown(found))
        work.write_atomically(readme, lambda path: path.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
