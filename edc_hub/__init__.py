"""edc_hub: condense an image-classification set to a few images a class, and publish the result as a dataset."""

__version__ = "0.1.0"


def __getattr__(name: str):
    if name == "CondensedSet":  # at first use: reading a recipe must not wait for torch
        from .condensed import CondensedSet

        return CondensedSet
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
