"""Methods that are a function in place of the synthesis stage: shipped ones of the table below, and any from outside.

    edc-hub condense cifar10 --method package.module:function --options.width 3

A shipped one is a function and a line of FUNCTIONS, beside its values in recipes/methods. Nothing here imports torch
before a function runs.
"""

import difflib
import hashlib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import InputError
from .recipe import Recipe


if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .initialize import Initial
    from .observers import Observers
    from .source import RealSet
    from .work import Progress, Session, Unit

FUNCTIONS: dict[str, str] = {}
"""Shipped methods with code of their own: module:function by name."""

STAGE, VERSION = "methods", 1
_LATER = ("relabel", "images", "evaluation")  # sections of what comes after the images
RUNTIME = ("output_dir", "threads", "device", "checkpoint_seconds", "hub")  # change where and how fast, not what


class Task(NamedTuple):
    """What a method's function is given. It returns the condensed images: uint8 (C*IPC, 3, s, s), class-major.

    It runs in one process, once, and its images are found again while the recipe, the file it stands in and what it
    is given are the same.
    """

    recipe: Recipe
    """Sections of what comes after synthesis are at their defaults: the images may not depend on them. But
    `images.grid` is the set's: where it is not 1, images are canvases (canvas.py)."""
    options: dict[str, Any]
    """Its own settings: `options` of the recipe."""
    real: "RealSet"
    """The real set: `names` of the C classes, `labels` int64, `rows(label)`, `images(rows)` uint8 (n, 3, s, s)."""
    observers: "Observers"
    """`load(name, epoch)` gives a frozen network, (B, 3, s, s) in [0, 1] to logits (B, C); see selection.py."""
    initial: "Initial"
    """`images` uint8 (C*IPC, 3, s, s), class-major; `source_rows` int32."""
    session: "Session"
    """`device`, `autocast()`, `bar(iterable)` and `report(text)` on stderr."""
    generator: "torch.Generator"
    """On the CPU, of (seed, method, data set, IPC) alone; all draws come from it."""
    progress: "Progress"
    """`load()` gives what was saved before an interruption, or None; `save(lambda: tensors)` saves when it is time."""


Function = Callable[[Task], "Tensor"]


def place(method: str) -> str | None:
    """Where the function of a method stands, module:function; None for a method of values alone."""
    found = FUNCTIONS.get(method, method)
    return found if ":" in found else None


def find(method: str) -> Function | None:
    """The function of a method; None for one of values alone. Raises InputError where it cannot be imported or called.

    A module is looked for where Python looks, and in the current folder.
    """
    found = place(method)
    if found is None:
        return None
    module, _, name = found.partition(":")
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", found):
        raise InputError(f"method: {method!r} is no name of a function; write package.module:function")
    function = getattr(_module(module), name, None)
    if function is None:
        there = [key for key, value in vars(sys.modules[module]).items() if inspect.isfunction(value)]
        near = difflib.get_close_matches(name, there, 1)
        hint = f"did you mean '{module}:{near[0]}'?" if near else f"its functions: {', '.join(there) or 'none'}"
        raise InputError(f"method: {module} has no '{name}'; {hint}")
    try:
        inspect.signature(function).bind(None)
        _source(function)
    except (TypeError, ValueError, OSError) as error:
        raise InputError(f"method: {method} is no Python function of one argument; write def {name}(task)") from error
    return function


def _module(name: str) -> Any:
    here = os.getcwd()
    if here not in sys.path:  # `python -m` has it there, a console script has not
        sys.path.append(here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            remedy = "install its package, put its folder on PYTHONPATH, or write the command where it lies"
            raise InputError(f"method: no module '{error.name}'; {remedy}") from error
        raise InputError(f"method: {name} needs '{error.name}', which is not installed; install it") from error
    except ImportError as error:
        raise InputError(f"method: {name} cannot be imported: {error}; mend it or what it needs") from error


def _source(function: Function) -> bytes:
    """The file that the function stands in."""
    return Path(inspect.getsourcefile(inspect.unwrap(function))).read_bytes()


def slug(method: str) -> str:
    """The method in a file's name: package-module-function."""
    return re.sub("[:.]", "-", method)


def without_synthesis(recipe: Recipe) -> Recipe:
    """The recipe with a synthesis that does nothing."""
    return recipe.model_copy(update={"synthesize": recipe.synthesize.model_copy(update={"iterations": 0})})


def obtain(
    function: Function, recipe: Recipe, real: "RealSet", observers: "Observers", initial: "Initial", session: "Session"
) -> "Tensor":
    """The condensed images of a method's function, uint8 (C*IPC, 3, s, s), class-major: one unit of work.

    Raises InputError for a result of another kind.
    """
    from . import work
    from .recipe import Images
    from .selection import snapshots

    unseen = {name: Recipe.model_fields[name].default for name in (*_LATER, *RUNTIME)}
    seen = recipe.model_copy(update=unseen | {"images": Images(grid=recipe.images.grid)})
    mark = work.fingerprint(
        STAGE,
        VERSION,
        code=hashlib.sha256(_source(function)).hexdigest(),
        recipe=seen.model_dump(mode="json", exclude={*unseen, "source", "observers", "precision"}),
        space=[recipe.source.mean, recipe.source.std],
        precision=session.precision,
        real=real.fingerprint,
        observers=[
            observers.fingerprint(net.name, epoch)
            for net in recipe.observers.networks
            for epoch in snapshots(net) or [0]
        ],
        initial=initial.fingerprint,
    )
    unit = work.Unit(STAGE, f"{slug(recipe.method)}-{recipe.name}-ipc{recipe.ipc}", mark)

    def make(_unit: "Unit", generator: "torch.Generator", progress: "Progress") -> tuple[dict[str, "Tensor"], dict]:
        options = dict(recipe.options.model_extra or {})
        task = Task(seen, options, real, observers, initial, session, generator, progress)
        return {"images": _checked(function(task), recipe.method, initial.images)}, {"method": recipe.method}

    work.run([unit], make, session, seed=recipe.seed, label="synthesize")
    return session.store.load(unit)["images"]


def _checked(images: Any, method: str, initial: "Tensor") -> "Tensor":
    """The images of a function, if they are as many and of the kind of the initial ones."""
    dtype, shape = getattr(images, "dtype", None), tuple(getattr(images, "shape", ()))
    if dtype != initial.dtype or shape != tuple(initial.shape):
        got = f"{dtype} {shape}" if dtype is not None else type(images).__name__
        raise InputError(f"method: {method} returned {got}; it must return {initial.dtype} {tuple(initial.shape)}")
    return images
