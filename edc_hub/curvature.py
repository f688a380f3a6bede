"""The Hessian of the synthesis loss along the optimisation of one block (EDC section 3.2: flatness; Figure 2).

The taps that synthesis uses write their backward out and cannot be differentiated twice, so here the same moments are
taken by plain operations: slower, and with memory for every intermediate map, which a block at a time bears. A ReLU's
second derivative is 0, as automatic differentiation has it: what its kinks add is left out. (Differences of gradients
would add it, and grow without bound as their step shrinks.)
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import encoding, synthesize, work
from .condensed import CondensedSet
from .initialize import Initial
from .objective import Observed, pick
from .observers import Observers
from .pixels import Space
from .realset import RealSet
from .recipe import Recipe, Synthesize
from .selection import selected, title
from .taps import Taps
from .targets import Moments
from .work import Progress, Session


class Estimate(NamedTuple):
    """Hutchinson's estimates at one point, in float32; `_se` are standard errors over the random vectors."""

    loss: float
    gradient: float  # L2 norm
    trace: float
    trace_se: float
    frobenius: float
    frobenius_se: float


def hutchinson(loss: Callable[[Tensor], Tensor], z: Tensor, samples: int, generator: torch.Generator) -> Estimate:
    """Trace and Frobenius norm of the Hessian H of `loss` at `z`: E[v.Hv] and sqrt(E|Hv|^2), v of random signs.

    Args: loss: of a tensor of the shape of z, twice differentiable; z: any shape, float; samples: vectors v, at least
    2; generator: on the CPU. The error of the norm is that of the mean square, carried through the root.
    """
    z = z.detach().requires_grad_()
    value = loss(z)
    (slope,) = torch.autograd.grad(value, z, create_graph=True)
    traces, squares = torch.empty(2, samples, dtype=torch.float64)
    for index in range(samples):
        signs = torch.randint(2, z.shape, generator=generator).mul_(2).sub_(1).to(z)
        (product,) = torch.autograd.grad(slope, z, signs, retain_graph=index + 1 < samples)
        traces[index], squares[index] = (signs * product).double().sum(), product.double().square().sum()
    errors = [float(values.std()) / math.sqrt(samples) for values in (traces, squares)]
    norm = math.sqrt(float(squares.mean()))
    at_norm = errors[1] / (2 * norm) if norm else 0.0
    size = slope.detach().norm()
    return Estimate(value.item(), size.item(), float(traces.mean()), errors[0], norm, at_norm)


class Plain:
    """What `Taps` measure, by operations that can be differentiated twice. Used in its place: `with`, `collect`."""

    def __init__(self, taps: Taps):
        self.taps, self.seen = taps, {}

    def __enter__(self) -> "Plain":
        self.seen = {}
        self._handles = [module.register_forward_pre_hook(self._keep) for module in self.taps.sites]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.seen.setdefault(module, inputs[0])  # a layer that is used twice counts where it is used first

    def collect(self) -> tuple[Tensor, Tensor]:
        """Moments of the images of the last forward about the taps' shift, float32 (B, F)."""
        first, second = [], []
        for module, site in self.taps.sites.items():
            h, parts = self.seen[module].float(), []
            if site.channel:
                parts.append(h.flatten(2))
            if site.tile != "none":
                wide = h if site.extent == site.size else F.interpolate(h, site.extent, mode="bilinear")
                tiles = wide.unflatten(3, (-1, site.side)).unflatten(2, (-1, site.side))  # (B, D, rows, u, columns, v)
                parts.append(tiles.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))
            shifts = self.taps.shift[self.taps.columns[module]].split([part.shape[1] for part in parts])
            for part, shift in zip(parts, shifts, strict=True):
                apart = part - shift[:, None]
                first.append(apart.mean(2))
                second.append(apart.square().mean(2))
        self.seen = {}
        return torch.cat(first, 1), torch.cat(second, 1)


@contextmanager
def twice_differentiable(observed: Sequence[Observed]) -> Iterator[None]:
    """Losses of these observers can be differentiated twice inside."""
    before = [one.taps for one in observed]
    for one in observed:
        one.taps = {side: Plain(taps) for side, taps in one.taps.items()}
    try:
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no second derivative
            yield
    finally:
        for one, taps in zip(observed, before, strict=True):
            one.taps = taps


def watched(section: Synthesize, observers: int, every: int) -> list[int]:
    """Steps that are looked at: from each multiple of `every`, and up to the last, as many as there are observers.

    A step sees one observer in turn, so many steps see them all.
    """
    last = section.iterations
    starts = [*range(0, last, every), max(0, last - observers)]
    return sorted({step for start in starts for step in range(start, min(start + observers, last))})


def along_synthesis(
    recipe: Recipe,
    real: RealSet,
    watching: Observers,
    moments: Moments,
    initial: Initial,
    condensed: CondensedSet,
    session: Session,
    *,
    every: int,
    samples: int,
) -> dict[str, Any]:
    """Makes the first block of a run again and looks at the Hessian of each watched step's loss with respect to z.

    The loss is that of the step: its observers, its view, the running statistics' memory held fixed. z (B, 3, s, s) is
    in units of the source's std. All is in float32, whatever the run's precision. `difference` is how far the block
    ends from the images of the set: their mean absolute difference, of 255.
    """
    session, section = session.with_precision("float32"), recipe.synthesize
    chosen = selected(recipe, section.observers)
    name, (ids, labels) = next(iter(synthesize.blocks(recipe, len(real.names)).items()))
    generator = work.generator(recipe.seed, synthesize.STAGE, name)
    observed = synthesize.observe(recipe, real, watching, moments, labels, session, generator, watching.load)
    steps, found = set(watched(section, len(observed), every)), []
    bar = session.bar(total=len(steps), desc="hessian", unit="step", leave=False)

    def watch(step: int, z: Tensor, loss: Callable[[Tensor], Tensor]) -> None:
        if step not in steps:
            return
        signs = work.generator(recipe.seed, "diagnosis", f"hessian {step}")
        with twice_differentiable(observed):
            estimate = hutchinson(loss, z, samples, signs)
        turn = pick(observed, section, step, generator) if section.pick == "turn" else ()  # a draw is not known again
        names = [title(*chosen[index]) for index in turn] or None
        found.append({"step": step, "observers": names, **estimate._asdict()})
        bar.update()

    nowhere = Progress(session.store.root / "diagnosis" / "never", math.inf)  # nothing is saved
    with bar:
        z, _ = synthesize.optimise(initial.images[ids], labels, observed, recipe, session, generator, nowhere, watch)
    files = encoding.encode(Space(recipe.source, session.device).to_bytes(z), recipe.images)
    apart = encoding.decode(files).float() - condensed.images[ids].float()
    return {
        "block": {"images": len(ids), "values": z.numel(), "iterations": section.iterations},
        "samples": samples,
        "difference": round(float(apart.abs().mean()), 4),
        "steps": found,
    }
