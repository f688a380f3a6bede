"""What a step of synthesis goes down: the gradient of its loss, on a GPU replayed from a recording."""

import gc
from functools import partial

import torch
from torch import Tensor

from .crops import placed
from .objective import AVERAGED, Draws, Objective
from .recorded import Recorded
from .work import Session


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
