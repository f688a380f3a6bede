"""What a trial learns from: a condensed set, real images that fill its bytes, or the whole real set."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import psutil
import torch
from torch import Tensor

from . import encoding, feed, launch, teachers, work
from .condensed import CondensedSet
from .errors import InputError
from .feed import Drawn, Stored
from .protocol import Evaluation
from .realset import RealSet
from .recipe import Images
from .results import ROWS
from .section import ViewSettings
from .teachers import Teachers
from .work import Session


FEW = 256  # images whose files tell how large the others are


class Trial(NamedTuple):
    """One student on one row."""

    row: str  # as in results.Outcome
    student: str
    set: int  # which of the condensed sets
    draw: int  # which draw of random images
    seed: int
    images: CondensedSet  # what it learns from; on the real rows, the set whose bytes and steps they share


@dataclass
class Lessons:
    """What the trials of one comparison learn from."""

    sections: dict[str, Evaluation]
    """The protocol of each student, before a row changes it."""
    teachers: Teachers
    real: Callable[[], RealSet]
    """The training split without the hold-out."""
    images: Images
    """How files of the set are encoded, and those of as many bytes."""
    session: Session

    def __post_init__(self) -> None:
        self._equal: dict[tuple[int, int], tuple[Tensor, int]] = {}

    def feed(self, trial: Trial, section: Evaluation, seed: int) -> Stored | Drawn:
        """The batches of a trial; `section` is its protocol as the row asks.

        Real images of equal bytes take as many steps as the set, all of full batches.
        """
        row, condensed, device = ROWS[trial.row], trial.images, self.session.device
        view, full = self.view(condensed, section), self.whole_batches(trial)
        if view and row.mixed is False:
            view = view.model_copy(update={"mix": "none"})
        if row.images in ("real", "whole"):
            real, count, whole = self.real(), len(condensed.labels), row.images == "whole"
            rows = real.rows() if whole else self._of_equal_bytes(trial)[0]
            return Drawn(
                real.images(rows),
                real.labels[rows],
                view,
                section.batch if whole else min(section.batch, count),
                device,
                seed=seed,
                teach=None,
                fixed=None if whole else feed.steps(count, section.batch, full=full),
            )
        if self.sections[trial.student].labels == "stored":
            hard, mix, kept = section.labels == "hard", row.mixed is not False, section.shuffled
            return Stored(condensed, section.batch, device, seed=seed, hard=hard, mix=mix, shuffled=kept)
        teach = None
        if section.labels == "online":
            teach = self.teachers.teach
        elif section.labels == "mean":
            teach = teachers.of_images(condensed, self.session)
        labels = condensed.of_pictures(condensed.labels)
        pictures, grid = condensed.pictures, condensed.grid
        return Drawn(pictures, labels, view, section.batch, device, seed=seed, teach=teach, grid=grid, full=full)

    def view(self, condensed: CondensedSet, section: Evaluation) -> ViewSettings | None:
        """How views are drawn; None: images are shown whole."""
        if section.augment == "none":
            return None
        return section.view if section.augment == "own" else feed.settings(condensed.manifest["soft_labels"])

    def whole_batches(self, trial: Trial) -> bool:
        """Whether the set's own row, whose steps every row has, leaves a last batch of fewer views out."""
        return self.sections[trial.student].labels == "online" and self.teachers.of_batches

    def budget(self, trial: Trial) -> int:
        """The bytes that real images may fill."""
        return sum(self.bytes(trial.images, self.sections[trial.student].labels).values())

    def bytes(self, condensed: CondensedSet, labels: str) -> dict[str, int]:
        """What a student with this source of labels downloads: images, labels, views, observers' weights."""
        return condensed.sizes(labels) | {"observers": self.teachers.bytes if labels == "online" else 0}

    def read_bytes(self, trial: Trial, section: Evaluation) -> dict[str, int] | None:
        """What a row's images and labels take, as `bytes` has it; of the whole real set nobody knows."""
        row = ROWS[trial.row]
        if row.images == "whole":
            return None
        if row.images == "real":
            return {"images": self._of_equal_bytes(trial)[1], "labels": 0, "views": 0, "observers": 0}
        sizes = self.bytes(trial.images, section.labels)
        if row.mixed and self.sections[trial.student].labels == "stored":
            sizes["views"] = trial.images.sizes("stored")["views"]  # they say how images are mixed
        return sizes

    def _of_equal_bytes(self, trial: Trial) -> tuple[Tensor, int]:
        """Rows and bytes, encoded once for all students and both variants of a row; sets share their encoding."""
        key = self.budget(trial), trial.seed
        if key not in self._equal:
            self._equal[key] = equal_bytes(self.real(), key[0], self.images, trial.seed)
        return self._equal[key]


def equal_bytes(real: RealSet, budget: int, section: Images, seed: int) -> tuple[Tensor, int]:
    """Random real images, of each class as many or one more, whose files fill `budget` bytes; one a class at least.

    Returns their rows and the bytes of their files.
    """
    generator = work.generator(seed, "students", "real images of equal bytes")
    orders = [real.rows(label) for label in range(len(real.names))]
    orders = [rows[torch.randperm(len(rows), generator=generator)] for rows in orders]
    turn = torch.cat([torch.arange(len(rows)) for rows in orders])
    turns = torch.cat(orders)[turn.argsort(stable=True)]  # one of each class, then the next of each
    sizes: list[int] = []
    ahead = FEW
    while len(sizes) < len(turns) and (sum(sizes) <= budget or len(sizes) < len(orders)):
        real.keep(turns[:ahead])  # a stream is read once for all of them
        for rows in turns[len(sizes) : ahead].split(FEW):
            sizes += map(len, encoding.encode(real.images(rows), section))
        ahead = max(len(orders), int(1.05 * len(sizes) * budget / sum(sizes))) + FEW  # by what they took so far
    fit = int((torch.tensor(sizes).cumsum(0) <= budget).sum())
    count = max(fit, len(orders))
    return turns[:count], sum(sizes[:count])


def check_memory(
    real: RealSet, *, whole: bool, budget: int, section: Images, trainings: int, device: torch.device
) -> None:
    """Raises InputError where images do not fit in memory, once in each process that trains on them.

    Args: whole: all of them are wanted, and not those of `budget` bytes alone; trainings: of students on real images.
    """
    rows = real.rows()
    refused = _beyond(len(rows), real.size, trainings, device)
    if refused and whole:
        raise InputError(f"upper_bound: the real set {refused}; leave it out, or use a machine with more")
    if refused:  # the files of a few images tell how many there will be
        files = encoding.encode(real.images(rows[:FEW]), section)
        count = min(len(rows), budget * len(files) // sum(map(len, files)))
        if refused := _beyond(count, real.size, trainings, device):
            what = "as much of the real set as fits in the set's bytes"
            raise InputError(f"controls: {what} {refused}; leave out real, or use a machine with more")


def _beyond(count: int, side: int, trainings: int, device: torch.device) -> str | None:
    size = count * 3 * side**2
    needed, free = size * min(launch.local_processes(), trainings), psutil.virtual_memory().available
    if device.type == "cuda" and (on_device := torch.cuda.mem_get_info(device)[0]) < size:
        needed, free = size, on_device
    if needed <= free:
        return None
    return f"takes {needed / 1e9:.1f} GB of memory at {side} px and {free / 1e9:.1f} GB are free"
