"""Units of work: the one mechanism behind resume, sharing between runs, and equal bytes for any number of processes.

A stage is a list of units and a function that makes one. A unit is one file, named by a fingerprint of everything
that decides its content, made with a generator of its own. A process takes every `num_processes`-th missing unit, so
nothing depends on who made what; a file appears by a rename, so it is there whole or not at all.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import std
from tqdm.auto import tqdm

from .disk import write_atomically
from .errors import InputError, OtherFailed, OtherStopped


MINUTE = 60.0  # seconds between two lines of progress in a log


class Lines(std.tqdm):
    """Progress where no terminal draws a bar: a line a minute, and none of what is done sooner."""

    def __init__(self, *arguments: Any, **options: Any):
        self._last = time.monotonic()
        super().__init__(*arguments, delay=MINUTE, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if msg is None and time.monotonic() - self._last >= MINUTE:
            self._last = time.monotonic()
            self.fp.write(f"{self}\n")
            self.fp.flush()

    def close(self) -> None:
        self.delay = float("inf")  # tqdm clears what was drawn since then
        super().close()


class Unit(NamedTuple):
    """One file of a stage: `artifacts/<stage>/<name>-<fingerprint>.safetensors`."""

    stage: str
    name: str
    fingerprint: str


def fingerprint(stage: str, version: int, **inputs: Any) -> str:
    """16 hex digits that stand for `inputs` (plain JSON values) and the version of the stage's code."""
    text = json.dumps({"stage": stage, "version": version, **inputs}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def generator(seed: int, stage: str, unit: str) -> torch.Generator:
    """A CPU generator that depends on (seed, stage, unit) alone, never on the process or the order of work."""
    digest = hashlib.sha256(f"{seed}/{stage}/{unit}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class Store:
    """Finished units in a folder of safetensors files, shared by runs and processes, never overwritten."""

    def __init__(self, root: Path):
        self.root = root

    def path(self, unit: Unit) -> Path:
        return self.root / unit.stage / f"{unit.name}-{unit.fingerprint}.safetensors"

    def has(self, unit: Unit) -> bool:
        return self.path(unit).exists()

    def save(self, unit: Unit, tensors: dict[str, Tensor], facts: dict | None = None) -> None:
        """Writes `tensors` and a dictionary of JSON facts. One metadata key: several have no fixed order on disk."""
        facts = {"facts": json.dumps(facts or {}, sort_keys=True)}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_atomically(self.path(unit), lambda path: save_file(tensors, path, metadata=facts))

    def open(self, unit: Unit) -> safe_open:
        """The safetensors handle, for `with`: `.keys()`, `.get_tensor(name)`, `.get_slice(name)[a:b]`."""
        return _open(self.path(unit))

    def load(self, unit: Unit) -> dict[str, Tensor]:
        with self.open(unit) as file:
            return _tensors(file)

    def facts(self, unit: Unit) -> dict:
        with self.open(unit) as file:
            return json.loads(file.metadata()["facts"])


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise InputError(f"{path}: no whole file ({error}); remove it and give the same command again") from error


def _tensors(file: safe_open) -> dict[str, Tensor]:
    return {name: file.get_tensor(name) for name in file.keys()}


class Kept(Store):
    """The artefacts of a finished run, of which none may be made anew."""

    def has(self, unit: Unit) -> bool:
        """True. Raises InputError where the unit is missing."""
        if not super().has(unit):
            raise InputError(
                f"run: {unit.stage}/{unit.name} is not in {self.root}, where the run's artefacts are looked for; give "
                "the command where the run was condensed, on the same kind of device, or condense it again"
            )
        return True


class Progress:
    """Saves inside one long unit, so that a killed run loses at most `seconds` of it.

    The saved state must be all that the rest of the unit depends on, so that resumed and undisturbed work agree to
    the bit. When a save is due depends on the clock; what is computed does not.
    """

    def __init__(self, path: Path, seconds: float, saved: Callable[[], None] = lambda: None):
        self.path, self.seconds, self.saved, self.start = path, seconds, saved, time.monotonic()
        self.last = self.start

    @property
    def elapsed(self) -> float:
        """Seconds that the unit took, with those of a killed run up to its last save."""
        return time.monotonic() - self.start

    def load(self) -> dict[str, Tensor] | None:
        if not self.path.exists():
            return None
        with _open(self.path) as file:
            self.start -= float((file.metadata() or {}).get("seconds", 0))
            return _tensors(file)

    def save(self, state: Callable[[], dict[str, Tensor]]) -> None:
        """Saves `state()` if a save is due."""
        if time.monotonic() - self.last < self.seconds:
            return
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state().items()}
        spent = {"seconds": str(self.elapsed)}
        write_atomically(self.path, lambda path: save_file(tensors, path, metadata=spent))
        self.saved()
        self.last = time.monotonic()


@dataclass
class Session:
    """What every stage needs of the process it runs in."""

    store: Store
    state: PartialState
    device: torch.device
    dtype: torch.dtype = torch.float32  # asked of the networks; moments and images stay float32
    checkpoint_seconds: float = 60.0
    progress: Literal["bars", "lines", "none"] = "bars"
    saved: Callable[[], None] = lambda: None  # called when work is on the disk: a unit, or a save inside one

    def bar(self, iterable: Any = None, **options: Any) -> tqdm:
        """A progress bar on stderr, or lines of a log, on the main process only."""
        kind = Lines if self.progress == "lines" else tqdm
        return kind(iterable, disable=self.progress == "none" or not self.state.is_main_process, **options)

    @property
    def arithmetic(self) -> torch.dtype:
        """That of the networks: `dtype` on an accelerator, float32 on a CPU."""
        return torch.float32 if self.device.type == "cpu" else self.dtype

    @property
    def precision(self) -> str:
        """`arithmetic` as the recipe names it."""
        return str(self.arithmetic).removeprefix("torch.")

    def autocast(self) -> torch.autocast:
        """Mixed precision where `precision` asks for it and the device is an accelerator."""
        return torch.autocast(self.device.type, dtype=self.arithmetic, enabled=self.arithmetic != torch.float32)

    def with_precision(self, name: str) -> "Session":
        """This one, but for the arithmetic of the networks, named as in a recipe."""
        return replace(self, dtype=getattr(torch, name))

    def own_draws(self) -> AbstractContextManager:
        """What is drawn inside without a generator, as dropout draws, changes nothing outside."""
        return torch.random.fork_rng([self.device] if self.device.type == "cuda" else [])

    def wait(self, failed: Exception | None = None) -> None:
        """Until every process is here, wherever in the work that is; `failed`: why this one does no more of it.

        Raises OtherFailed where another one came with an error, OtherStopped where one never will come.
        """
        mine = failed and (isinstance(failed, InputError), str(failed))
        try:  # and not a barrier: accelerate's names a GPU of this process's own, and there may be fewer
            told = [theirs for theirs in gather_object([mine]) if theirs]
        except RuntimeError as error:  # the connection to it is lost
            raise OtherStopped(str(error)) from error
        if told and not failed:
            of_input, text = told[0]
            raise OtherFailed(InputError(text) if of_input else RuntimeError(text))

    def report(self, text: str) -> None:
        """A line of prose on stderr, from the main process."""
        if self.state.is_main_process:
            tqdm.write(text, file=sys.stderr)


Make = Callable[[Unit, torch.Generator, Progress], tuple[dict[str, Tensor], dict]]


def present(units: list[Unit], session: Session) -> list[bool]:
    """Whether each unit is there, as the first process sees it: another run may finish one between two looks."""
    session.wait()  # one that has failed meets the others in no other exchange
    there = torch.tensor([session.store.has(unit) for unit in units]).byte()
    return [bool(found) for found in broadcast(there).tolist()]


def run(units: list[Unit], make: Make, session: Session, *, seed: int, label: str) -> int:
    """Makes the units that are missing, sharded over the processes, and waits until all are there.

    `make(unit, generator, progress)` returns the unit's tensors and a dictionary of JSON facts about it. Returns how
    many units were missing.
    """
    state, store = session.state, session.store
    missing = [unit for unit, there in zip(units, present(units, session), strict=True) if not there]
    session.wait()  # all have looked before the first writes
    mine = missing[state.process_index :: state.num_processes]
    for unit in session.bar(mine, desc=label, unit="unit"):
        path = store.path(unit)
        progress = Progress(path.with_suffix(".progress"), session.checkpoint_seconds, session.saved)
        if not store.has(unit):  # another run may have made it meanwhile
            store.save(unit, *make(unit, generator(seed, unit.stage, unit.name), progress))
            session.saved()
        progress.path.unlink(missing_ok=True)
    session.wait()
    return len(missing)
