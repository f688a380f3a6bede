"""Experiment trackers (`report_to`): curves and accuracies of finished students, through accelerate's trackers."""

import sys
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path

from accelerate import tracking

from .comparison import Comparison
from .errors import InputError, first_line
from .results import Outcome
from .trials import Done


def check(names: list[str]) -> None:
    """Raises InputError for a tracker that is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise InputError(f"report_to: {name} is not installed; pip install {name}, or remove it")


def log(asked: Comparison, folder: Path, done: list[Done], outcomes: list[Outcome]) -> None:
    """Sends every student's loss and learning rate by epoch and its accuracies at the end; on the main process.

    Raises InputError where a tracker fails.
    """
    config = {f"evaluation.{key}": str(value) for key, value in asked.evaluation.model_dump().items()}
    for kind in asked.report_to:
        tracker_class = tracking.LOGGER_TYPE_TO_CLASS[kind]
        where = {"logging_dir": folder / "tracking"} if tracker_class.requires_logging_directory else {}
        try:
            with redirect_stdout(sys.stderr):  # trackio tells of itself on stdout
                tracker = tracker_class(Path(asked.called).name, **where)
                tracker.start()
                tracker.store_init_configuration({"dataset": ",".join(asked.dataset), **config})
                for epoch, values in sorted(_by_epoch(done, outcomes).items()):
                    tracker.log(values, step=epoch)
                tracker.finish()
        except Exception as error:  # each in its own way: no login, no network, no disk
            reason = first_line(error) or type(error).__name__
            raise InputError(
                f"report_to: {kind} failed ({reason}); the results are written, and the same command again trains "
                f"nothing: mend it, or remove {kind}"
            ) from error


def _by_epoch(done: list[Done], outcomes: list[Outcome]) -> dict[int, dict[str, float]]:
    """All students' values of each epoch: wandb takes no step that is before the last one."""
    found: dict[int, dict[str, float]] = {}
    for (trial, tensors, _), reached in zip(done, outcomes, strict=True):
        name = f"{trial.student}/{trial.row}/set{trial.set}-draw{trial.draw}-seed{trial.seed}"
        for epoch, (loss, lr) in enumerate(zip(tensors["loss"].tolist(), tensors["lr"].tolist(), strict=True)):
            found.setdefault(epoch, {}).update({f"{name}/loss": loss, f"{name}/lr": lr})
        last = {f"{name}/accuracy": reached.live, f"{name}/accuracy_ema": reached.ema}
        found[len(tensors["loss"]) - 1].update(last)
    return found
