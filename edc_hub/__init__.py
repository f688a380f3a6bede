"""edc_hub: condense an image-classification set to a few images a class, and publish the result as a dataset."""

from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .condensed import CondensedSet
    from .methods import Task

__version__ = "0.1.0"
__all__ = ["CondensedSet", "Task", "__version__"]

_PLACES = {"CondensedSet": "condensed", "Task": "methods"}


def __getattr__(name: str):
    if name in _PLACES:  # at first use: reading a recipe must not wait for torch
        return getattr(import_module(f".{_PLACES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
