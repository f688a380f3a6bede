"""Synthesis: the initial images are optimised until the observers' statistics of them are those of the real set.

EDC section 3.2: Eq. 2 and 5 for the statistics, Eq. 7 for flatness. The optimised tensor `z` lives in the
source's normalised space, so learning rates are in units of the source's std, as in every paper of the family;
networks see `x = z * std + mean` in [0, 1].
"""

import math
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from . import matching, work
from .errors import InputError
from .initialize import Initial
from .moments import of_images
from .networks import Network
from .objective import AVERAGED, Objective, Observed, Slope
from .observers import Observers
from .pixels import Space
from .recipe import Recipe, Synthesize
from .selection import selected
from .source import RealSet
from .targets import Moments, Targets
from .work import Progress, Session, Unit


STAGE, VERSION = "blocks", 1
LATER = ("tv", "l2", "curriculum", "sizes", "mix", "mix_alpha", "pick", "together", "residual")  # keys since version 1


def cut(classes: int, ipc: int, block: int, order: str) -> list[Tensor]:
    """Image ids of each block, int64. An image's id is `class * ipc + k`.

    `class_major` cuts 0, 1, 2, … into blocks; `across_class` takes the first image of every class, then the second.
    """
    ids = torch.arange(classes * ipc)
    if order == "across_class":
        ids = ids.view(classes, ipc).t().reshape(-1)
    return list(ids.split(block))


def blocks(recipe: Recipe, classes: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each block, by the name of its unit of work: its image ids and the labels of their pictures, both int64."""
    found, section = {}, recipe.synthesize
    for index, ids in enumerate(cut(classes, recipe.ipc, section.block, section.block_order)):
        labels = (ids // recipe.ipc).repeat_interleave(recipe.images.grid**2)
        found[f"{recipe.name}-ipc{recipe.ipc}-{index:05d}"] = ids, labels
    return found


def cosine(step: int, steps: int) -> float:
    """Factor of the learning rate at `step` of `steps`: from 1 down to nearly 0 (Tables 6-10)."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def optimise(
    images: Tensor,
    labels: Tensor,
    observed: list[Observed],
    recipe: Recipe,
    session: Session,
    generator: torch.Generator,
    progress: Progress,
    watch: Callable[[int, Tensor, Callable[[Tensor], Tensor]], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Optimises one block.

    Args:
        images: uint8 (B, 3, s, s), what it starts from.
        labels: int64 (B * grid^2,), of the pictures that the images decode to (`images.grid`).
        observed: the observers, of which `pick` says who sees a step.
        generator: of this block; every draw comes from it.
        progress: saves inside the block.
        watch: called before each step's update with the step, z (B, 3, s, s) and the step's loss as a function of z;
            what it does changes nothing. Gradients of the loss cannot be differentiated again, as the taps'
            backward is written out; `curvature` has a loss that can.

    Returns:
        float32 (B, 3, s, s), the last iterate in normalised space, and float32 (T,), the loss of each step.
    """
    section = recipe.synthesize
    flatness, residual = section.flatness, section.residual
    objective = Objective(observed, labels.to(session.device), recipe, session.device)
    space = objective.space
    slope = Slope(objective, session, record=watch is None)
    initial = space.to_z(images)
    z, average = initial.clone().requires_grad_(), initial.clone()  # average is X_EMA
    adam = torch.optim.Adam([z], lr=section.lr, betas=tuple(section.betas), eps=section.eps)
    losses = torch.zeros(section.iterations, device=session.device)  # read at the end: no synchronisation in the loop
    start = _restore(progress, z, average, adam, losses, observed, generator)
    bar = session.bar(range(start, section.iterations), desc="synthesize", unit="it", leave=False)
    for step in bar:
        done = step + 1
        adam.param_groups[0]["lr"] = section.lr * cosine(step, section.iterations)
        if flatness.kind in AVERAGED:
            average.lerp_(z.detach(), 1 - flatness.beta)
        drawn = objective.draw(step, generator)
        if watch is not None:
            watch(step, z.detach(), partial(objective.loss, drawn, average=average))
        try:
            losses[step], z.grad = slope(drawn, z, average)
        except torch.linalg.LinAlgError as error:  # the spectrum of what is no number
            raise _no_number(step, session.precision) from error
        adam.step()
        space.clamp(z)
        if residual.every and done % residual.every == 0 and done < section.iterations:
            with torch.no_grad():
                z.lerp_(initial, residual.weight)
            average.lerp_(initial, residual.weight)
            adam.state.clear()  # FADRM begins anew, but for the learning rate
        if step % 50 == 0:
            bar.set_postfix(loss=f"{losses[step]:.3f}")
        progress.save(lambda done=done: _saved(done, z, average, adam, losses, observed, generator))
    broken = (~losses.isfinite()).nonzero().flatten().tolist()
    broken += [] if z.isfinite().all() else [section.iterations]
    if broken:  # its pixels are no numbers either, and would be published as black
        raise _no_number(broken[0], session.precision)
    return z.detach(), losses


def _no_number(step: int, precision: str) -> InputError:
    other = "raise synthesize.eps" if precision == "float32" else "write precision: float32"
    remedy = f"lower synthesize.lr or synthesize.weight, or {other}"
    return InputError(f"synthesize: the loss is no number from step {step} on; {remedy}")


def _saved(step, z, average, adam, losses, observed, generator) -> dict[str, Tensor]:
    tensors = {"step": torch.tensor(step), "z": z, "average": average, "losses": losses}
    tensors |= {f"adam.{key}": value for key, value in adam.state.get(z, {}).items()}
    tensors["generator"] = generator.get_state()
    for index, one in enumerate(observed):
        tensors |= {f"{index}.{key}": value for key, value in one.matcher.state().items()}
    return tensors


def _restore(progress, z, average, adam, losses, observed, generator) -> int:
    saved = progress.load()
    if saved is None:
        return 0
    with torch.no_grad():
        z.copy_(saved["z"])
    average.copy_(saved["average"])
    losses.copy_(saved["losses"])
    if "adam.step" in saved:  # not right after a merge
        adam.state[z] = {key[5:]: value.to(z.device) for key, value in saved.items() if key.startswith("adam.")}
        adam.state[z]["step"] = saved["adam.step"]  # Adam keeps its count on the CPU
    generator.set_state(saved["generator"])
    for index, one in enumerate(observed):
        prefix = f"{index}."
        one.matcher.restore({key[len(prefix) :]: value for key, value in saved.items() if key.startswith(prefix)})
    return int(saved["step"])


def obtain(
    recipe: Recipe, real: RealSet, observers: Observers, moments: Moments | None, initial: Initial, session: Session
) -> Tensor:
    """The condensed images, uint8 (C*IPC, 3, s, s), class-major. With `iterations: 0` the initial images."""
    section = recipe.synthesize
    if section.iterations == 0:
        return initial.images
    chosen, own = selected(recipe, section.observers), blocks(recipe, len(real.names))
    settings = {
        "seed": recipe.seed,
        "precision": session.precision,
        "synthesize": _facts(section),
        "moments": moments.fingerprint(chosen),
        "source": [recipe.source.mean, recipe.source.std],
        "initial": initial.fingerprint,
    }
    mark = work.fingerprint(STAGE, VERSION, **settings)
    units = [Unit(STAGE, name, mark) for name in own]
    load = cache(observers.load)  # when the first missing block needs them

    def make(unit: Unit, generator: torch.Generator, progress: Progress) -> tuple[dict[str, Tensor], dict]:
        ids, labels = own[unit.name]
        observed = observe(recipe, real, observers, moments, labels, session, generator, load)
        z, losses = optimise(initial.images[ids], labels, observed, recipe, session, generator, progress)
        return {"images": Space(recipe.source, session.device).to_bytes(z), "losses": losses}, {}

    work.run(units, make, session, seed=recipe.seed, label="synthesize")
    result = torch.empty_like(initial.images)
    for unit in units:
        result[own[unit.name][0]] = session.store.load(unit)["images"]
    return result


def observe(
    recipe: Recipe,
    real: RealSet,
    observers: Observers,
    moments: Moments,
    labels: Tensor,
    session: Session,
    generator: torch.Generator,
    load: Callable[[str, int], Network],
) -> list[Observed]:
    """The observers of a block with its targets; `labels` int64 (B,) are those of its pictures."""
    section, counts = recipe.synthesize, torch.bincount(labels, minlength=len(real.names))
    fresh = section.class_scope == "local"
    drawn = draw_real(real, counts, section.local_images, generator) if fresh else ()
    observed = []
    for name, epoch in selected(recipe, section.observers):
        network, targets = load(name, epoch), moments.targets(name, epoch, counts)
        if fresh:
            targets = retarget(targets, network, *drawn, recipe, session)
        accuracy = observers.facts(name, epoch)["accuracy"] if section.pick == "accuracy" else None
        observed.append(Observed(network, targets, labels, recipe, session, accuracy))
    return observed


def _facts(section: Synthesize) -> dict:
    """Every key that decides the images; those of `LATER` only where used, so that blocks made before are found."""
    facts, plain = section.model_dump(exclude={"observers"}), Synthesize()
    for key in LATER:
        if getattr(section, key) == getattr(plain, key):
            del facts[key]
    if section.flatness.kind == "sam":
        facts["flatness"]["radius"] = "root mean square"  # it was a norm over the block
    else:
        del facts["flatness"]["rho"]
    if section.alpha == 1:
        facts["class_scope"] = plain.class_scope  # there is no class form
    return facts


# The class form of `class_scope: local`


def draw_real(real: RealSet, counts: Tensor, each: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Freshly drawn real images of a block's classes, and what each counts in the block's statistics.

    Args:
        counts: int64 (C,), images of each class in the block.
        each: real images drawn of each of these classes, fewer where a class has fewer.

    Returns:
        uint8 (n, 3, s, s) and float32 (n,), which sums to 1: each class has its share of the block.
    """
    rows, weights = [], []
    for label in counts.nonzero().flatten().tolist():
        of_class = real.rows(label)
        drawn = of_class[torch.randperm(len(of_class), generator=generator)[:each]]
        rows.append(drawn)
        weights.append(torch.full((len(drawn),), float(counts[label]) / float(counts.sum()) / len(drawn)))
    return real.images(torch.cat(rows)), torch.cat(weights)


def retarget(
    targets: Targets, network: Network, images: Tensor, weights: Tensor, recipe: Recipe, session: Session
) -> Targets:
    """`targets` with the class form of `class_scope: local`: the statistics of these real images together.

    The alternative that the released code has under this name; the global form stays as it is.
    """
    shift = targets.global_mean
    first, second = of_images(network, images, shift, recipe.synthesize.layers, recipe, session)
    mean, var = matching.group(first, second, shift, weights.to(session.device)[None])
    return targets._replace(mixture_mean=mean[0], mixture_var=var[0])
