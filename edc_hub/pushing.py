"""`hub.push` of a recipe: what `condense` and `relabel` do about it before they start, and what a dry run shows."""

from pathlib import Path

from . import hub, publish, tokens
from .recipe import Recipe
from .weights import OURS


def before(recipe: Recipe, folder: Path) -> None:
    """Raises InputError, before hours of work, for what the Hub would refuse of the set to be made in `folder`."""
    section = recipe.hub
    for name in filter(None, (section.id, section.observers)):
        tokens.may_write(name, publish.say)
    finished = (folder / "manifest.json").is_file()  # the tag may hold this very set
    _newest(section.id, tag=None if finished else section.tag, private=section.private)
    for net in recipe.observers.networks if section.observers else ():
        id = f"{section.observers}-{net.name}"
        hub.newest(id, type="model", mark=OURS, tag=None, private=section.private)


def planned(recipe: Recipe, sizes: dict[str, float]) -> str:
    """What publishing would do with a set that is not made yet.

    Args: sizes: projected bytes of each configuration. Errors: as those of `before`, but for the token.
    """
    section = recipe.hub
    newest = _newest(section.id, tag=section.tag, private=section.private)
    lines = [f"create    dataset {section.id}{' (private)' if section.private else ''}"] if newest is None else []
    if section.observers:
        lines += [f"commit    model {section.observers}-{net.name}" for net in recipe.observers.networks]
    lines += [f"add       {f'{name}/train-*.parquet':<44} {size / 1e6:>14,.1f} MB" for name, size in sizes.items()]
    lines += [f"add       {name}" for name in ("README.md", "assets/grid.png", "manifest.json", "recipe.yaml")]
    lines.append(f"commit    dataset {section.id}, {sum(sizes.values()) / 1e6:,.1f} MB")
    default = f"what follows {newest}: schema, data, card or results" if newest else "v1.0.0"
    return "\n".join([*lines, f"tag       {section.tag or default}"])


def _newest(id: str, *, tag: str | None, private: bool) -> str | None:
    return hub.newest(id, type="dataset", mark="manifest.json", tag=tag, private=private)
