"""The loss of one step of synthesis: which observers see the block in which view, and what they say of it; and its
gradient, on a GPU replayed from a recording."""

import gc
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import canvas, matching, networks
from .crops import Crop, Mix, placed
from .errors import InputError
from .matching import Matcher
from .networks import Network
from .pixels import Space
from .recipe import Recipe, Synthesize
from .recorded import Recorded
from .rules import other_tiles
from .section import Flatness
from .taps import Taps
from .targets import Targets
from .work import Session


AVERAGED = ("logits", "statistics")  # kinds of flatness that look at the averaged images


class Observed:
    """One observer in one block: its network with taps on the layers, and the matcher that holds its targets.

    `accuracy` is its on the check images, 0 to 1, for `pick: accuracy`.
    """

    def __init__(
        self,
        network: Network,
        targets: Targets,
        labels: Tensor,
        recipe: Recipe,
        session: Session,
        accuracy: float | None = None,
    ):
        self.network, self.autocast, self.accuracy = network, session.autocast, accuracy
        sides = recipe.synthesize.sizes or [recipe.source.size]
        self.taps = {side: _taps(network, targets, side, recipe) for side in sides}
        self.matcher = Matcher(targets, recipe.synthesize, labels)

    def loss(
        self,
        x: Tensor,
        averaged: Tensor | None,
        labels: Tensor,
        section: Synthesize,
        dropped: Tensor | None = None,
        *,
        mix: Mix | None = None,
        keep: bool = True,
    ) -> Tensor:
        """CE + r * sum of layer losses + flatness: a scalar of the view `x` (B, 3, v, v) in [0, 1].

        `averaged` is the same view of the averaged images, where flatness asks for it; `dropped` are the layers that
        are left out, bool (L,); `mix` says how both views are mixed. `keep`: the running statistics remember this one.
        """
        logits, moments = self._forward(x)
        loss = F.cross_entropy(logits, labels) if mix is None else mix.cross_entropy(logits, labels)
        loss = loss + section.weight * self.matcher(*moments, dropped, keep)
        if averaged is not None:
            loss = loss + section.flatness.weight * self._flatness(logits, moments, averaged, section.flatness)
        return loss

    def _forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Logits float32 (B, C) of a view, and its moments (B, F)."""
        taps = self.taps[x.shape[-1]]
        with self.autocast(), taps:
            logits = self.network(x).float()
        return logits, taps.collect()

    def _flatness(self, logits: Tensor, moments: tuple[Tensor, Tensor], averaged: Tensor, section: Flatness) -> Tensor:
        """L'_FR or L_FR, unweighted, of a view with these logits and moments."""
        if section.kind == "statistics":
            with torch.no_grad():
                target = self._forward(averaged)[1]
            return self.matcher.flatness(moments, target)
        with torch.no_grad(), self.autocast():
            target = self.network(averaged).float()
        return matching.flatness(logits, target, section)


def _taps(network: Network, targets: Targets, side: int, recipe: Recipe) -> Taps:
    """Taps for views of `side` pixels. Raises InputError where the network cannot take these, or has other statistics
    of them than `targets`."""
    if recipe.synthesize.sizes:
        networks.check(network, side, "write other synthesize.sizes")
    taps = Taps(network, patch=recipe.moments.patch, layers=recipe.synthesize.layers, size=side)
    if len(targets.global_mean) != taps.layout.size:
        raise InputError(other_tiles(network.facts["arch"], side))
    taps.shift = targets.global_mean
    return taps


def pick(observed: list[Observed], section: Synthesize, step: int, generator: torch.Generator) -> tuple[int, ...]:
    """The `together` observers of a step: the next in turn, or distinct ones drawn evenly or by their accuracies."""
    count, among = section.together, len(observed)
    if section.pick == "turn":
        return tuple(index % among for index in range(step * count, (step + 1) * count))
    weights = [one.accuracy for one in observed] if section.pick == "accuracy" else [1.0] * among
    drawn = torch.multinomial(torch.tensor(weights, dtype=torch.float64), count, generator=generator)
    return tuple(drawn.tolist())


class Draws(NamedTuple):
    """All that a step draws, once for all its losses."""

    crop: Callable[[Tensor], Tensor]
    """A `Crop`, or its matrices alone, `placed`."""
    mix: Mix
    chosen: tuple[int, ...]
    """The observers that see the step."""
    dropped: tuple[Tensor | None, ...]
    """The layers that each of them leaves out, bool (L,)."""


class Objective:
    """The loss of a block's steps, a function of its normalised images."""

    def __init__(self, observed: list[Observed], labels: Tensor, recipe: Recipe, device: torch.device):
        """Args: labels: int64 (B * grid^2,) on the device, of the pictures that B canvases decode to."""
        self.observed, self.labels, self.section = observed, labels, recipe.synthesize
        self.space, self.size, self.grid = Space(recipe.source, device), recipe.source.size, recipe.images.grid

    def draw(self, step: int, generator: torch.Generator) -> Draws:
        """What a step draws, in this order: its view, who sees it, how it is mixed, and what these leave out."""
        section, among = self.section, len(self.observed)
        crop = Crop(self.size, section, generator, step, among)
        chosen = pick(self.observed, section, step, generator)
        mix = Mix(section, len(self.labels), crop.size, self.space.mean, generator)
        dropped = tuple(self.observed[index].matcher.drop(generator) for index in chosen)
        return Draws(crop, mix, chosen, dropped)

    def loss(self, drawn: Draws, z: Tensor, average: Tensor, keep: bool = False) -> Tensor:
        """The loss of a step at z (B, 3, s, s), a scalar: same draws and z, same loss.

        `average` (B, 3, s, s) is X_EMA, with this step's images in it. It and z are canvases of grid x grid pictures,
        and these are looked at. `keep`: running statistics remember them.
        """
        section, averaged = self.section, None
        if section.flatness.kind in AVERAGED:
            averaged = self._view(drawn, average)
        x = self._view(drawn, z)
        losses = [
            self.observed[index].loss(x, averaged, self.labels, section, dropped, mix=drawn.mix, keep=keep)
            for index, dropped in zip(drawn.chosen, drawn.dropped, strict=True)
        ]
        total = sum(losses) / len(losses)
        if section.densification.weight:
            z = self.space.normalise(x)  # as every pixel term of the family; a crop of z is the z of the crop
            term = matching.densification(z, self.labels, section.densification.tau)
            total = total + section.densification.weight * term
        seen = self.space.normalise(x)  # apart from z: slopes that meet at x add up in the order of earlier releases
        if section.tv:
            total = total + section.tv * matching.total_variation(seen)
        if section.l2:
            total = total + section.l2 * matching.mean_norm(seen)
        return total

    def _view(self, drawn: Draws, z: Tensor) -> Tensor:
        return drawn.mix(drawn.crop(self.space.to_x(canvas.decode(z, self.grid))))


class Slope:
    """The loss of a step and its gradient (B, 3, s, s), float32, both without a graph.

    On a CUDA device each choice of observers is recorded once, with the step's draws as inputs: it launches hundreds
    of kernels on a block that takes a GPU a millisecond. Mixed views change shapes from step to step, and are not.
    """

    def __init__(self, objective: Objective, session: Session, *, record: bool = True):
        """Args: record: on a CUDA device; memory is then taken twice, for steps as they are and for recordings."""
        self.objective, self.device = objective, session.device
        # the statistics' part of a gradient is about 1e-7, where float16 ends
        self.plain = partial(_slope, objective, 4096.0 if session.arithmetic == torch.float16 else 1.0)
        self.recorded: dict[tuple[int, ...], Recorded] | None = None
        if record and self.device.type == "cuda" and objective.section.mix == "none":
            gc.collect()  # recordings of work that is over
            self.recorded, self.pool = {}, torch.cuda.graph_pool_handle()

    def __call__(self, drawn: Draws, z: Tensor, average: Tensor) -> tuple[Tensor, Tensor]:
        """At z (B, 3, s, s), with the averaged images (B, 3, s, s). Raises LinAlgError for z that are no numbers."""
        z = z.detach()
        if self.recorded is None:
            return self.plain(drawn, z, average)
        order = sorted(range(len(drawn.chosen)), key=drawn.chosen.__getitem__)
        chosen, dropped = (tuple(part[index] for index in order) for part in (drawn.chosen, drawn.dropped))
        if chosen not in self.recorded:
            plain, of = self.plain, drawn._replace(chosen=chosen)  # without `self`: recordings end with theirs

            def of_tensors(
                z: Tensor, average: Tensor | None, places: Tensor, *dropped: Tensor | None
            ) -> tuple[Tensor, Tensor]:
                return plain(of._replace(crop=partial(placed, places), dropped=dropped), z, average)

            self.recorded[chosen] = Recorded(of_tensors, self.device, pool=self.pool)
        average = average if self.objective.section.flatness.kind in AVERAGED else None
        places = self._there(drawn.crop.places(z.shape[-1]))
        return self.recorded[chosen](z, average, places, *map(self._there, dropped))

    def _there(self, draws: Tensor | None) -> Tensor | None:
        """On the device, without waiting for it."""
        if draws is None or self.device.type == "cpu":
            return draws
        return draws.pin_memory().to(self.device, non_blocking=True)


def _slope(
    objective: Objective, scale: float, drawn: Draws, z: Tensor, average: Tensor | None
) -> tuple[Tensor, Tensor]:
    flatness = objective.section.flatness

    def at(z: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
        z = z.detach().requires_grad_()
        value = objective.loss(drawn, z, average, keep=keep)
        (gradient,) = torch.autograd.grad(value * scale, z)
        return value.detach(), gradient / scale

    if flatness.kind != "sam":
        return at(z, keep=True)
    value, gradient = at(z, keep=False)
    away = z + gradient * (flatness.rho / (gradient.square().mean().sqrt() + 1e-12))
    return value, at(away, keep=True)[1]  # the running statistics remember what the step's gradient is taken at
