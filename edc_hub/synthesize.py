"""Synthesis: the initial images are optimised until the observers' statistics of them are those of the real set.

EDC section 3.2: Eq. 2 and 5 for the statistics, Eq. 7 for flatness. The optimised tensor `z` lives in the
source's normalised space, so learning rates are in units of the source's std, as in every paper of the family;
networks see `x = z * std + mean` in [0, 1].
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import matching, pixels, work
from .errors import InputError
from .initialize import Initial
from .matching import Matcher
from .moments import Moments, Targets
from .networks import Network
from .observers import Observers
from .recipe import Recipe, Source, Synthesize, selected
from .source import RealSet
from .taps import Taps
from .work import Progress, Session, Unit


STAGE, VERSION = "blocks", 1


def plan(classes: int, ipc: int, block: int, order: str) -> list[Tensor]:
    """Image ids of each block, int64. An image's id is `class * ipc + k`.

    `class_major` cuts 0, 1, 2, … into blocks; `across_class` takes the first image of every class, then the second.
    """
    ids = torch.arange(classes * ipc)
    if order == "across_class":
        ids = ids.view(classes, ipc).t().reshape(-1)
    return list(ids.split(block))


def cosine(step: int, steps: int) -> float:
    """Factor of the learning rate at `step` of `steps`: from 1 down to nearly 0 (Tables 6-10)."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


class Space:
    """The map between stored images, the optimised `z` and what networks see. Shapes (B, 3, s, s)."""

    def __init__(self, source: Source, device: torch.device):
        self.mean = torch.tensor(source.mean, device=device).view(1, 3, 1, 1)
        self.std = torch.tensor(source.std, device=device).view(1, 3, 1, 1)

    def to_z(self, images: Tensor) -> Tensor:
        """uint8 to normalised float32."""
        return self.normalise(images.to(self.mean.device).float() / 255)

    def normalise(self, x: Tensor) -> Tensor:
        """[0, 1] to normalised float."""
        return (x - self.mean) / self.std

    def to_x(self, z: Tensor) -> Tensor:
        """Normalised float to [0, 1]."""
        return z * self.std + self.mean

    def clamp(self, z: Tensor) -> None:
        """Keeps x in [0, 1], in place."""
        with torch.no_grad():
            z.clamp_(-self.mean / self.std, (1 - self.mean) / self.std)

    def to_bytes(self, z: Tensor) -> Tensor:
        """Normalised float to uint8 on the CPU, rounded."""
        return self.to_x(z).mul(255).round().clamp(0, 255).to(torch.uint8).cpu()


class Crop:
    """One RandomResizedCrop, flip and roll, shared by the whole block, drawn anew each step."""

    def __init__(self, size: int, section: Synthesize, generator: torch.Generator):
        draws = torch.rand(pixels.CROP_DRAWS + 2, generator=generator, dtype=torch.float64).numpy()
        area = section.crop_area[0], section.crop_area[1]
        self.size, self.box = size, pixels.crop_box(size, size, draws, area, (3 / 4, 4 / 3))
        self.flip = section.flip and draws[22] < 0.5
        roll = [int(draw * (2 * section.jitter + 1)) - section.jitter for draw in draws[pixels.CROP_DRAWS :]]
        self.roll = roll if any(roll) else None

    def __call__(self, x: Tensor) -> Tensor:
        """(B, 3, s, s) to the same shape, differentiable."""
        left, top, right, bottom = self.box
        x = x[:, :, top:bottom, left:right]
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", align_corners=False)
        if self.flip:
            x = x.flip(-1)
        return x if self.roll is None else x.roll(self.roll, (-2, -1))


class Observed:
    """One observer in one block: its network with taps on the layers, and the matcher that holds its targets."""

    def __init__(self, network: Network, targets: Targets, labels: Tensor, recipe: Recipe, session: Session):
        self.network, self.autocast = network, session.autocast
        self.pixels = Space(recipe.source, session.device)
        self.taps = Taps(network, patch=recipe.moments.patch, layers=recipe.synthesize.layers)
        self.taps.shift = targets.global_mean
        self.matcher = Matcher(targets, recipe.synthesize, labels)

    def loss(
        self, x: Tensor, averaged: Tensor | None, labels: Tensor, section: Synthesize, generator: torch.Generator
    ) -> Tensor:
        """CE + r * sum of layer losses + flatness + densification: a scalar of the view `x` (B, 3, s, s) in [0, 1].

        `averaged` is the same view of the averaged images, where flatness asks for it.
        """
        with self.autocast(), self.taps:
            logits = self.network(x).float()
        loss = F.cross_entropy(logits, labels)
        loss = loss + section.weight * self.matcher(*self.taps.collect(), generator)
        if averaged is not None:
            with torch.no_grad(), self.autocast():
                target = self.network(averaged).float()
            loss = loss + section.flatness.weight * matching.flatness(logits, target, section.flatness)
        if section.densification.weight:
            z = self.pixels.normalise(x)  # as every pixel term of the family; a crop of z is the z of the crop
            term = matching.densification(z, labels, section.densification.tau)
            loss = loss + section.densification.weight * term
        return loss


def optimise(
    images: Tensor,
    labels: Tensor,
    observed: list[Observed],
    recipe: Recipe,
    session: Session,
    generator: torch.Generator,
    progress: Progress,
) -> tuple[Tensor, Tensor]:
    """Optimises one block.

    Args:
        images: uint8 (B, 3, s, s), what it starts from.
        labels: int64 (B,).
        observed: the observers, visited round-robin.
        generator: of this block; every draw comes from it.
        progress: saves inside the block.

    Returns:
        float32 (B, 3, s, s), the last iterate in normalised space, and float32 (T,), the loss of each step.
    """
    section, space = recipe.synthesize, Space(recipe.source, session.device)
    labels = labels.to(session.device)
    z = space.to_z(images).requires_grad_()
    average = z.detach().clone()  # X_EMA
    adam = torch.optim.Adam([z], lr=section.lr, betas=tuple(section.betas), eps=section.eps)
    losses = torch.zeros(section.iterations, device=session.device)  # read at the end: no synchronisation in the loop
    start = _restore(progress, z, average, adam, losses, observed, generator)
    half = session.dtype == torch.float16 and session.device.type != "cpu"
    scale = 4096.0 if half else 1.0  # the statistics' part of a gradient is about 1e-7, where float16 ends
    bar = session.bar(range(start, section.iterations), desc="synthesize", unit="it", leave=False)
    for step in bar:
        adam.param_groups[0]["lr"] = section.lr * cosine(step, section.iterations)
        crop = Crop(images.shape[-1], section, generator)
        flat = section.flatness.kind == "logits"
        if flat:
            average.lerp_(z.detach(), 1 - section.flatness.beta)
        x, averaged = crop(space.to_x(z)), crop(space.to_x(average)) if flat else None
        loss = observed[step % len(observed)].loss(x, averaged, labels, section, generator)
        (gradient,) = torch.autograd.grad(loss * scale, z)
        z.grad = gradient / scale
        adam.step()
        space.clamp(z)
        losses[step] = loss.detach()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{losses[step]:.3f}")
        done = step + 1
        progress.save(lambda done=done: _saved(done, z, average, adam, losses, observed, generator))
    broken = (~losses.isfinite()).nonzero().tolist()
    if broken:  # its pixels are no numbers either, and would be published as black
        remedy = "lower synthesize.lr or synthesize.weight, or write precision: float32"
        raise InputError(f"synthesize: the loss is no number from step {broken[0][0]} on; {remedy}")
    return z.detach(), losses


def _saved(step, z, average, adam, losses, observed, generator) -> dict[str, Tensor]:
    tensors = {"step": torch.tensor(step), "z": z, "average": average, "losses": losses}
    tensors |= {f"adam.{key}": value for key, value in adam.state[z].items()}
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
    adam.state[z] = {key[5:]: value.to(z.device) for key, value in saved.items() if key.startswith("adam.")}
    adam.state[z]["step"] = saved["adam.step"]  # Adam keeps its count on the CPU
    generator.set_state(saved["generator"])
    for index, one in enumerate(observed):
        prefix = f"{index}."
        one.matcher.restore({key[len(prefix) :]: value for key, value in saved.items() if key.startswith(prefix)})
    return int(saved["step"])


def local_images(real: RealSet, counts: Tensor, each: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
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


def local_targets(
    targets: Targets, network: Network, images: Tensor, weights: Tensor, recipe: Recipe, session: Session
) -> Targets:
    """`targets` with the class form of `class_scope: local`: the statistics of these real images together.

    The alternative that the released code has under this name; the global form stays as it is.
    """
    taps = Taps(network, patch=recipe.moments.patch, layers=recipe.synthesize.layers)
    taps.shift = targets.global_mean
    first, second = [], []
    for part in images.split(recipe.moments.batch):
        with torch.no_grad(), session.autocast(), taps:
            network(part.to(session.device).float() / 255)
        moments = taps.collect()
        first.append(moments[0])
        second.append(moments[1])
    weights = weights.to(session.device)[None]
    mean, var = matching.group(torch.cat(first), torch.cat(second), targets.global_mean, weights)
    return targets._replace(mixture_mean=mean[0], mixture_var=var[0])


def obtain(
    recipe: Recipe, real: RealSet, observers: Observers, moments: Moments | None, initial: Initial, session: Session
) -> Tensor:
    """The condensed images, uint8 (C*IPC, 3, s, s), class-major. With `iterations: 0` the initial images."""
    section = recipe.synthesize
    if section.iterations == 0:
        return initial.images
    chosen = selected(recipe, section.observers)
    blocks = plan(len(real.names), recipe.ipc, section.block, section.block_order)
    labels = torch.arange(len(real.names)).repeat_interleave(recipe.ipc)
    settings = {
        "seed": recipe.seed,
        "precision": recipe.precision if session.device.type != "cpu" else "float32",
        "synthesize": section.model_dump(exclude={"observers"}),
        "moments": moments.fingerprint(chosen),
        "source": [recipe.source.mean, recipe.source.std],
        "initial": initial.fingerprint,
    }
    mark = work.fingerprint(STAGE, VERSION, **settings)
    units = [Unit(STAGE, f"{recipe.name}-ipc{recipe.ipc}-{index:05d}", mark) for index in range(len(blocks))]
    networks = {}  # loaded when the first missing block needs them

    def make(unit: Unit, generator: torch.Generator, progress: Progress) -> tuple[dict[str, Tensor], dict]:
        ids = blocks[units.index(unit)]
        counts = torch.bincount(labels[ids], minlength=len(real.names))
        observed, local = [], section.class_scope == "local"
        drawn = local_images(real, counts, section.local_images, generator) if local else ()
        for name, epoch in chosen:
            if (name, epoch) not in networks:
                networks[name, epoch] = observers.load(name, epoch)
            targets = moments.targets(name, epoch, counts)
            if local:
                targets = local_targets(targets, networks[name, epoch], *drawn, recipe, session)
            observed.append(Observed(networks[name, epoch], targets, labels[ids], recipe, session))
        z, losses = optimise(initial.images[ids], labels[ids], observed, recipe, session, generator, progress)
        return {"images": Space(recipe.source, session.device).to_bytes(z), "losses": losses}, {}

    work.run(units, make, session, seed=recipe.seed, label="synthesize")
    result = torch.empty_like(initial.images)
    for unit, ids in zip(units, blocks, strict=True):
        result[ids] = session.store.load(unit)["images"]
    return result
