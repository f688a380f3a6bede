"""YAML files as plain values, and back."""

import contextlib
import copy
import functools
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from .errors import InputError


def load(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read as text: {why}; give a YAML file in UTF-8") from error
    found = copy.deepcopy(_parsed(text, str(path)))
    if found is None:
        raise InputError(
            f"{path}: the file is empty; write e.g. 'name: mine' and a section 'source:', as in recipes/digits.yaml"
        )
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected keys and values, got a {type(found).__name__}; write e.g. 'ipc: 10'")
    return found


class _Reading:
    """YAML 1.1 as people mean it: 2e-5 is a number, and a key given twice is an error."""

    def construct_scalar(self, node: yaml.ScalarNode) -> Any:
        if "\0" in (found := super().construct_scalar(node)):
            raise yaml.constructor.ConstructorError(None, None, "a text with a zero byte", node.start_mark)
        return found

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key '{key.value}' is given twice; keep one", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Writing:
    """Block style, with lists of plain values on one line; quotes what `_Reading` would take for a number."""

    def represent_sequence(self, tag, sequence, flow_style=None):
        return super().represent_sequence(tag, sequence, not any(isinstance(item, dict) for item in sequence))

    def ignore_aliases(self, data):
        return True


class Loader(_Reading, yaml.SafeLoader):
    """Reads all of it, and says what is wrong."""


class Dumper(_Writing, yaml.SafeDumper):
    """Decides how a text is written."""


class _FastLoader(_Reading, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """libyaml's, where PyYAML has it: it takes no {args:{}} but a tab where PyYAML's own takes none, and says less."""


class _FastDumper(_Writing, getattr(yaml, "CSafeDumper", yaml.SafeDumper)):
    """libyaml's, where PyYAML has it: it escapes more, and writes empty, long and broken keys in its own way."""


for _class in (Loader, Dumper, _FastLoader, _FastDumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


@functools.lru_cache(64)
def _parsed(text: str, origin: str) -> Any:
    """A method's file is read again for each recipe that is resolved, and for each method that stands on it."""
    return read(text, origin)


def read(text: str, origin: str) -> Any:
    """YAML text as plain values. InputError naming `origin` and the line."""
    with contextlib.suppress(yaml.YAMLError, ValueError, RecursionError):
        return yaml.load(text, _FastLoader)
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise InputError(f"{origin}: broken YAML: {line}{problem}; check quotes, colons and indentation") from error


def write(content: Any) -> str:
    """Plain values as YAML text that `read` gives back."""
    dump = functools.partial(yaml.dump, content, sort_keys=False, allow_unicode=True, width=2**16)
    with contextlib.suppress(UnicodeEncodeError):  # a path that is no UTF-8
        text = dump(Dumper=_FastDumper)
        if not any(sign in text for sign in ("\\", "? ", "'':")):
            return text
    return dump(Dumper=Dumper)
