"""From a command line to a running process: status codes, devices, threads, the process group."""

import ctypes
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

from .errors import InputError
from .recipe import Recipe


def status(command: Callable[[], None]) -> int:
    """Runs a command: 0 done, 2 the user's input is wrong (one line, no traceback), 1 anything else, 130 stopped."""
    try:
        command()
        sys.stdout.flush()
    except InputError as error:
        print(f"edc-hub: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has left; say nothing at exit
        return 0
    except KeyboardInterrupt:
        print("edc-hub: stopped; the same command goes on from here", file=sys.stderr, flush=True)
        return 130
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def is_first() -> bool:
    """Whether this is the process that reports and locks; known before the process group starts."""
    return os.environ.get("RANK", "0") == "0"


def run_folder(recipe: Recipe) -> Path:
    """The folder of a run, `runs/<name>-<method>-ipc<ipc>` unless `output_dir` says otherwise."""
    return Path(recipe.output_dir or f"runs/{recipe.name}-{recipe.method}-ipc{recipe.ipc}")


def artifacts(recipe: Recipe) -> Path:
    """What runs share: the folder `artifacts` beside the run."""
    return run_folder(recipe).parent / "artifacts"


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keeps a run folder for this command; the first process holds the lock for all of them."""
    from . import work

    with work.lock(folder) if is_first() else nullcontext():
        yield


@contextmanager
def session(recipe: Recipe, store_root: Path) -> Iterator:
    """Device, threads and process group as the recipe asks; yields a `work.Session`.

    Errors: a device that is absent. The process group waits for days: a rank may wait for another's slow unit.
    """
    import torch
    from accelerate import PartialState

    from .work import Session, Store

    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device: cuda is asked for and torch sees none; write --device cpu or --device auto")
    cpu = recipe.device == "cpu" or not torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # accelerate and torchrun leave one thread a process on a CPU machine
    torch.set_num_threads(recipe.threads or max(1, len(os.sched_getaffinity(0)) // local))
    _quiet()
    if cpu:
        keep_freed_memory()
    options = {"timeout": timedelta(days=7)} if "RANK" in os.environ else {}
    state = PartialState(cpu=cpu, **({"backend": "gloo"} if cpu and options else {}), **options)
    try:
        yield Session(
            store=Store(store_root),
            state=state,
            device=state.device,
            dtype=getattr(torch, recipe.precision),
            checkpoint_seconds=recipe.checkpoint_seconds,
            progress_bars=sys.stderr.isatty() and not os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS"),
        )
    finally:
        state.destroy_process_group()


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
    import datasets
    import transformers

    for library in (datasets, transformers):
        logging = library.utils.logging
        logging.set_verbosity_warning() if is_first() else logging.set_verbosity_error()
        logging.disable_progress_bar()
