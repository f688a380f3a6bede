"""A command line as recipe, overrides and flags."""

from collections.abc import Callable, Collection
from typing import Any, TypeVar

from . import disk, keys
from .documents import read
from .errors import InputError
from .section import Section


S = TypeVar("S", bound=Section)
_TRUTHS = ("true", "false", "yes", "no", "on", "off", "null", "0", "1")  # a switch's value, right or wrong; no recipe


def split(
    argv: list[str], root: type[Section], flags: dict[str, str]
) -> tuple[list[str], dict[str, Any], dict[str, bool]]:
    """Positional arguments, overrides of the keys of `root` nested like a file, and the given flags by name.

    A value is YAML; where a list belongs, `a,b` is one too. Raises InputError for a missing value, and for a flag that
    is none.
    """
    known = keys.table(root)
    named, overrides, given = [], {}, dict.fromkeys(flags, False)
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            named.append(word)
            continue
        path, equals, text = word[2:].partition("=")
        path = _underscored(path, {*known, *flags})
        switch = path in flags or (path in known and known[path].field.annotation is bool)
        if not equals:
            if switch and (not rest or rest[0].lower() not in _TRUTHS):
                text = "true"
            elif rest and not rest[0].startswith("--"):
                text = rest.pop(0)
            elif not switch and path not in known and "." not in path:
                raise InputError(f"--{path}: unknown key{keys.meant(path, root, flags)}")
            else:
                raise InputError(f"--{path}: a value is missing; write e.g. --{path} VALUE, or see --help")
        if path in flags:
            if text not in ("true", "false"):
                raise InputError(f"--{path}: expected true or false, got '{text}'; write --{path}")
            given[path] = text == "true"
            continue
        *above, last = path.split(".")
        place = overrides
        for name in above:
            place[name] = place.get(name) if isinstance(place.get(name), dict) else {}
            place = place[name]
        place[last] = _value(text, path, keys.describe(known[path].field.annotation) if path in known else "")
    return named, overrides, given


def _underscored(path: str, known: Collection[str]) -> str:
    """dry-run as dry_run. What stands below a key, as the name of a student in evaluation.per_student, stays."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        if (head := ".".join(parts[:count]).replace("-", "_")) in known:
            return ".".join([head, *parts[count:]])
    return path.replace("-", "_")


def help_asked(argv: list[str], text: Callable[[], str]) -> None:
    """Prints `text()` on stdout and exits with 0 where a command line asks for help."""
    if "--help" in argv or "-h" in argv:
        print(text(), flush=True)
        raise SystemExit(0)


def usage(head: str, root: type[Section], flags: dict[str, str]) -> str:
    """The text of `--help`: `head`, then each flag with its meaning, then every key of `root`."""
    shown = "\n".join(f"  --{name}  {meaning}" for name, meaning in flags.items())
    return "\n\n".join(filter(None, [head, shown, "\n".join(keys.help_lines(root))]))


def put_students(given: dict[str, Any], students: list[Any]) -> None:
    """`--students`, short for `evaluation.students`, into the keys that are given."""
    if not isinstance(given.setdefault("evaluation", {}), dict):
        raise InputError("evaluation: expected keys and values; write e.g. --evaluation.epochs 300")
    given["evaluation"].setdefault("students", students)  # a sweep's file may have these, a command line the others


def of_run(
    argv: list[str], command: str, root: type[S], words: str = "RUN", run: str = "the folder of a finished run"
) -> tuple[Any, ...]:
    """The folder, any further `words`, and the options of a command on a finished run, which is called `run`.

    `--help` prints to stdout and exits with 0.
    """
    head = f"usage: edc-hub {command} {words} [--key value ...]\n\nRUN is {run}."
    help_asked(argv, lambda: usage(head, root, {}))
    named, given, _ = split(argv, root, {})
    options = keys.validated(root, given)
    if len(named) != len(words.split()):
        asked, got = " and ".join(words.split()), " ".join(named) or "nothing"
        raise InputError(f"{command}: expected {asked}, got {got}; write edc-hub {command} {words}")
    return disk.local(named[0], command), *named[1:], options


def _value(text: str, path: str, kind: str) -> Any:
    if kind in ("text", "text or null"):
        return None if text == "null" else text  # a revision 12e45 or a folder 2024, whatever YAML takes it for
    listed = kind.startswith("list of") and not text.startswith(("[", "{", '"', "'")) and text != "null"
    if listed and kind in ("list of text", "list of text or null"):
        return [part.strip() for part in text.split(",") if part.strip()]  # *@4 is no alias of YAML's
    return read(f"[{text}]" if listed else text, f"--{path}")
