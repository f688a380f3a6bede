"""From files and a command line to a recipe: field default < method < recipe < command line.

A method is a file of `recipes/methods`: a block `all`, then a block per recipe `name`; inside a block, `per_ipc`
holds values for single IPCs. `base: <method>` puts another method's blocks underneath. A method from outside,
`package.module:function`, has the values of `edc`. A recipe's `per_method` holds values for single methods and those
that stand on them.
"""

import difflib
import functools
import os
from pathlib import Path
from typing import Any, NamedTuple

from . import arguments, documents, keys
from .documents import load
from .errors import InputError
from .methods import RUNTIME
from .protocol import Evaluation, named_students
from .recipe import Recipe, Source
from .rules import validate


_HERE = Path(__file__).parent
# in a wheel the recipes lie in the package, in a checkout beside it
ROOT = _HERE / "_shipped/recipes" if (_HERE / "_shipped").is_dir() else _HERE.parent / "recipes"

_FLAGS = {
    "dry_run": "print the plan and the projected time, write nothing",
    "print_recipe": "print the resolved recipe",
}
_OTHERS = ("methods", "protocols", "evaluation", "sweeps", "published")  # what else lies in the folder of recipes
BASE = "edc"  # the method whose values one from outside has


class Parsed(NamedTuple):
    recipe: Recipe
    dry_run: bool
    print_recipe: bool
    resolved: bool
    """Whether the file was: its values are all its own."""


def parse(argv: list[str], prog: str, **facts: Any) -> Parsed:
    """The recipe and the flags of a command line. `--help` prints to stdout and exits with 0.

    Args: facts: keys that are known whatever the recipe says, even a resolved one.
    Raises InputError on anything wrong, impossible combinations included.
    """
    arguments.help_asked(argv, lambda: usage(prog))
    named, overrides, flags = arguments.split(argv, Recipe, _FLAGS)
    if len(named) != 1:
        got = f"got {len(named)}: {' '.join(named)}" if named else "none given"
        odd = next((word for word in named if "=" in word or word.startswith("-")), None)
        if odd:
            got += f"; a key is written --{odd.lstrip('-').replace('=', ' ')}"
        raise InputError(f"recipe: expected one, {got}; write e.g. edc-hub {prog} digits (there are: {listing()})")
    content = load(find(named[0]))
    recipe = resolve(content | facts, overrides)
    if "name" not in content | facts | overrides and recipe.source.path != Source.model_fields["path"].default:
        raise InputError(f"name: none given, and {recipe.name} would bring the values of that set; write name: mine")
    refuse_strangers(overrides, recipe.evaluation)
    return Parsed(recipe, **flags, resolved=content.get("resolved", False))


def usage(prog: str) -> str:
    """The text of `--help`: every key with its type, default and meaning."""
    head = (
        f"usage: edc-hub {prog} RECIPE [--section.key value ...]\n\n"
        f"RECIPE is a YAML file or one of: {listing()}\n"
        f"A value is YAML: 2e-5, true, null, [0.5, 1.0], '[{{name: a, arch: resnet18}}]'; a list replaces the whole.\n"
        "Method and recipe stand above the defaults shown here; --print_recipe shows what a run would use."
    )
    return arguments.usage(head, Recipe, _FLAGS)


# Files


@functools.cache
def shipped(folder: Path = ROOT) -> tuple[str, ...]:
    """Names of the recipes that ship: digits, light/cifar10, …; or of those in a folder beside them."""
    names = (path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
    own = (name for name in names if name.partition("/")[0] not in _OTHERS)
    return tuple(sorted(own, key=lambda name: ("/" in name, name)))


def listing(folder: Path = ROOT) -> str:
    """The same names in a line."""
    return ", ".join(shipped(folder))


def find(name: str, folder: Path = ROOT, noun: str = "recipe") -> Path:
    """The file of a recipe, or what `noun` calls it, by a shipped name or a path. InputError if there is none."""
    if name in shipped(folder):
        return folder / f"{name}.yaml"
    path = Path(os.path.expanduser(name))
    if os.path.isfile(path):  # unlike Path.is_file, False for a name that is too long
        return path
    if os.path.isdir(path):
        raise InputError(f"{noun}: {name} is a folder; write a YAML file or one of: {listing(folder)}")
    plain = name.removesuffix(".yaml").removeprefix("recipes/").removeprefix(f"{folder.name}/")
    near = difflib.get_close_matches(plain, shipped(folder), 1, 0.6)
    hint = f"did you mean '{near[0]}'?" if near else f"write a YAML file or one of: {listing(folder)}"
    raise InputError(f"{noun}: no file {name}; {hint}")


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
        _refuse_other_layers(given, overrides)
        layers = [given, overrides]
    else:
        top = {name: Recipe.model_fields[name].default for name in ("name", "method", "ipc")} | given | overrides
        method = blocks("method", top["method"], top["name"], top["ipc"])
        special = _of_method(given.pop("per_method", None) or {}, top["method"], top["ipc"])
        above = keys.layered([*method, given, *special, overrides], Recipe)
        own = above.get("evaluation")
        own = own if isinstance(own, dict) else {}  # the model says what is wrong
        choice = own.get("protocol", Evaluation.model_fields["protocol"].default)
        below = protocol(choice, top["name"], top["ipc"])
        let_through(below, own)
        layers = [{"evaluation": below}, above]
    recipe = keys.validated(Recipe, keys.layered(layers, Recipe))
    validate(recipe)
    return recipe


def _refuse_other_layers(resolved: dict[str, Any], overrides: dict[str, Any]) -> None:
    """Raises InputError for what would be a name on the values of another: of the keys that choose the values below a
    recipe, a resolved one has only its own."""
    ours, theirs = (keys.leaves(keys.layered([each], Recipe), Recipe) for each in (resolved, overrides))
    for key in ("method", "name", "ipc", "evaluation.protocol"):
        if key in theirs and theirs[key] != ours.get(key):
            if key == "evaluation.protocol":
                _known("protocol", theirs[key], key)
            raise InputError(
                f"{key}: this recipe is resolved, with the values of {key} {ours.get(key)}; give the one that it was "
                f"made from, by file or name (there are: {listing()})"
            )


def of_run(run: Path) -> Recipe:
    """The recipe of a finished run, with the commit of the real set that it had, whatever came to it since.

    Raises InputError where there is none.
    """
    if not (run / "dataset/manifest.json").is_file() or not (run / "recipe.yaml").is_file():
        raise InputError(f"run: no finished set in {run}; give the folder of a finished run, as condense made it")
    from . import manifest

    recipe, made = resolve(load(run / "recipe.yaml")), manifest.read(run / "dataset/manifest.json")
    revision = made["source"]["commit"] or recipe.source.revision
    return recipe.model_copy(update={"source": recipe.source.model_copy(update={"revision": revision})})


def protocol(choice: Any, name: Any, ipc: Any) -> dict[str, Any]:
    """What a protocol sets for a data set and an IPC."""
    return keys.layered(blocks("protocol", choice, name, ipc), Evaluation)


def let_through(below: dict[str, Any], given: dict[str, Any]) -> None:
    """Takes out of the `per_student` of a protocol what is given for all students above it."""
    own = below.get("per_student") or {}
    left = {name: {key: value for key, value in part.items() if key not in given} for name, part in own.items()}
    below["per_student"] = {name: part for name, part in left.items() if part}


def refuse_strangers(overrides: dict[str, Any], section: Evaluation) -> None:
    """Raises InputError for a command line with values for a student that is not trained. Files may have more: a
    command line picks from their students."""
    students = named_students(section)
    known = [*students, *(student.arch for student in students.values())]
    for name in (overrides.get("evaluation") or {}).get("per_student", {}):
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(students)}"
            raise InputError(f"evaluation.per_student.{name}: no student is called so; {hint}")


def methods() -> tuple[str, ...]:
    return shipped(ROOT / "methods")


def _of_method(per_method: Any, method: Any, ipc: Any) -> list[dict[str, Any]]:
    """What a recipe sets for a method and for those it stands on, weakest first."""
    if not isinstance(per_method, dict) or not all(isinstance(value, dict) for value in per_method.values()):
        raise InputError(f"per_method: expected methods with keys and values, got {per_method!r}")
    for name in per_method:
        if ":" not in str(name):
            _known("method", name, "per_method")
    chain = []
    while isinstance(method, str):
        chain.append(method)
        method = None if ":" in method else load(ROOT / "methods" / f"{method}.yaml").get("base")
    return [part for name in reversed(chain) for part in _of_ipc(per_method.get(name), ipc)]


def _of_ipc(block: dict[str, Any] | None, ipc: Any) -> list[dict[str, Any]]:
    """What a block sets for any IPC and, above it, for this one."""
    block = dict(block or {})
    special = block.pop("per_ipc", {})
    if not isinstance(special, dict) or not all(
        isinstance(number, int) and isinstance(part, dict) for number, part in special.items()
    ):
        raise InputError(f"per_ipc: expected numbers of images a class with keys and values, got {special!r}")
    return [block, special.get(ipc, {}) if isinstance(ipc, int) else {}]


def _known(kind: str, choice: str, key: str) -> Path:
    """The file of a method or a protocol. InputError naming those that there are."""
    known = shipped(ROOT / f"{kind}s")
    if choice not in known:
        near = difflib.get_close_matches(str(choice), known, 1)
        hint = f"did you mean '{near[0]}'? There are" if near else "there are"
        outside = ", or package.module:function" if key == "method" else ""
        raise InputError(f"{key}: no {kind} {choice!r}; {hint}: {', '.join(known)}{outside}")
    return ROOT / f"{kind}s" / f"{choice}.yaml"


def blocks(kind: str, choice: Any, name: Any, ipc: Any) -> list[dict[str, Any]]:
    """What a method or a protocol (`kind`) sets for a data set and an IPC, weakest first."""
    if not isinstance(choice, str):
        return []  # the model says what is wrong
    if kind == "method" and ":" in choice:
        choice = BASE
    content = load(_known(kind, choice, {"protocol": "evaluation.protocol"}.get(kind, kind)))
    found = blocks(kind, content["base"], name, ipc) if "base" in content else []
    for block in (content.get("all"), content.get(str(name)) if name not in ("all", "base") else None):
        found += _of_ipc(block, ipc)
    return found


def without_values(recipe: Recipe) -> str:
    """A line where neither the recipe's method nor one it stands on knows its data set by name; else empty."""
    method = BASE if ":" in recipe.method else recipe.method
    while method:
        content = load(_known("method", method, "method"))
        if recipe.name in content:
            return ""
        method = content.get("base")
    return f"method {recipe.method}: it has no values of its own for '{recipe.name}'; those for all data sets are used"


# Writing


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML. Loading it gives an equal recipe; `resolved: true` keeps methods from it."""
    return _write(recipe.model_dump())


def published(recipe: Recipe) -> str:
    """The recipe as a data set carries it: nothing of the run or the machine, local paths by their last part."""
    content = {name: value for name, value in recipe.model_dump().items() if name not in RUNTIME}
    content["source"]["path"] = _portable(recipe.source.path)
    options = content["options"].items()
    content["options"] = {name: _portable(value) if isinstance(value, str) else value for name, value in options}
    for net in (*content["observers"]["networks"], *content["evaluation"]["teachers"]):
        net["weights"] = _portable(net["weights"])
        library, slash, folder = net["arch"].partition("/")
        net["arch"] = library + slash + (_portable(folder) or "")
    return _write(content)


def _portable(path: str | None) -> str | None:
    local = path and (path.startswith(("/", ".", "~")) or os.path.exists(path))
    return os.path.basename(os.path.realpath(os.path.expanduser(path))) if local else path


def _write(content: dict[str, Any]) -> str:
    shared = content["observers"]["train"]
    for net in content["observers"][
        "networks"
    ]:  # only what differs, so that an override of observers.train reaches it
        if net["train"] is not None:
            net["train"] = {name: value for name, value in net["train"].items() if value != shared[name]}
    return documents.write({"resolved": True, **content})
