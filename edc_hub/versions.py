"""Versions of what is published: files and numbers; schema = major, data = minor, card or results = patch."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple


if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile


OBSERVERS = "observers.json"
"""Names the published weights of a set's observers: {observer: {"weights": …, "arch": …, "bytes": …}}."""

BESIDE = ("results.json", OBSERVERS, "assets/grid.png", "assets/curves.png")
"""What lies in a dataset folder beside what its manifest names."""

DATA = re.compile(r"(images|soft_labels\w*)/.+|.+\.safetensors")
NUMBERED = re.compile(r"v(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)")


def misnamed(id: str) -> str | None:
    """What is wrong with the name of a repository and what to write; None where it is one."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(id)
        reason = "" if "/" in id else "it names no owner"
    except HFValidationError as error:
        reason = str(error).partition(": '")[0].strip(".")
    return f"{id!r} is no name of a repository; write ORG/NAME ({reason})" if reason else None


class File(NamedTuple):
    """A file of a version; large ones stay on disk."""

    path: str
    content: bytes | Path
    size: int
    sha256: str

    @classmethod
    def read(cls, path: str, data: bytes) -> "File":
        return cls(path, data, len(data), hashlib.sha256(data).hexdigest())

    def is_in(self, tree: "dict[str, RepoFile]") -> bool:
        """Whether a commit of these files has this very one."""
        there = tree.get(self.path)
        if there is None or there.size != self.size:
            return False
        if there.lfs is not None:
            return there.lfs.sha256 == self.sha256
        data = self.content if isinstance(self.content, bytes) else self.content.read_bytes()
        return there.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # git's name of it


class Version(NamedTuple):
    """What is to be published, and where."""

    id: str
    type: str  # "dataset" or "model"
    mark: str  # the file that tells a repository of ours from other people's
    files: dict[str, File]
    card: Callable[[str], str] | None = None  # README.md as it follows the one that is there, with what people added


def number(tag: str) -> tuple[int, ...]:
    """(major, minor, patch) of a tag."""
    return tuple(map(int, NUMBERED.fullmatch(tag).groups()))


def following(tag: str, old: str | None, new: str, same_data: bool) -> str:
    """The version that follows `tag`.

    Args: old: text of its manifest, None where it has none; new: that of what follows; same_data: whether the data
    files are the same.
    """
    major, minor, patch = number(tag)
    if _breaks(old, new):
        return f"v{major + 1}.0.0"
    return f"v{major}.{minor}.{patch + 1}" if same_data else f"v{major}.{minor + 1}.0"


def _breaks(old: str | None, new: str) -> bool:
    """Whether who reads the old version may not be able to read the new one. A configuration more breaks nothing."""
    try:
        was, now = _schema(json.loads(old or "")), _schema(json.loads(new))
    except (ValueError, TypeError, AttributeError):
        return True
    return was["columns"] != now["columns"] or not was["configs"] <= now["configs"]


def _schema(manifest: dict[str, Any]) -> dict[str, Any]:
    major, soft = str(manifest.get("format_version")).split(".")[0], manifest.get("soft_labels", {})
    shape = [soft.get(key) for key in ("codec", "top_k", "rand_augment", "shuffle", "view_version")]
    return {"columns": [major, *shape, manifest.get("classes")], "configs": set(manifest.get("configs", {}))}
