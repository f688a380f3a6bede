"""Controls (i) and (ii) of a set: the run's beside it, else made again from the rows it names, by its own observers.

A set on the Hub carries the rows of the real set that its images started from, and names the repositories of its
observers where those are published. The labels of a control are then those that the run gave it.
"""

from typing import TYPE_CHECKING

from . import canvas, pictures, recipes, source
from .condensed import CondensedSet
from .initialize import Initial
from .protocol import Evaluation
from .teachers import Teachers


if TYPE_CHECKING:
    from .trials import Bench


_NO_REAL_ONES = "the images start from no real ones"


def find(condensed: CondensedSet, kind: str, bench: "Bench") -> tuple[list[CondensedSet], str]:
    """The sets of control `kind` (`initial` or `random`), or none and why.

    Those of the run beside the set, or made below the folder of `bench` by all processes; only then is its real set
    read.
    """
    if condensed.run is not None:
        if kind == "initial" and condensed.manifest.get("origin"):
            return [], _NO_REAL_ONES
        beside = [CondensedSet.load(place) for place in pictures.control_folders(condensed.run, kind)]
        found = [each for each in beside if each.manifest["recipe_sha256"] == condensed.manifest["recipe_sha256"]]
        asked = recipes.resolve(condensed.recipe).relabel
        wanted = asked.controls * (asked.random_draws if kind == "random" else 1)
        if len(found) < wanted:
            return [], f"{len(found)} of {wanted} are there: the run is not finished, its command goes on with it"
        return found, "the run wrote none (relabel.controls)"
    reason = _why_not(condensed, kind, bench)
    return ([], reason) if reason else (_make(condensed, kind, bench), "")


def _why_not(condensed: CondensedSet, kind: str, bench: "Bench") -> str | None:
    """Why a control cannot be made of this set; None where it can."""
    made = condensed.manifest
    if condensed.published_observers is None:
        return "it lies beside the run that made the set, and the observers are not published"
    if other := other_images(condensed, bench):
        return other
    if kind == "random":
        return None
    if made.get("origin") or (condensed.source_rows < 0).any():
        return _NO_REAL_ONES
    if recipes.resolve(condensed.recipe).initialize.kind == "rded":
        return "the images start from crops, and only their rows are known"
    return None


def other_images(condensed: CondensedSet, bench: "Bench") -> str | None:
    """What is wrong where the real set here is not the one that this set was condensed from; else None."""
    size, section = condensed.source_size, bench.source
    then = bench.real if section.size == size else source.load(section.model_copy(update={"size": size}))
    if condensed.manifest["source"]["fingerprint"] == then.fingerprint:
        return None
    return f"{then.id} has other images here than the set was condensed from"


def _make(condensed: CondensedSet, kind: str, bench: "Bench") -> list[CondensedSet]:
    """The sets of a control, labelled where they are not there."""
    recipe, watching, session = Teachers(condensed, Evaluation(), bench.source, bench.session).labellers()
    rows, images = condensed.source_rows, condensed.images
    if kind == "initial":
        images = canvas.compose(bench.real.images(rows.flatten().long()), condensed.grid)
    initial = Initial(images, rows, "")
    folder, found = bench.folder / "controls" / condensed.manifest["fingerprint"], []
    for each in pictures.controls(recipe, bench.real, initial, folder, epochs=condensed.epochs):
        if each.control == kind:
            pictures.label_and_write(recipe, bench.real, watching, each, session)
            found.append(CondensedSet.load(each.place))
    return found
