"""From a command line to a running process: status codes, devices, threads, the process group."""

import ctypes
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from . import disk, documents, keys, methods, recipes
from .errors import STOPPED, InputError, OtherStopped
from .recipe import Recipe


if TYPE_CHECKING:  # torch is imported once a recipe is known to be right
    from .realset import RealSet
    from .work import Session


def status(command: Callable[[], None]) -> int:
    """Runs a command: 0 done, 2 the user's input is wrong (one line, no traceback), 1 anything else, 130 stopped."""
    try:
        command()
        sys.stdout.flush()
    except InputError as error:
        message = f"edc-hub: error: {' '.join(str(error).split())}"
        print(message, file=sys.stderr, flush=True)
        _tell_launcher(message)
        return 2
    except OtherStopped:
        print("edc-hub: another process of this run has stopped; its message says why", file=sys.stderr, flush=True)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has left; say nothing at exit
        return 0
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr, flush=True)
        return 130
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def entry(command: Callable[[list[str]], None]) -> Callable[..., int]:
    """The function `main(argv)` of a command's module, with the process's own arguments where none are given."""

    def main(argv: list[str] | None = None) -> int:
        """Runs the command; returns its exit status (0, 1, 2)."""
        return status(lambda: command(sys.argv[1:] if argv is None else argv))

    return main


def _tell_launcher(message: str) -> None:
    """Leaves the message where torchrun looks for it, so that the last lines it prints say what is wrong."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        content = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        try:
            Path(file).write_text(json.dumps({"message": content}), encoding="utf-8")
        except OSError:
            pass  # it is on stderr already


def is_first() -> bool:
    """Whether this is the process that reports and locks; known before the process group starts."""
    return os.environ.get("RANK", "0") == "0"


def run_folder(recipe: Recipe) -> Path:
    """The folder of a run, `runs/<name>-<method>-ipc<ipc>` unless `output_dir` says otherwise."""
    method = methods.slug(recipe.method)
    return disk.local(recipe.output_dir or f"runs/{recipe.name}-{method}-ipc{recipe.ipc}", "output_dir")


def artifacts(recipe: Recipe) -> Path:
    """What runs share: the folder `artifacts` beside the run."""
    return disk.beside(run_folder(recipe)) / "artifacts"


def refuse_what_is_not_ours(folder: Path) -> None:
    """A run replaces its own files and nobody else's. Raises InputError naming what it did not make."""
    if (folder / "manifest.json").exists():
        raise InputError(f"output_dir: {folder} is a data set, and a run keeps its own in dataset/; choose another")
    # not those that begin with a dot: a killed run leaves what it was building
    sets = [folder / "dataset", folder / "controls/initial", *sorted((folder / "controls/random").glob("[!.]*"))]
    filled = [place for place in sets if place.is_dir() and any(place.iterdir())]
    others = [place for place in filled if not (place / "manifest.json").exists()]
    file = folder / "recipe.yaml"
    if file.is_file() and recipes.load(file).get("resolved") is not True:
        others.append(file)
    if others:
        raise InputError(f"output_dir: {others[0]} is not of a run and would be replaced; choose another output_dir")


def refuse_another_recipe(recipe: Recipe, path: Path, run: Path | None = None) -> None:
    """A finished set is never overwritten by another recipe's. Raises InputError naming the first keys that differ.

    `path` is the recipe that the set carries, without the folders of local files; `run`, where given, that of its run
    folder, which has them. A key that an earlier release did not have counts as its default: rows that then come out
    otherwise are refused when they are written.
    """
    if not path.is_file():
        return

    default = keys.leaves(Recipe().model_dump(), Recipe)

    def differing(file: Path, text: str) -> list[str]:
        theirs, ours = (keys.leaves(each, Recipe) for each in (recipes.load(file), documents.read(text, "recipe")))
        return [key for key in sorted(theirs | ours) if theirs.get(key, default.get(key)) != ours.get(key)]

    changed = differing(path, recipes.published(recipe))
    if run and run.is_file():
        whole = differing(run, recipes.dump(recipe))
        changed += [key for key in whole if key not in changed and key.partition(".")[0] not in methods.RUNTIME]
    if changed:
        more = f" and {len(changed) - 3} more keys" if len(changed) > 3 else ""
        raise InputError(
            f"output_dir: {path.parent} is finished and differs in {', '.join(changed[:3])}{more}; give this run "
            "another output_dir (what both share is found again beside it)"
        )


def images(recipe: Recipe, folder: Path, real: "RealSet | None" = None) -> "RealSet":
    """The training split that a run condenses, opened where it is not given; of a finished run the images it had, so
    that the same command finds it whatever was committed since.

    Raises InputError where a finished run had others.
    """
    from . import manifest, source

    made, section = manifest.there(folder / "dataset").get("source"), recipe.source
    if made is None or (real and real.fingerprint == made["fingerprint"]):
        return real or source.load(section)
    if made["commit"] and made["id"] == section.path:
        with suppress(InputError):  # no longer there
            real = source.load(section.model_copy(update={"revision": made["commit"]}))
    real = real or source.load(section)
    if real.fingerprint == made["fingerprint"]:
        return real
    raise InputError(
        f"output_dir: {folder} is finished, of other images than {real.id} has now; give this run another output_dir"
    )


@contextmanager
def lock(folder: Path, waits: "Callable[[str], None] | None" = None) -> Iterator[None]:
    """Keeps a run folder for this command; the first process holds the lock for all of them, as `disk.lock` has it."""
    with disk.lock(folder, waits) if is_first() else nullcontext():
        yield


def make(recipe: Recipe, folder: Path, job: "Callable[[Session], Path]") -> None:
    """Runs `job` with the run folder kept for it, prints the dataset folder that it returns, and publishes that where
    `hub.push` says so; what the Hub would refuse is found before the job."""
    publishes = recipe.hub.push and is_first()
    if publishes:
        from . import publish

        publish.before(recipe, folder / "dataset")
    with lock(folder), session(recipe, artifacts(recipe)) as running:
        dataset = job(running)
        if running.state.is_main_process:
            print(dataset)
    if publishes:
        publish.push(dataset, **recipe.hub.model_dump(exclude={"push"}))


def begin(recipe: Recipe, folder: Path, running: "Session") -> None:
    """Writes the resolved recipe into the run folder, and removes what killed processes left among its artefacts.

    The recipe of a finished run stays until it is known to give the same set.
    """
    from . import manifest

    if running.state.is_main_process:
        disk.sweep(artifacts(recipe))
        if not manifest.there(folder / "dataset"):
            keep(recipe, folder)


def keep(recipe: Recipe, folder: Path) -> None:
    """Writes the resolved recipe into the run folder."""
    disk.write_text(folder / "recipe.yaml", recipes.dump(recipe))


@contextmanager
def session(recipe: Recipe, store_root: Path) -> Iterator:
    """Device, threads and process group as the recipe asks; yields a `work.Session`.

    Errors: a device that is absent. Processes take the GPUs in turn, and share them where there are fewer. The process
    group waits for days: a rank may wait for another's slow unit.
    """
    import torch
    from accelerate import PartialState

    from .work import Session, Store

    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device: cuda is asked for and torch sees none; write --device cpu or --device auto")
    cpu = recipe.device == "cpu" or not torch.cuda.is_available()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS has none
    # accelerate and torchrun leave one thread a process on a CPU machine
    torch.set_num_threads(recipe.threads or max(1, cores // local_processes()))
    torch.backends.cudnn.deterministic = True  # the same command gives the same bytes
    _quiet()
    if cpu:
        keep_freed_memory()
    # processes exchange a few bytes and no tensors of a network, so that several may share a GPU, which NCCL refuses
    options = {"backend": "gloo", "timeout": timedelta(days=7)} if "LOCAL_RANK" in os.environ else {}
    state = PartialState(cpu=cpu, **options)
    yield Session(
        store=Store(store_root),
        state=state,
        device=state.device,
        dtype=getattr(torch, recipe.precision),
        checkpoint_seconds=recipe.checkpoint_seconds,
        progress=_progress(),
    )
    # not after an error: others may be in a barrier, to be ended by the launcher
    state.destroy_process_group()


def _progress() -> Literal["bars", "lines", "none"]:
    from huggingface_hub import constants  # which reads 0 as on

    if constants.HF_HUB_DISABLE_PROGRESS_BARS:
        return "none"
    return "bars" if sys.stderr.isatty() else "lines"


def local_processes() -> int:
    """Processes of this command on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def device_name(running: "Session") -> str:
    """What a session works on: the GPU's name, or the processor's."""
    import torch

    gpu = running.device.type == "cuda"
    return torch.cuda.get_device_name(running.device) if gpu else platform.processor() or platform.machine()


def machine(running: "Session") -> dict[str, dict[str, Any]]:
    """The hardware, but for the device, and the versions that a student is trained with here."""
    import torch

    from .manifest import version

    counts = {"processes": running.state.num_processes, "threads": torch.get_num_threads(), "cores": os.cpu_count()}
    versions = {name: version(name) for name in ("torch", "timm", "transformers", "datasets")}
    return {"hardware": counts, "versions": versions}


def emulates_bfloat16() -> bool:
    """Whether this CPU has no instructions for it: ConvNet-3's training step takes 4.6 s there, 0.3 s in float32."""
    import torch

    return torch.backends.mkldnn.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def keep_freed_memory() -> None:
    """Lets glibc keep what large tensors leave free.

    It would give every one back to the kernel and have the next one's pages zeroed again: a quarter of the time of a
    ConvNet's training step on a CPU.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:  # another C library, another system
        return
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    libc.mallopt(m_mmap_threshold, 1 << 30)
    libc.mallopt(m_trim_threshold, (1 << 31) - 1)


def _quiet() -> None:
    """Libraries report on the first process only, and below it nothing that a user must not act on."""
    from datasets.utils import logging

    logging.set_verbosity_warning() if is_first() else logging.set_verbosity_error()
    logging.disable_progress_bar()
