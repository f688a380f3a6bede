"""What `condense` and `relabel` share once there are images: controls, labels, dataset folders, what was measured."""

import json
import os
import platform
import resource
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import canvas, disk, encoding, initialize, labels, launch, recipes, work, writing
from .initialize import Initial
from .manifest import version
from .observers import Observers
from .realset import RealSet
from .recipe import Recipe
from .work import Session


class Pictures(NamedTuple):
    """A set of images to be labelled and written: the condensed ones, or those of a control."""

    label: str
    place: Path
    images: Tensor  # uint8 (N, 3, s, s), canvases where `images.grid` says so
    initial: Initial
    control: str | None
    origin: dict | None = None  # of images that were not made here
    epochs: int | None = None  # label epochs of a control: those of its set


def controls(recipe: Recipe, real: RealSet, initial: Initial, folder: Path, epochs: int) -> Iterator[Pictures]:
    """What synthesis is held against: the images it started from, and draws of random real images.

    They are labelled for as many `epochs` as the set.
    """
    place = folder / "controls" / "initial"
    yield Pictures("control initial", place, initial.images, initial, "initial", epochs=epochs)
    generators = [work.generator(recipe.seed, "random", str(draw)) for draw in range(recipe.relabel.random_draws)]
    tiles = recipe.images.grid**2
    draws = [initialize.random_rows(real, recipe.ipc * tiles, generator) for generator in generators]
    real.keep(torch.cat(draws))  # a stream is read once for all of them
    for draw, rows in enumerate(draws):
        images = canvas.compose(real.images(rows), recipe.images.grid)
        start = Initial(images, rows.int().view(-1, tiles), "")
        place = folder / "controls" / "random" / str(draw)
        yield Pictures(f"control random {draw}", place, start.images, start, "random", epochs=epochs)


def control_folders(run: Path, kind: str) -> list[Path]:
    """The finished sets of control `kind` (`initial` or `random`) of a run, draws in order."""
    folder = run / "controls" / kind
    places = [folder] if kind == "initial" else sorted(folder.glob("[0-9]*"), key=lambda path: int(path.name))
    return [place for place in places if (place / "manifest.json").is_file()]


def label_and_write(
    recipe: Recipe, real: RealSet, watching: Observers, pictures: Pictures, session: Session
) -> tuple[bool, int]:
    """Encodes the images, labels what a reader will decode, writes the dataset folder.

    Returns whether it was not there, on the main process, and the label epochs.
    """
    files = encoding.encode(pictures.images, recipe.images)
    soft = labels.obtain(recipe, encoding.decode(files), watching, session, pictures.label, epochs=pictures.epochs)
    wrote = False
    if session.state.is_main_process:
        wrote = writing.write(
            pictures.place,
            recipe=recipe,
            files=files,
            initial=pictures.initial,
            real=real,
            labels=soft,
            observers=watching,
            control=pictures.control,
            origin=pictures.origin,
        )
    session.wait()
    return wrote, soft.epochs


class Clock:
    """Times the stages: a line on stderr for each, and `seconds` for run.json."""

    def __init__(self, session: Session):
        self.session, self.saved, self.seconds, self.file = session, time.monotonic(), {}, None

    def resume(self, recipe: Recipe, folder: Path) -> None:
        """Adds what earlier calls of this very recipe spent in a run folder, of a killed one up to its last save."""
        if not self.session.state.is_main_process:
            return
        self.file, written = folder / ".seconds.json", folder / "recipe.yaml"
        if written.is_file() and written.read_text("utf-8") == recipes.dump(recipe):
            earlier = disk.json_of(self.file) or disk.json_of(folder / "run.json").get("seconds", {})
            for stage, seconds in earlier.items():
                self.seconds[stage] = round(self.seconds.get(stage, 0) + seconds, 2)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start, before = time.monotonic(), self.seconds.get(stage, 0)

        def keep() -> None:
            now = time.monotonic()
            self.seconds[stage] = round(before + now - start, 2)
            if self.file and now - self.saved >= self.session.checkpoint_seconds:
                disk.write_text(self.file, json.dumps(self.seconds))
                self.saved = now

        self.session.saved = keep
        yield
        keep()
        self.session.saved = lambda: None
        self.session.report(f"{stage:<20}{time.monotonic() - start:>10.1f} s")


def finish(
    recipe: Recipe,
    real: RealSet,
    watching: Observers,
    made: Pictures,
    clock: Clock,
    session: Session,
    *,
    alike: RealSet | None = None,
) -> Path:
    """Labels and writes the set of a run and its controls, then recipe.yaml and run.json; says where the set is.

    Args: alike: the real images as large as those of the set, where `real` has others. Returns the dataset folder.
    """
    alike, folder = alike or real, made.place.parent
    with clock(made.label):
        wrote, epochs = label_and_write(recipe, real, watching, made, session)
    for each in controls(recipe, alike, made.initial, folder, epochs) if recipe.relabel.controls else ():
        if each.control == "random" or not made.origin:  # what others' images started from nobody knows
            with clock(each.label):
                wrote |= label_and_write(recipe, alike, watching, each, session)[0]
    if session.state.is_main_process:
        launch.keep(recipe, folder)
        if wrote or not (folder / "run.json").exists():  # else all was there, and the times are of finding it
            _write_facts(real, clock, folder, session)
        clock.file.unlink(missing_ok=True)
        _say_where(recipe, real, made.place, session)
    return made.place


def _write_facts(real: RealSet, clock: Clock, folder: Path, session: Session) -> None:
    """Writes run.json, what the calls of this run measured; of what another run made, the time of finding it."""
    gpu = session.device.type == "cuda"
    facts = {
        "seconds": clock.seconds,
        "processes": session.state.num_processes,
        "threads": torch.get_num_threads(),
        "device": launch.device_name(session),
        "cores": os.cpu_count(),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "peak_gpu_memory_gb": round(torch.cuda.max_memory_allocated() / 2**30, 2) if gpu else 0.0,
        "source": {"id": real.id, "commit": real.commit, "fingerprint": real.fingerprint},
        "versions": {name: version(name) for name in ("torch", "datasets", "transformers", "timm", "accelerate")},
        "python": platform.python_version(),
    }
    disk.write_text(folder / "run.json", json.dumps(facts, indent=2) + "\n")


def _say_where(recipe: Recipe, real: RealSet, dataset: Path, session: Session) -> None:
    """Says where the set is, its size, how to load it, and what comes next."""
    size = sum(path.stat().st_size for path in dataset.rglob("*") if path.is_file())
    count = len(real.names) * recipe.ipc
    session.report(
        f"\n{count} images, {size / 2**20:.1f} MiB in {dataset}\n"
        f'  from datasets import load_dataset\n  load_dataset("{dataset}", split="train")\n'
        f"  edc-hub evaluate --dataset {shlex.quote(str(dataset.parent))}"
    )
