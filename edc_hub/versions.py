"""Version numbers of what is published: schema = major, data = minor, card or results = patch."""

import json
import re
from typing import Any


NUMBERED = re.compile(r"v(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)")


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
    major = str(manifest.get("format_version")).split(".")[0]
    codec = manifest.get("soft_labels", {}).get("codec")
    return {"columns": [major, codec, manifest.get("classes")], "configs": set(manifest.get("configs", {}))}
