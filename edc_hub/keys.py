"""What models of sections say about their keys: the list that `--help` prints, errors in one line, layers in one."""

import copy
import difflib
import json
import types
import typing
from collections.abc import Collection, Iterator
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from .errors import InputError
from .section import Section


S = TypeVar("S", bound=Section)


class Key(NamedTuple):
    """One key. `path` is dotted; below a list of sections it has `[]`: observers.networks[].arch."""

    path: str
    field: FieldInfo
    section: type[Section] | None  # of a key that holds a section, or a list of sections

    @property
    def default(self) -> Any:
        return self.field.get_default(call_default_factory=True)


def walk(section: type[Section], above: str = "") -> Iterator[Key]:
    """Every key of `section` and of the sections inside it, in the order of the models."""
    for name, field in section.model_fields.items():
        inner, listed = _inner(field.annotation)
        yield Key(above + name, field, inner)
        if inner:
            yield from walk(inner, f"{above}{name}{'[]' if listed else ''}.")


def _inner(annotation: Any) -> tuple[type[Section] | None, bool]:
    """The section class inside `Section`, `Section | None` or `list[Section]`, and whether it is a list."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation, False
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    found = [_inner(arg)[0] for arg in args] if origin in (list, types.UnionType, typing.Union) else []
    return next((section for section in found if section), None), origin is list


def table(root: type[Section]) -> dict[str, Key]:
    """The keys by path."""
    return {key.path: key for key in walk(root)}


def describe(annotation: Any, metadata: list[Any] | tuple[Any, ...] = ()) -> str:
    """A type in words: 'integer >= 1', 'list of 3 numbers', 'edc | rded', 'text or null'."""
    limits = _limits(metadata)
    words = {int: "integer", float: "number", str: "text", bool: "true | false", dict: "keys and values", Any: "value"}
    origin, args = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if origin is typing.Annotated:
        return describe(args[0], [*args[1:], *metadata])
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin is list:
        length = f"{limits['min_length']} x " if "min_length" in limits else ""
        return f"list of {length}{describe(args[0])}"
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if arg is type(None) else describe(arg) for arg in args)
    if isinstance(origin, type) and issubclass(origin, Section):
        return "section"
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    return " ".join([words[origin], *(f"{sign} {limits[name]:g}" for name, sign in signs.items() if name in limits)])


def _limits(metadata: Any) -> dict[str, Any]:
    """Bounds and lengths among pydantic's metadata; a FieldInfo inside Annotated carries its own."""
    found: dict[str, Any] = {}
    for item in metadata:
        found |= _limits(item.metadata) if isinstance(item, FieldInfo) else {}
        for name in ("ge", "gt", "le", "lt", "min_length"):
            if getattr(item, name, None) is not None:
                found[name] = getattr(item, name)
    return found


def help_lines(section: type[Section], above: str = "") -> Iterator[str]:
    """Two lines a key: its path, type and default; its meaning. The sections inside `section` come after its keys."""
    inside = [key for key in walk(section, above) if key.path.removeprefix(above).count(".") == 0]
    for key in sorted(inside, key=lambda key: key.section is not None):
        listed = describe(key.field.annotation).startswith("list")
        if not key.section:
            kind = describe(key.field.annotation, key.field.metadata)
            default = (
                "required" if key.field.is_required() else f"default {json.dumps(key.default, ensure_ascii=False)}"
            )
            yield f"  {'' if '[]' in key.path else '--'}{key.path}  {kind}, {default}\n        {key.field.description}"
        elif "[]" in key.path:  # observers.networks[].train, whose keys are listed under observers.train
            yield f"  {key.path}  section, default {json.dumps(key.default)}\n        {key.field.description}"
        else:
            yield f"\n{key.path}: {key.field.description}{'; a list of entries with these keys' * listed}"
            yield from help_lines(key.section, f"{key.path}{'[]' * listed}.")


def layered(layers: list[dict[str, Any]], section: type[Section]) -> dict[str, Any]:
    """The keys and values of several layers, weakest first, in one."""
    merged: dict[str, Any] = {}
    for layer in layers:
        _merge(merged, layer, section)
    return merged


def _merge(below: dict[str, Any], above: dict[str, Any], section: type[Section]) -> None:
    """Puts `above` over `below`, section by section; any other value, a list included, replaces the whole value."""
    for name, value in above.items():
        if inner := _inside(section, name, value):
            below[name] = below.get(name) if isinstance(below.get(name), dict) else {}
            _merge(below[name], value or {}, inner)
        else:
            below[name] = copy.deepcopy(value)


def _inside(section: type[Section], name: str, value: Any) -> type[Section] | None:
    """The section of the keys in `value`; None for a value that is one whole, as that of evaluation.per_student."""
    field = section.model_fields.get(name)
    inner = field.annotation if field and isinstance(field.annotation, type) else None
    # a heading with nothing under it changes nothing
    found = inner and issubclass(inner, Section) and (value is None or isinstance(value, dict))
    return inner if found else None


def leaves(content: dict[str, Any], section: type[Section], prefix: str = "") -> dict[str, Any]:
    """What keys and values of `section` set, by dotted key; a whole where they are laid over each other as one."""
    found: dict[str, Any] = {}
    for name, value in content.items():
        inner = _inside(section, name, value)
        found |= leaves(value or {}, inner, f"{prefix}{name}.") if inner else {prefix + name: value}
    return found


def validated(section: type[S], content: Any, above: str = "") -> S:
    """`content` as a section, whose keys stand under `above`. Raises InputError with the first complaint."""
    try:
        return section.model_validate(content)
    except ValidationError as error:
        raise InputError(complaint(error, section, above)) from error


def complaint(error: ValidationError, root: type[Section], above: str = "") -> str:
    """The first thing pydantic found in `root`, as one line: where, what is wrong, what to write instead."""
    # an unknown key goes first: what is missing or wrong elsewhere often follows from it; and of keys and values that
    # might also have been a name, what is wrong with the keys
    entry = min(error.errors(), key=_follows)
    place, path = _place(entry["loc"])
    place = f"{above}.{place}".strip(".")
    kind, value, context = entry["type"], entry.get("input"), entry.get("ctx", {})
    if kind == "extra_forbidden":
        return f"{place}: unknown key{meant(path, root, above=above)}"
    if kind == "missing":
        return f"{place}: missing; {_example(path, root, above)}"
    if kind == "value_error":
        text, known = str(context["error"]), table(root).get(path)
        if known and (not known.section or _inner(known.field.annotation)[1]):
            return f"{place}: {text}"  # said about this key; a section's validator begins with the key it means
        return ".".join(filter(None, (place, text)))
    if kind == "invalid_key":
        return f"{_place((*entry['loc'][:-1], str(value)))[0]}: a key must be text, got {value!r}; write it in quotes"
    expected = _EXPECTED.get(kind, kind.replace("_", " ")).format(**context)
    if kind == "string_type" and isinstance(value, bool):
        return f"{place}: expected text, got {value}; YAML so reads yes, no, on and off: put it in quotes, '[\"no\"]'"
    return f"{place}: expected {expected}, got {_short(value)}; {_example(path, root, above)}"


def _follows(entry: Any) -> int:
    no_name = entry["loc"][-1:] == ("str",) and isinstance(entry["input"], dict)
    return 0 if entry["type"] == "extra_forbidden" else 1 + no_name


def _place(loc: tuple[int | str, ...]) -> tuple[str, str]:
    """pydantic's location as ('observers.networks[0].arch', 'observers.networks[].arch')."""
    loc = tuple(part for part in loc if part not in ("str", "int", "Student"))  # a union's branches
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")
    path = "".join("[]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")
    return place, path


_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "keys and values",
    "model_type": "a section of keys and values",
    "string_pattern_mismatch": "a name of letters, digits, '.', '_' and '-'",
    "literal_error": "one of {expected}",
    "too_short": "a list of {min_length}",
    "too_long": "a list of {max_length}",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
}


def _example(path: str, root: type[Section], above: str) -> str:
    """'write e.g. --ipc 10': the way to write a key, with its default or a value of its kind."""
    key = table(root).get(path.removesuffix("[]"))
    if key is None:
        return "see --help"
    annotation = key.field.annotation
    if key.section:
        fields = key.section.model_fields.items()  # one that must be given, else the first; none of options
        name, field = min(fields, key=lambda item: not item[1].is_required(), default=("name", FieldInfo(default=1)))
        shown = f"{{{name}: {'…' if field.is_required() else json.dumps(field.get_default())}, …}}"
        return f"write e.g. {key.path}: {f'[{shown}]' if 'list' in describe(annotation) else shown}"
    value = key.default
    if value in (None, PydanticUndefined):
        value = _sample(describe(annotation, key.field.metadata))
    text = value if isinstance(value, str) else json.dumps(value)
    if "[]" in path.removesuffix("[]"):
        return f"write e.g. {path.rpartition('.')[2]}: {text}"
    return f"write e.g. --{f'{above}.' * bool(above)}{path.removesuffix('[]')} {repr(text) if ' ' in text else text}"


def _sample(kind: str) -> Any:
    """A value of a kind that `describe` names, for keys whose default is null."""
    samples = {
        "integer": 10,
        "number": 0.5,
        "list of integer": [1, 2],
        "list of text or integer": [3, 5],
        "list of text": ["a", "b"],
        "list of 3 x number": [0.5, 0.5, 0.5],
    }
    return next((value for start, value in samples.items() if kind.startswith(start)), "name")


def meant(path: str, root: type[Section], flags: Collection[str] = (), above: str = "") -> str:
    """'; did you mean …': a near name in the same section or of a flag, else the same or a near one in another one."""
    section, _, name = path.rpartition(".")
    every = list(table(root))
    here = [known.removeprefix(f"{section}.") for known in every if known.rpartition(".")[0] == section]
    here += flags if not section else []
    near = difflib.get_close_matches(name, here, 1, 0.7)
    if not near:
        alike = difflib.get_close_matches(name, {known.rpartition(".")[2] for known in every}, 1, 0.8)
        near = [known for known in every if known.rpartition(".")[2] in alike]
    if near:
        return f"; did you mean {' or '.join(map(repr, near))}?"
    place = section or above or root.owner
    return f"; {place} has: {', '.join(here)}" if here else "; see --help"


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
