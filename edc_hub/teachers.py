"""Soft labels that are made while a student trains: by observers, or mixed from the one soft label of each image."""

from dataclasses import replace
from functools import cached_property

from torch import Tensor

from . import labels, observers, recipes, source
from .condensed import CondensedSet
from .errors import InputError
from .feed import Teach
from .networks import Network
from .protocol import Evaluation
from .recipe import Recipe, Source
from .section import Network as Section
from .selection import selected, title
from .views import ViewTable
from .work import Kept, Session


class Teachers:
    """The networks that label online: those of `evaluation.teachers`, else the observers of the run beside the set,
    else those that are published with it.

    Nothing is loaded before it is asked for. Raises InputError where none is there.
    """

    def __init__(self, condensed: CondensedSet, section: Evaluation, real: Source, session: Session):
        self._condensed, self._section, self._source, self._session = condensed, section, real, session

    @cached_property
    def _recipe(self) -> Recipe:
        run, given = self._condensed.run, self._section.teachers
        if run and not given:  # as it is, so that the run's own observers are found
            return recipes.of_run(run)
        recipe = recipes.resolve(self._condensed.recipe)
        mode = "running" if given else recipe.relabel.observer_mode  # others' networks do not label as the set's did
        size = self._source.size if given else recipe.source.size  # of relabelled images of another size
        changes = {
            "source": self._source.model_copy(update={"size": size}),
            "observers": recipe.observers.model_copy(update={"networks": given or self._published(recipe)}),
            "relabel": recipe.relabel.model_copy(update={"observers": None, "observer_mode": mode}),
            "synthesize": recipe.synthesize.model_copy(update={"iterations": 0}),
            "initialize": recipe.initialize.model_copy(update={"kind": "real"}),
        }
        return recipe.model_copy(update=changes)  # they label and do nothing else

    def _published(self, recipe: Recipe) -> list[Section]:
        """The observers that label the set, with the weights that are published with it."""
        found, sections = self._condensed.published_observers, {net.name: net for net in recipe.observers.networks}
        if found is None:
            raise InputError(
                "evaluation.labels: online, but the set lies beside no run whose observers could label, and none are "
                "published with it; name networks in evaluation.teachers, or write --evaluation.labels stored"
            )
        networks = []
        for name, epoch in selected(recipe, recipe.relabel.observers):
            known = found[title(name, epoch)]
            own = {"name": f"{name}-{epoch}" if epoch else name, "weights": known["weights"], "train": None}
            networks.append(sections[name].model_copy(update=own))
        return networks

    @cached_property
    def _observers(self) -> observers.Observers:
        session = self._own_session
        if self._condensed.run and not self._section.teachers:
            session = replace(session, store=Kept(session.store.root))
        try:
            return observers.obtain(self._recipe, source.load(self._recipe.source), session)
        except InputError as error:
            if not self._section.teachers:
                raise
            raise InputError(str(error).replace("observers.networks:", "evaluation.teachers:", 1)) from error

    @property
    def _own_session(self) -> Session:
        """With the arithmetic that the observers were made with, whatever the students'."""
        return self._session.with_precision(self._recipe.precision)

    def labellers(self) -> tuple[Recipe, observers.Observers, Session]:
        """The recipe by which they label, with their networks; the networks; and a session with their arithmetic."""
        return self._recipe, self._observers, self._own_session

    @cached_property
    def _chosen(self) -> list[tuple[str, int]]:
        return selected(self._recipe, self._recipe.relabel.observers)

    @cached_property
    def networks(self) -> list[Network]:
        """The networks, frozen, on the session's device."""
        return [self._observers.load(name, epoch) for name, epoch in self._chosen]

    @property
    def fingerprints(self) -> list[str]:
        """One for the weights of each network."""
        return [self._observers.fingerprint(name, epoch) for name, epoch in self._chosen]

    @property
    def of_batches(self) -> bool:
        """Whether a label depends on the batch that the view is in."""
        return self._recipe.relabel.observer_mode == "batch"

    @property
    def bytes(self) -> int:
        """Size of their weights."""
        return sum(x.numel() * x.element_size() for network in self.networks for x in network.state_dict().values())

    @cached_property
    def teach(self) -> Teach:
        """Mean logits of views, with BatchNorm as in the set's own labels (`relabel.observer_mode`)."""
        label = labels.teacher(self.networks, self._recipe.relabel, self._own_session)
        return lambda x, table: label(x)


def of_images(condensed: CondensedSet, session: Session) -> Teach:
    """The stored soft label of each image whatever its view; of mixed views the mixture by share."""
    stored = condensed.of_pictures(condensed.soft_labels).to(session.device)

    def teach(x: Tensor, table: ViewTable) -> Tensor:
        first, second = table["image_id"].long(), table["mix_image_id"].long()
        share = table["mix_lam"].where(second >= 0, 1).to(stored.device).view(-1, 1)
        first, second = (ids.to(stored.device) for ids in (first, second.where(second >= 0, first)))
        return share * stored[first] + (1 - share) * stored[second]

    return teach
