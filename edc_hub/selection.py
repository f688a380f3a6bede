"""Which observers, and which of their snapshots, the stages of a recipe look through. Nothing here imports torch."""

from collections.abc import Collection

from .errors import InputError
from .recipe import Recipe
from .section import Network


def snapshots(network: Network) -> list[int]:
    """The epochs whose weights are kept, ascending; empty for a network that is only loaded."""
    if network.train is None:
        return []
    return sorted({*(network.train.snapshots or []), network.train.epochs})


def users(recipe: Recipe) -> dict[str, list[tuple[str, int]]]:
    """The observers (name, epoch) that each stage looks through; stages that need none are left out."""
    found = {"relabel": selected(recipe, recipe.relabel.observers)}
    if recipe.initialize.kind in ("rded", "kmeans"):
        chosen = selected(recipe, recipe.initialize.observers)
        found["initialize"] = chosen[:1] if recipe.initialize.kind == "kmeans" else chosen
    if recipe.synthesize.iterations:
        found["synthesize"] = selected(recipe, recipe.synthesize.observers)
    return found


def roles(recipe: Recipe, but: Collection[str] = ()) -> dict[tuple[str, int], list[str]]:
    """The stages that look through each observer (name, epoch) in use, `but` for those stages."""
    found: dict[tuple[str, int], list[str]] = {}
    for stage, entries in users(recipe).items():
        for entry in dict.fromkeys(entries) if stage not in but else ():
            found.setdefault(entry, []).append(stage)
    return found


def title(name: str, epoch: int) -> str:
    """A snapshot as recipes name it: `resnet18@60`, or the name alone of loaded weights."""
    return f"{name}@{epoch}" if epoch else name


def selected(recipe: Recipe, entries: list[str] | None, key: str = "observers") -> list[tuple[str, int]]:
    """Observers of a stage as (name, epoch); epoch 0 stands for loaded weights. None: every observer at its last.

    `*` stands for every name or, behind the @, for every snapshot: `*@4`, `resnet18@*`, `*@*`. Each counts once.
    Raises InputError naming `key` for an observer or a snapshot that there is none of.
    """
    kept = {net.name: snapshots(net) for net in recipe.observers.networks}
    chosen = []
    for entry in ["*"] if entries is None else entries:
        name, at, epoch = entry.partition("@")
        if name not in kept and name != "*":
            raise InputError(f"{key}: no observer '{name}'; there are: {', '.join(kept)}; or null for all")
        for one in kept if name == "*" else [name]:
            epochs = kept[one] if epoch == "*" else kept[one][-1:]
            if at and epoch != "*":
                if not kept[one]:
                    raise InputError(f"{key}: {entry}: {one} is loaded, not trained here; write {one}")
                epochs = [number for number in kept[one] if str(number) == epoch]
                if not epochs:
                    there = ", ".join(title(one, number) for number in kept[one])
                    raise InputError(
                        f"{key}: {one}@{epoch} was not kept; write one of: {there}, or add it to snapshots"
                    )
            chosen += [(one, number) for number in epochs or [0]]
    return list(dict.fromkeys(chosen))
