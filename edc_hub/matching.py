"""The terms of the synthesis loss, one function each (EDC section 3.2, Eq. 2, 5 and 7; G-VBSM's densification)."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .recipe import Synthesize
from .section import Flatness
from .taps import Layout
from .targets import Targets


def group(first: Tensor, second: Tensor, shift: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of groups of images, both (G, F).

    Args:
        first, second: float32 (B, F), moments of each image about `shift`: E[h - s], E[(h - s)^2].
        shift: float32 (F,).
        weights: float32 (G, B), what each image counts in each group; rows sum to 1. None: one group, all alike,
            whose gradient the taps recognise as the same for every image.
    """
    if weights is None:
        mean, square = first.sum(0, keepdim=True) / len(first), second.sum(0, keepdim=True) / len(second)
    else:
        mean, square = weights @ first, weights @ second
    return shift + mean, square - mean.square()


class Running:
    """Statistic EMA of G-VBSM and EDC's code: the average's value, with the gradient of the present batch.

    S <- m S + (1 - m) s, given as S / (1 - m^t) + s - sg(s): bias corrected, so the first visit gives s itself. Theirs
    is not corrected: after nine visits at m = 0.8 it is 0.87 of the average, and the loss asks for more contrast.
    """

    def __init__(self, momentum: float):
        self.momentum, self.average, self.weight = momentum, None, None

    def __call__(self, statistic: Tensor, keep: bool = True) -> Tensor:
        """The averaged statistic, of the shape given, the same at each call. `keep`: later calls remember this."""
        present = statistic.detach()
        if self.average is None:  # tensors that stay where they are, as a step that is replayed needs them
            self.average = torch.zeros_like(present)
            self.weight = torch.zeros((), dtype=torch.float64, device=present.device)
        average = self.average.lerp(present, 1 - self.momentum)
        weight = self.momentum * self.weight + (1 - self.momentum)
        if keep:
            self.average.copy_(average)
            self.weight.copy_(weight)
        return statistic + (average / weight - present)


def segment_norms(difference: Tensor, layout: Layout) -> Tensor:
    """Euclidean norm of each segment, (…, F) to (…, S). Its gradient at 0 is 0."""
    parts = difference.square().split([segment.length for segment in layout.segments], -1)
    squares = torch.stack([part.sum(-1) for part in parts], -1)
    positive = squares > 0
    return squares.masked_fill(~positive, 1.0).sqrt() * positive


def layer_losses(mean: Tensor, var: Tensor, target_mean: Tensor, target_var: Tensor, layout: Layout) -> Tensor:
    """Un-squared distances of a layer's means and variances, of channels and tiles: (…, F) to (…, L). Eq. 2."""
    norms = segment_norms(torch.stack([mean - target_mean, var - target_var]), layout).sum(0)
    segments = _segments(layout, norms.device)
    parts = F.pad(norms, (0, 1)).index_select(-1, segments.flatten())
    return parts.unflatten(-1, segments.shape).sum(-1)  # always in this order, unlike index_add on a GPU


@cache
def _segments(layout: Layout, device: torch.device) -> Tensor:
    """The segments of each layer, int64 (L, n), rows filled up with S; kept, as a copy to a GPU is waited for."""
    of_layers = [[] for _ in range(layout.layers)]
    for number, segment in enumerate(layout.segments):
        of_layers[segment.layer].append(number)
    most, none = max(map(len, of_layers)), [len(layout.segments)]
    return torch.tensor([numbers + none * (most - len(numbers)) for numbers in of_layers], device=device)


class Matcher:
    """The matching loss of one observer in one block (Eq. 5).

    `labels` int64 (B,) are the block's. With `class_scope: per_class` each class's images have statistics and running
    averages of their own, weighted by the class's share of the block; with `mixture` and `local` the statistics of
    the block are compared with `targets.mixture_*`.
    """

    def __init__(self, targets: Targets, section: Synthesize, labels: Tensor):
        layout, device = targets.layout, targets.global_mean.device
        self.targets, self.alpha, self.drop_rate = targets, section.alpha, section.drop_rate
        weights = torch.ones(layout.layers)
        weights[0] = section.first_layer
        self.weights = weights.to(device)
        self.conv = torch.zeros(layout.layers, dtype=torch.bool)
        self.conv[[segment.layer for segment in layout.segments if segment.kind != "bn"]] = True
        self.per_class = section.class_scope == "per_class"
        members = (targets.class_ids.cpu()[:, None] == labels.cpu()).float().to(device)
        self.shares = members.mean(1)  # p(c)
        self.members = members / members.sum(1, keepdim=True)
        self.running = {"block": Running(section.ema), "classes": Running(section.ema)}

    def drop(self, generator: torch.Generator) -> Tensor | None:
        """The layers that a step leaves out, bool (L,) on the CPU, each a convolution; None with `drop_rate: 0`."""
        if self.drop_rate == 0:
            return None
        return self.conv & (torch.rand(len(self.conv), generator=generator) < self.drop_rate)

    def __call__(self, first: Tensor, second: Tensor, dropped: Tensor | None = None, keep: bool = True) -> Tensor:
        """The sum over layers of w_l [alpha * global + (1 - alpha) * class], a scalar.

        `first`, `second` (B, F) are the block's moments about `targets.global_mean`. `dropped` is what `drop` gave.
        `keep`: the running averages remember these moments.
        """
        targets, alpha = self.targets, self.alpha
        forms: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor | float]] = []
        if alpha > 0 or not self.per_class:
            mean, var = self._statistics("block", first, second, None, keep)
        if alpha > 0:
            forms.append((mean, var, targets.global_mean, targets.global_var, alpha))
        if alpha < 1 and not self.per_class:
            forms.append((mean, var, targets.mixture_mean, targets.mixture_var, 1 - alpha))
        if alpha < 1 and self.per_class:
            mean, var = self._statistics("classes", first, second, self.members, keep)
            share = (1 - alpha) * self.shares[:, None]
            forms.append((mean, var, targets.class_mean, targets.class_var, share))
        losses = sum((share * layer_losses(*form, targets.layout)).sum(0) for *form, share in forms)
        weights = self.weights
        if dropped is not None:
            weights = weights.masked_fill(dropped.to(weights.device), 0.0)
        return weights @ losses

    def _statistics(
        self, name: str, first: Tensor, second: Tensor, weights: Tensor | None, keep: bool
    ) -> tuple[Tensor, Tensor]:
        """Running mean and variance of groups, both (G, F)."""
        return self.running[name](torch.stack(group(first, second, self.targets.global_mean, weights)), keep).unbind()

    def flatness(self, present: tuple[Tensor, Tensor], averaged: tuple[Tensor, Tensor]) -> Tensor:
        """L_FR, unweighted: the distances of Eq. 2 between the statistics of the images and of their running average.

        Both are moments (B, F) as `__call__` takes them. The statistics are the block's, of this view alone; layers
        count as they do there.
        """
        shift = self.targets.global_mean
        (mean, var), target = group(*present, shift), group(*averaged, shift)
        losses = layer_losses(mean, var, *(statistic.detach() for statistic in target), self.targets.layout)[0]
        return self.weights @ losses

    def state(self) -> dict[str, Tensor]:
        """What the rest of the block depends on."""
        tensors = {}
        for name, running in self.running.items():
            if running.average is not None:
                tensors |= {name: running.average, f"{name}.weight": running.weight}
        return tensors

    def restore(self, state: dict[str, Tensor]) -> None:
        """Takes back what `state` gave."""
        for name, running in self.running.items():
            if name in state:
                parts = state[name], state[f"{name}.weight"]
                running.average, running.weight = (part.to(self.shares.device, copy=True) for part in parts)


def flatness(logits: Tensor, averaged: Tensor, section: Flatness) -> Tensor:
    """L'_FR, unweighted: KL between the softened predictions of the images and of their running average.

    `paper`: KL(softmax(f(X) / tau) || softmax(f(X_EMA) / tau)), Eq. 7; `code`: the other way round.
    `batchmean` divides by B, `mean` by B * C. No factor tau^2. Both logits (B, C).
    """
    present, average = (F.log_softmax(z / section.tau, -1) for z in (logits, averaged.detach()))
    target, other = (present, average) if section.direction == "paper" else (average, present)
    divergence = F.kl_div(other, target, reduction="batchmean", log_target=True)
    return divergence / logits.shape[1] if section.reduction == "mean" else divergence


def densification(images: Tensor, labels: Tensor, tau: float) -> Tensor:
    """G-VBSM's data densification, unweighted: sum over classes of KL(sg softmax(e / tau) || softmax(e)).

    e are the eigenvalues of the Gram matrix of a class's images, average-pooled to at most 32 pixels a side and
    flattened. A class with one image gives 0, and so do real images at the published tau of 4: the eigenvalues are
    hundreds apart, and both distributions one-hot in float32. `images` (B, 3, s, s), `labels` int64 (B,).
    """
    rows = F.adaptive_avg_pool2d(images, min(32, images.shape[-1])).flatten(1)
    order = labels.argsort(stable=True)
    counts = labels.unique(return_counts=True)[1]
    loss = images.new_zeros(())
    starts = counts.cumsum(0) - counts
    for count in counts.unique().tolist():  # classes of equal size go together
        if count > 1:
            members = starts[counts == count, None] + torch.arange(count, device=labels.device)
            block = rows[order[members]]
            spectrum = torch.linalg.eigvalsh(block @ block.mT)
            target = F.softmax(spectrum.detach() / tau, -1)
            loss = loss + F.kl_div(F.log_softmax(spectrum, -1), target, reduction="sum")
    return loss


def total_variation(z: Tensor) -> Tensor:
    """R_TV of SRe2L's code, unweighted: the norms of a view's differences of neighbours, across, down and diagonal.

    `z` (B, 3, s, s), normalised. Each of the four norms is un-squared and over the whole block, as in DeepInversion.
    """
    across, down = z[:, :, :, 1:] - z[:, :, :, :-1], z[:, :, 1:] - z[:, :, :-1]
    falling, rising = z[:, :, 1:, 1:] - z[:, :, :-1, :-1], z[:, :, :-1, 1:] - z[:, :, 1:, :-1]
    return sum(torch.linalg.vector_norm(difference) for difference in (across, down, falling, rising))


def mean_norm(z: Tensor) -> Tensor:
    """R_l2 of SRe2L's code, unweighted: the mean un-squared norm of an image of a normalised view (B, 3, s, s)."""
    return torch.linalg.vector_norm(z.flatten(1), dim=1).mean()
