"""From files and a command line to a recipe: field default < method < recipe < command line.

A method is a file of `recipes/methods`: a block `all`, then a block per recipe `name`; inside a block, `per_ipc`
holds values for single IPCs. `base: <method>` puts another method's blocks underneath.
"""

import copy
import difflib
import os
import re
import sys
from collections.abc import Hashable
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from . import keys
from .errors import InputError
from .recipe import Recipe, Section
from .rules import validate


_HERE = Path(__file__).parent
# in a wheel the recipes lie in the package, in a checkout beside it
ROOT = _HERE / "_shipped/recipes" if (_HERE / "_shipped").is_dir() else _HERE.parent / "recipes"

_FLAGS = {
    "dry_run": "print the plan and the projected time, write nothing",
    "print_recipe": "print the resolved recipe",
}
_TRUTHS = ("true", "false", "yes", "no", "on", "off", "null", "0", "1")  # a switch's value, right or wrong; no recipe
_RUNTIME = ("output_dir", "threads", "device", "checkpoint_seconds")  # change where and how fast, not what


class Parsed(NamedTuple):
    recipe: Recipe
    dry_run: bool
    print_recipe: bool


def parse(argv: list[str] | None, prog: str) -> Parsed:
    """The recipe and the flags of a command line. `--help` prints to stdout and exits with 0.

    Raises InputError on anything wrong, impossible combinations included.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(usage(prog), flush=True)
        raise SystemExit(0)
    named, overrides, flags = _split(argv)
    if len(named) != 1:
        got = f"got {len(named)}: {' '.join(named)}" if named else "none given"
        raise InputError(f"recipe: expected one, {got}; write e.g. edc-hub {prog} digits (there are: {_listing()})")
    return Parsed(resolve(load(find(named[0])), overrides), **flags)


def usage(prog: str) -> str:
    """The text of `--help`: every key with its type, default and meaning."""
    flags = "\n".join(f"  --{name}  {meaning}" for name, meaning in _FLAGS.items())
    head = (
        f"usage: edc-hub {prog} RECIPE [--section.key value ...]\n\n"
        f"RECIPE is a YAML file or one of: {_listing()}\n"
        f"A value is YAML: 2e-5, true, null, [0.5, 1.0], '[{{name: a, arch: resnet18}}]'; a list replaces the whole.\n"
        f"Method and recipe stand above the defaults shown here; --print_recipe shows what a run would use.\n\n"
        f"{flags}\n"
    )
    return "\n".join([head, *keys.help_lines()])


def _split(argv: list[str]) -> tuple[list[str], dict[str, Any], dict[str, bool]]:
    """Positional arguments, nested overrides, flags."""
    known = keys.table()
    named, overrides, flags = [], {}, dict.fromkeys(_FLAGS, False)
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            named.append(word)
            continue
        path, equals, text = word[2:].partition("=")
        path = path.replace("-", "_")
        switch = path in flags or (path in known and known[path].field.annotation is bool)
        if not equals:
            if switch and (not rest or rest[0].lower() not in _TRUTHS):
                text = "true"
            elif rest and not rest[0].startswith("--"):
                text = rest.pop(0)
            else:
                raise InputError(f"--{path}: a value is missing; write e.g. --{path} VALUE, or see --help")
        if path in flags:
            if text not in ("true", "false"):
                raise InputError(f"--{path}: expected true or false, got '{text}'; write --{path}")
            flags[path] = text == "true"
            continue
        if path in known and keys.describe(known[path].field.annotation) in ("text", "text or null"):
            value = None if text == "null" else text  # a revision 12e45 or a folder 2024, whatever YAML takes it for
        else:
            value = read(text, f"--{path}")
        *above, last = path.split(".")
        place = overrides
        for name in above:
            place[name] = place.get(name) if isinstance(place.get(name), dict) else {}
            place = place[name]
        place[last] = value
    return named, overrides, flags


# Files


def shipped() -> list[str]:
    """Names of the recipes that ship with the package: digits, light/cifar10, …"""
    names = (path.relative_to(ROOT).with_suffix("").as_posix() for path in ROOT.rglob("*.yaml"))
    return sorted((name for name in names if not name.startswith("methods/")), key=lambda name: ("/" in name, name))


def _listing() -> str:
    return ", ".join(shipped())


def find(name: str) -> Path:
    """The file of a recipe given as a shipped name or a path. InputError if there is none."""
    if name in shipped():
        return ROOT / f"{name}.yaml"
    path = Path(name).expanduser()
    if os.path.isfile(path):  # unlike Path.is_file, False for a name that is too long
        return path
    if os.path.isdir(path):
        raise InputError(f"recipe: {name} is a folder; write a YAML file or one of: {_listing()}")
    plain = name.removesuffix(".yaml").removeprefix("recipes/")
    near = difflib.get_close_matches(plain, shipped(), 1, 0.6)
    hint = f"did you mean '{near[0]}'?" if near else f"write a YAML file or one of: {_listing()}"
    raise InputError(f"recipe: no file {name}; {hint}")


def load(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text: {getattr(error, 'strerror', None) or error}") from error
    found = read(text, str(path))
    if found is None:
        raise InputError(
            f"{path}: the file is empty; write e.g. 'name: mine' and a section 'source:', as in recipes/digits.yaml"
        )
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected keys and values, got a {type(found).__name__}; write e.g. 'ipc: 10'")
    return found


# YAML


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as people mean it: 2e-5 is a number, and a key given twice is an error."""

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


class _Dumper(yaml.SafeDumper):
    """Block style, with lists of plain values on one line; quotes what `_Loader` would take for a number."""

    def represent_sequence(self, tag, sequence, flow_style=None):
        return super().represent_sequence(tag, sequence, not any(isinstance(item, dict) for item in sequence))

    def ignore_aliases(self, data):
        return True


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


def read(text: str, origin: str) -> Any:
    """YAML text as plain values. InputError naming `origin` and the line."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise InputError(f"{origin}: broken YAML: {line}{problem}; check quotes, colons and indentation") from error


# Layers


def resolve(given: dict[str, Any], overrides: dict[str, Any] | None = None) -> Recipe:
    """The recipe of a file's keys and values and of overrides (nested like the file). InputError on anything wrong."""
    overrides = overrides or {}
    given = dict(given)
    resolved = given.pop("resolved", False)
    if not isinstance(resolved, bool):
        raise InputError(
            f"resolved: expected true or false, got {resolved!r}; write true only in what --print_recipe gave"
        )
    if resolved:
        if "method" in overrides:
            raise InputError("method: this recipe is resolved, with its method's values; start from an unresolved one")
        layers = [given, overrides]
    else:
        top = {name: Recipe.model_fields[name].default for name in ("name", "method", "ipc")} | given | overrides
        method = blocks(top["method"], top["name"], top["ipc"]) if isinstance(top["method"], str) else []
        layers = [*method, given, overrides]
    merged: dict[str, Any] = {}
    for layer in layers:
        _merge(merged, layer, Recipe)
    try:
        recipe = Recipe.model_validate(merged)
    except ValidationError as error:
        raise InputError(keys.complaint(error)) from error
    validate(recipe)
    return recipe


def methods() -> list[str]:
    return sorted(path.stem for path in (ROOT / "methods").glob("*.yaml"))


def blocks(method: str, name: str, ipc: int) -> list[dict[str, Any]]:
    """What a method sets for a data set and an IPC, weakest first."""
    if method not in methods():
        near = difflib.get_close_matches(method, methods(), 1)
        hint = f"did you mean '{near[0]}'? There are" if near else "there are"
        raise InputError(f"method: no method {method!r}; {hint}: {', '.join(methods())}")
    content = load(ROOT / "methods" / f"{method}.yaml")
    found = blocks(content["base"], name, ipc) if "base" in content else []
    for block in (content.get("all"), content.get(str(name)) if name not in ("all", "base") else None):
        block = dict(block or {})
        special = block.pop("per_ipc", {})
        found += [block, special.get(ipc, {}) if isinstance(ipc, int) else {}]
    return found


def _merge(below: dict[str, Any], above: dict[str, Any], section: type[Section]) -> None:
    """Puts `above` over `below`, section by section; any other value, a list included, replaces the whole value."""
    for name, value in above.items():
        field = section.model_fields.get(name)
        inner = field.annotation if field and isinstance(field.annotation, type) else None
        if inner and issubclass(inner, Section) and (value is None or isinstance(value, dict)):
            # a heading with nothing under it changes nothing
            below[name] = below.get(name) if isinstance(below.get(name), dict) else {}
            _merge(below[name], value or {}, inner)
        else:
            below[name] = copy.deepcopy(value)


# Writing


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML. Loading it gives an equal recipe; `resolved: true` keeps methods from it."""
    return _write(recipe.model_dump())


def published(recipe: Recipe) -> str:
    """The recipe as a data set carries it: nothing of the run or the machine, local paths by their last part."""
    content = {name: value for name, value in recipe.model_dump().items() if name not in _RUNTIME}
    content["source"]["path"] = _portable(recipe.source.path)
    for net in content["observers"]["networks"]:
        net["weights"] = _portable(net["weights"])
        library, slash, folder = net["arch"].partition("/")
        net["arch"] = library + slash + (_portable(folder) or "")
    return _write(content)


def _portable(path: str | None) -> str | None:
    local = path and (path.startswith(("/", ".", "~")) or os.path.exists(path))
    return Path(path).expanduser().resolve().name if local else path


def _write(content: dict[str, Any]) -> str:
    shared = content["observers"]["train"]
    for net in content["observers"][
        "networks"
    ]:  # only what differs, so that an override of observers.train reaches it
        if net["train"] is not None:
            net["train"] = {name: value for name, value in net["train"].items() if value != shared[name]}
    return yaml.dump({"resolved": True, **content}, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**16)
