"""A finished run read back: its recipe, its set, and the artefacts it was made from, found again and never remade."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from . import comparison, initialize, launch, moments, observers, pictures, source
from .condensed import CondensedSet
from .protocol import named_students
from .realset import RealSet
from .recipe import Recipe
from .targets import Moments
from .trials import Bench, Trial
from .work import Kept, Session


@dataclass
class Finished:
    """A finished run; whatever is asked for is read then. Raises InputError for an artefact that is not there."""

    run: Path
    recipe: Recipe
    session: Session

    @property
    def about(self) -> dict[str, Any]:
        """Which set this is, and where it is looked at."""
        made = self.condensed.manifest
        return {
            "set": {key: made[key] for key in ("name", "method", "ipc", "seed", "fingerprint")},
            "device": launch.device_name(self.session),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }

    @cached_property
    def kept(self) -> Session:
        """The session, with the artefacts as they are."""
        return replace(self.session, store=Kept(self.session.store.root))

    @cached_property
    def condensed(self) -> CondensedSet:
        return CondensedSet.load((self.run / "dataset").absolute())

    @cached_property
    def sets(self) -> dict[str, list[CondensedSet]]:
        """The set and the controls that the run has: `set`, `initial`, `random`, the latter of several draws."""
        places = {kind: pictures.control_folders(self.run.absolute(), kind) for kind in ("initial", "random")}
        found = {kind: [CondensedSet.load(place) for place in those] for kind, those in places.items() if those}
        return {"set": [self.condensed], **found}

    @cached_property
    def real(self) -> RealSet:
        return source.load(self.recipe.source)

    @cached_property
    def observers(self) -> observers.Observers:
        return observers.obtain(self.recipe, self.real, self.kept)

    @cached_property
    def initial(self) -> initialize.Initial:
        return initialize.obtain(self.recipe, self.real, self.observers, self.kept)

    def moments(self, recipe: Recipe) -> Moments:
        """Moments with the targets of `recipe`: the run's, or one with other targets of the same moments."""
        return moments.obtain(recipe, self.real, self.observers, self.kept)

    def bench(self, student: str | None, epochs: int | None) -> tuple[Bench, str]:
        """A comparison of one student on the set alone, and its name.

        It is judged on the hold-out, or on the test split where the run kept none out. `student`: one of the set's
        protocol, or any architecture; the protocol's first when None. `epochs`: the protocol's when None.
        """
        known = named_students(self.recipe.evaluation)
        name = student or next(iter(known))
        evaluation: dict[str, Any] = {"students": [known[name].model_dump() if name in known else name]}
        if epochs:
            evaluation["epochs"] = epochs
        split = "holdout" if self.recipe.source.holdout else "test"
        asked = {"dataset": [str(self.run)], "split": split, "seeds": [0], "controls": [], "evaluation": evaluation}
        parsed = comparison.resolve(asked)
        bench = Bench(parsed.comparison, parsed.sets, self.session, self.run)
        bench.check()
        return bench, name

    def trained(self, student: str | None, epochs: int | None, otherwise: int) -> tuple[Bench, str]:
        """The same for a student that is trained: `epochs`, or all of the protocol where `evaluate` has done so, or
        else at most `otherwise`."""
        bench, name = self.bench(student, epochs)
        whole = bench.sections[name].epochs
        there = self.session.store.has(bench.unit(Trial("set", name, 0, 0, 0, self.condensed)))
        return (bench, name) if epochs or there or whole <= otherwise else self.bench(student, otherwise)
