"""Files that others see whole or not at all, locks, and what a disk refuses in one line."""

import errno
import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from .errors import InputError


_UMASK = os.umask(0)
os.umask(_UMASK)
FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
REFUSED = {
    **FULL,
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.EFBIG: "the file is larger than this disk or process may write",
}
_NO_PATH = {
    errno.ENOTDIR: "a part of the path is a file",
    errno.EEXIST: "a part of the path is a file",
    errno.ENAMETOOLONG: "a name in it is too long",
}


def local(path: str | Path, key: str) -> Path:
    """`path` with ~ as a home folder. InputError naming `key` where that is nobody's, or no disk can have the name."""
    try:
        found = os.path.expanduser(path)
        os.stat(found)
    except ValueError as error:
        raise InputError(f"{key}: {str(path)[:60]!r} is no path: {error}; write another") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise InputError(f"{key}: {str(path)[:60]!r}… is too long for a path; write a shorter one") from error
    if found.startswith("~"):
        raise InputError(f"{key}: no home folder for {found}; write the path in full, or ./{found} for one here")
    return Path(found)


def beside(folder: Path) -> Path:
    """The folder that `folder` lies in, which `.parent` of . and .. does not name."""
    return (folder if folder.name not in ("", "..") else Path(os.path.abspath(folder))).parent


def temporary(path: Path) -> Path:
    """A name beside `path` that carries host and process, for writing before a rename."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


def write_atomically(path: Path, write: Callable[[Path], None], key: str = "output_dir") -> None:
    """Calls `write` with a temporary name and renames. OSErrors of the disk are said as `disk_errors` says them."""
    part = temporary(path)
    try:
        with disk_errors(path, key):
            path.parent.mkdir(parents=True, exist_ok=True)
            write(part)
            part.chmod(0o666 & ~_UMASK)  # safetensors makes files that only their owner may read
            with open(part, "rb") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
    finally:
        try:
            part.unlink(missing_ok=True)
        except OSError:
            pass  # a read-only disk, reported above


def write_text(path: Path, text: str) -> None:
    """The same of a text, in UTF-8."""
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def json_of(path: Path) -> dict[str, Any]:
    """The content of a JSON file; empty where it is missing or damaged: what is measured is never lost to it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def sha256(path: Path) -> str:
    """Of the bytes of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def disk_errors(path: Path, key: str = "output_dir") -> Iterator[None]:
    """OSErrors of the disk inside become an InputError naming `path`, and `key` that says where it lies."""
    try:
        yield
    except Exception as error:
        disk = _disk_error(error, key)
        if disk is None:
            raise
        raise InputError(f"{key}: cannot write {path}: {disk}") from error


def _disk_error(error: Exception, key: str = "output_dir") -> str | None:
    known = REFUSED | _NO_PATH
    # safetensors writes in Rust and reports its I/O errors as text
    code = error.errno if isinstance(error, OSError) else next((c for c in known if f"os error {c})" in str(error)), 0)
    remedy = "free some space and run the same command again" if code in FULL else f"choose another {key}"
    return f"{known[code]}; {remedy}" if code in known else None


def sweep(root: Path) -> None:
    """Removes the temporary files that dead processes of this host left below `root`."""
    ours = re.compile(rf".*\.(safetensors|progress)\.{re.escape(socket.gethostname())}\.(\d{{1,9}})\.tmp")
    for path in root.rglob(".*.tmp"):
        if (found := ours.fullmatch(path.name)) and not psutil.pid_exists(int(found[2])):
            path.unlink(missing_ok=True)


@contextmanager
def turn(run: Path) -> Iterator[None]:
    """Waits for its turn to change the results and the card of a finished run: several commands measure one set."""
    held = FileLock(run / ".results.lock", mode=0o666 & ~_UMASK)
    with disk_errors(run):
        held.acquire()
    try:
        yield
    finally:
        held.release()


def _owner(file: Path) -> str:
    try:
        other = json.loads(file.read_text())
    except (OSError, ValueError):  # it has just begun, or just ended
        other = {"host": "?", "pid": "?", "since": "?"}
    return f"process {other['pid']} on {other['host']} since {other['since']}"


@contextmanager
def lock(folder: Path, waits: Callable[[str], None] | None = None) -> Iterator[None]:
    """Keeps `folder` for this process. A second writer is refused with the first one's name; one that gives `waits`
    tells it of the first, and waits."""
    owner = folder / ".lock.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = FileLock(folder / ".lock")
        try:
            held.acquire(timeout=0)
        except Timeout:
            others = f"{folder} is being written by {_owner(owner)}"
            if waits is None:
                raise InputError(f"output_dir: {others}; wait for it or choose another output_dir") from None
            waits(f"{others}; waiting for it")
            held.acquire()
        me = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        write_text(owner, json.dumps(me))
    except OSError as error:
        reason = _disk_error(error) or f"{error}; choose another output_dir"
        raise InputError(f"output_dir: cannot write {folder}: {reason}") from error
    try:
        yield
    finally:
        try:
            owner.unlink(missing_ok=True)
        except OSError:
            pass  # the disk went away, which the error under way says
        held.release()
