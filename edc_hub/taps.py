"""Per-image moments of what flows into a network's layers, differentiable back to the pixels (Eq. 2).

A tap is a forward pre-hook on one BatchNorm2d or Conv2d. It sums its input over positions (channel moments), and over
channels and the positions of a tile (patch moments), image by image: the statistics of a class, a block or a whole
set are weighted means of these. All is measured about a fixed shift, so that float32 serves where a mean is far
larger than its spread. Memory traffic is what taps cost: on a CPU they work in chunks that stay in the cache, and the
backward is written out; it adds to the gradient that the layer has just made and allocates nothing of its size.
"""

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .errors import InputError
from .networks import Network
from .sites import CHUNK, KINDS, Kind, Site


class Segment(NamedTuple):
    """One statistic of one layer: columns `start : start + length` of the flat feature axis."""

    layer: int
    name: str
    kind: Kind
    start: int
    length: int


class Layout(NamedTuple):
    """The flat feature axis F of a network: its layers as `named_modules` orders them, channels before tiles."""

    segments: tuple[Segment, ...]

    @classmethod
    def of(cls, parts: Iterable[tuple[str, Kind, int]]) -> "Layout":
        """From (layer name, kind, length) in order; layers are numbered as their names appear."""
        segments, numbers, start = [], {}, 0
        for name, kind, length in parts:
            segments.append(Segment(numbers.setdefault(name, len(numbers)), name, kind, start, length))
            start += length
        return cls(tuple(segments))

    @property
    def size(self) -> int:
        """F."""
        return sum(segment.length for segment in self.segments)

    @property
    def layers(self) -> int:
        """L."""
        return len({segment.layer for segment in self.segments})

    def keep(self, kinds: Iterable[Kind]) -> tuple["Layout", Tensor]:
        """The layout of these kinds alone, layers numbered anew, and its columns in this one: int64 (F',)."""
        kept = [segment for segment in self.segments if segment.kind in kinds]
        columns = [torch.arange(segment.start, segment.start + segment.length) for segment in kept]
        return Layout.of((segment.name, segment.kind, segment.length) for segment in kept), torch.cat(columns)


class Taps:
    """Hooks on the layers of a network, in place inside `with taps:`.

    with taps:
        logits = network(x)
    first, second = taps.collect()

    The network must be in eval mode. `layers` picks what is measured: channels of BatchNorm2d inputs, channels of
    Conv2d inputs, tiles of Conv2d inputs (`patch` a side). Raises InputError if the network has nothing of the kind.
    """

    def __init__(self, network: Network, *, patch: int, layers: Sequence[Kind] = KINDS):
        self._sites = _probe(network, patch, layers)
        self.layout = Layout.of(part for site in self._sites.values() for part in site.parts)
        if not self.layout.segments:
            arch = network.facts["arch"]
            raise InputError(f"synthesize.layers: {arch} has no {' or '.join(layers)} input to match; add another kind")
        largest = max(site.channels * site.positions for site in self._sites.values())
        self._scratch = torch.empty(max(CHUNK, largest))
        self.shift = torch.zeros(self.layout.size, device=network.mean.device)

    @property
    def shift(self) -> Tensor:
        """float32 (F,), what moments are measured about: best the mean that is expected. 0 at first."""
        return self._shift

    @shift.setter
    def shift(self, shift: Tensor) -> None:
        self._shift, start = shift, 0
        for site in self._sites.values():
            columns = sum(length for _, _, length in site.parts)
            site.set_shift(shift[start : start + columns])
            start += columns

    def __enter__(self) -> "Taps":
        self._seen: dict[int, tuple[weakref.ref, Site, tuple[Tensor, Tensor]]] = {}
        self._moments: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self._handles = [module.register_forward_pre_hook(self._tap) for module in self._sites]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _tap(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        site, h = self._sites[module], inputs[0]
        seen = self._seen.get(id(h))
        if seen and seen[0]() is h and site.same(seen[1]):  # conv1 and the shortcut of a residual block
            self._moments[module] = seen[2]
            return None
        with torch.autocast(h.device.type, enabled=False):  # it would halve the precision of the sums' products
            if torch.is_grad_enabled():
                through, *moments = _Tap.apply(h, site, self._scratch)
            else:
                through, *moments = h, *site.measure(h, self._scratch)
        self._moments[module] = moments
        self._seen[id(h)] = weakref.ref(h), site, moments
        return through, *inputs[1:]

    def collect(self) -> tuple[Tensor, Tensor]:
        """Moments of the images of the last forward, about `shift` s: E[h - s] and E[(h - s)^2], float32 (B, F)."""
        moments = [self._moments[module] for module in self._sites]
        self._moments, self._seen = {}, {}
        return torch.cat([first for first, _ in moments], 1), torch.cat([second for _, second in moments], 1)


def _probe(network: Network, patch: int, layers: Sequence[Kind]) -> dict[nn.Module, "Site"]:
    """Sites in the order of `named_modules`, from the shapes that one image meets."""
    shapes: dict[nn.Module, torch.Size] = {}
    watched = [m for m in network.module.modules() if isinstance(m, nn.BatchNorm2d | nn.Conv2d)]
    handles = [m.register_forward_pre_hook(lambda m, inputs: shapes.update({m: inputs[0].shape})) for m in watched]
    size = network.facts["input_size"] or network.facts["image_size"]
    try:
        with torch.no_grad():
            network(network.mean.expand(1, 3, size, size))
    finally:
        for handle in handles:
            handle.remove()
    sites = {m: Site(m, name, shapes[m], patch, layers) for name, m in network.module.named_modules() if m in shapes}
    return {module: site for module, site in sites.items() if site.parts}


class _Tap(torch.autograd.Function):
    """The identity on h, which also gives its moments."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, site: Site, scratch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(h)
        ctx.site, ctx.scratch = site, scratch
        return h, *site.measure(h, scratch)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, None, None]:
        (h,) = ctx.saved_tensors
        grad = grad if ctx.site.sole else grad.clone()
        ctx.site.pull_back(grad, h, first, second, ctx.scratch)
        return grad, None, None
