"""What `edc-hub evaluate --dry_run` says: which students are missing, how long they would take, and what they read."""

from functools import partial
from pathlib import Path

from . import plan, students, work
from .comparison import Parsed
from .errors import InputError
from .lessons import Trial
from .results import ROWS
from .students import STAGE
from .trials import Bench
from .work import Session


def show(parsed: Parsed, folder: Path, session: Session) -> None:
    """Prints which students are missing, how long they would take and what they read; trains and writes nothing."""
    asked = parsed.comparison
    lone = any(each.run is None for each in parsed.sets)  # whose controls are made again first, where they can be
    if asked.evaluation.labels == "online" and (lone or asked.evaluation.teachers):
        raise InputError(
            "--dry_run: the networks that label online would be trained or downloaded first; leave it out, or write "
            "--evaluation.labels stored"
        )
    left = [kind for kind in asked.controls if lone and kind in ("initial", "random")]
    asked = asked.model_copy(update={"controls": [kind for kind in asked.controls if kind not in left]})
    bench = Bench(asked, parsed.sets, session, folder)
    bench.check()
    every, seconds = bench.trials(), 0.0
    missing = [trial for trial in every if not session.store.has(bench.unit(trial))]
    if session.state.is_main_process:
        print(bench.heading(parsed.protocol))
        print(f"results: {folder}\n\n{'student':<24}{'to train':>12}{'steps take':>12}", flush=True)
    for name in bench.sections:
        own = [trial for trial in missing if trial.student == name]
        taken = _seconds(bench, own) / min(session.state.num_processes, len(own)) if own else 0.0
        seconds += taken
        if session.state.is_main_process:
            of_all = f"{len(own)} of {sum(trial.student == name for trial in every)}"
            print(f"{name:<24}{of_all:>12}{plan.human(taken):>12}", flush=True)
    if session.state.is_main_process:
        print(f"{'total':<24}{f'{len(missing)} of {len(every)}':>12}{plan.human(seconds):>12}\n")
        labels = asked.evaluation.labels
        sizes = bench.lessons.bytes(parsed.sets[0], labels)
        parts = ", ".join(f"{part} {size:,}" for part, size in sizes.items())
        print(f"bytes of the set, labels {labels}: {sum(sizes.values()):,} ({parts})")
        left = dict.fromkeys(left, "not counted; made first, where it can be")
        for row, why in {**left, **bench.unavailable}.items():
            print(f"{row}: {why}")


def _seconds(bench: Bench, trials: list[Trial]) -> float:
    """Projected seconds that the steps of trials of one student take, by a few of them; nothing of it is kept."""
    total = 0.0
    for whole in (False, True):  # the whole real set, which has batches of its own
        own = [trial for trial in trials if (ROWS[trial.row].images == "whole") == whole]
        if own:
            section, name = bench.section(own[0]), own[0].student
            bench.session.report(f"measuring {name}" + " on the whole real set" * whole)
            learner = students.Learner(bench.network(name, 0), section, bench.session)
            learner.begin(section.lr)
            fed = bench.lessons.feed(own[0], section, 0)
            batch = next(fed.epoch(0, work.generator(0, STAGE, "time")))
            each = plan.seconds_of(partial(learner.step, batch), bench.session)
            total += each * section.epochs * fed.steps * len(own)
    return total
