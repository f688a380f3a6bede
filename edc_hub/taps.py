"""Per-image moments of what flows into a network's layers, differentiable back to the pixels (Eq. 2).

A tap is a forward pre-hook on one BatchNorm2d or Conv2d. It sums its input over positions (channel moments), and over
channels and the positions of a tile (patch moments), image by image: the statistics of a class, a block or a whole
set are weighted means of these. All is measured about a fixed shift, so that float32 serves where a mean is far
larger than its spread. What they cost, and why, is in sites.py.
"""

import itertools
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
        columns = [n for segment in kept for n in range(segment.start, segment.start + segment.length)]
        layout = Layout.of((segment.name, segment.kind, segment.length) for segment in kept)
        return layout, torch.tensor(columns, dtype=torch.int64)


class Taps:
    """Hooks on the layers of a network, in place inside `with taps:`.

    with taps:
        logits = network(x)
    first, second = taps.collect()

    The network must be in eval mode. `layers` picks what is measured: channels of BatchNorm2d inputs, channels of
    Conv2d inputs, tiles of Conv2d inputs (`patch` a side). Raises InputError if the network has nothing of the kind.
    `size` is the side of the images, where not the network's `image_size`.
    """

    def __init__(self, network: Network, *, patch: int, layers: Sequence[Kind] = KINDS, size: int | None = None):
        self.sites = _probe(network, patch, layers, size)
        self.layout = Layout.of(part for site in self.sites.values() for part in site.parts)
        if not self.layout.segments:
            arch, kinds = network.facts["arch"], " or ".join(layers)
            remedy = "add another kind, or name others in synthesize.observers"
            raise InputError(f"synthesize.layers: {arch} has no {kinds} input to match; {remedy}")
        ends = itertools.accumulate(sum(length for *_, length in site.parts) for site in self.sites.values())
        self.columns = {m: slice(*pair) for m, pair in zip(self.sites, itertools.pairwise([0, *ends]), strict=True)}
        values = torch.tensor([count for site in self.sites.values() for count in site.values])
        lengths = torch.tensor([segment.length for segment in self.layout.segments])
        self.share = (1 / values).repeat_interleave(lengths).to(network.mean)  # of one value in each moment
        # One place to work in for all sites: on a CPU it stays in the cache.
        self.scratch = torch.empty(max(CHUNK, *(site.channels * site.positions for site in self.sites.values())))
        self.shift = torch.zeros_like(self.share)

    @property
    def shift(self) -> Tensor:
        """float32 (F,), what moments are measured about: best the mean that is expected. 0 at first."""
        return self._shift

    @shift.setter
    def shift(self, shift: Tensor) -> None:
        self._shift, self._alike = shift, {}
        for module, site in self.sites.items():
            site.set_shift(shift[self.columns[module]])
        scale, *add = (
            torch.cat([getattr(site, name) for site in self.sites.values()])
            for name in ("scale", "add_first", "add_second")
        )
        self.scale, self.add = scale, add

    def alike(self, one: nn.Module, other: nn.Module) -> bool:
        """Whether both layers' moments of the same tensor are the same; compared once, as that waits for a GPU."""
        if (one, other) not in self._alike:
            self._alike[one, other] = self.sites[one].same(self.sites[other])
        return self._alike[one, other]

    def split(self, columns: Tensor) -> dict[nn.Module, list[Tensor]]:
        """Views of (b, F) for each layer and each of its parts."""
        views = iter(columns.split([segment.length for segment in self.layout.segments], 1))
        return {module: [next(views) for _ in site.parts] for module, site in self.sites.items()}

    def __enter__(self) -> "Taps":
        self._pass = _Pass(self)
        self._handles = [module.register_forward_pre_hook(self._pass.tap) for module in self.sites]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def collect(self) -> tuple[Tensor, Tensor]:
        """Moments of the images of the last forward, about `shift` s: E[h - s] and E[(h - s)^2], float32 (B, F)."""
        done, self._pass = self._pass, None
        tokens, done.tokens = done.tokens, []
        return _Collect.apply(done, *tokens)


def _probe(network: Network, patch: int, layers: Sequence[Kind], size: int | None) -> dict[nn.Module, "Site"]:
    """Sites in the order of `named_modules`, from the shapes that one image meets."""
    shapes: dict[nn.Module, torch.Size] = {}
    watched = [m for m in network.module.modules() if isinstance(m, nn.BatchNorm2d | nn.Conv2d)]

    def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        shapes.setdefault(module, inputs[0].shape)

    handles = [module.register_forward_pre_hook(look) for module in watched]
    size = network.facts["input_size"] or size or network.facts["image_size"]
    try:
        with torch.no_grad():
            network(network.mean.expand(1, 3, size, size))
    finally:
        for handle in handles:
            handle.remove()
    sites = {m: Site(m, name, shapes[m], patch, layers) for name, m in network.module.named_modules() if m in shapes}
    return {module: site for module, site in sites.items() if site.parts}


class _Pass:
    """One forward through the hooks, and the backward through it."""

    def __init__(self, taps: Taps):
        self.taps, self.shift, self.scale, self.add = taps, taps.shift, taps.scale, taps.add
        self.moments: tuple[Tensor, Tensor] | None = None  # (B, F), first and second
        self.slope: dict[nn.Module, tuple[Tensor, ...]] = {}  # h * slope + offset is added to the gradient of h
        self.offset: dict[nn.Module, tuple[Tensor, ...]] = {}
        self.tokens: list[Tensor] = []
        self.met: dict[int, tuple[weakref.ref, nn.Module]] = {}
        self.copied: dict[nn.Module, nn.Module | None] = {}  # where a layer's moments come from

    def tap(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """The hook: measures the layer's input, and passes it on."""
        if module in self.copied:  # a layer that the network uses twice counts where it is used first
            return inputs
        h = inputs[0]
        alive, other = self.met.get(id(h), (None, None))
        if other is None or alive() is not h or not self.taps.alike(module, other):
            self.met[id(h)], other = (weakref.ref(h), module), None
        self.copied[module] = other
        if other:  # the shortcut of a residual block is fed the same tensor as its first layer
            return inputs
        if not torch.is_grad_enabled():
            self.measure(module, h)
            return inputs
        through, token = _Tap.apply(h, self, module)
        self.tokens.append(token)
        return through, *inputs[1:]

    def measure(self, module: nn.Module, h: Tensor) -> None:
        """Has the moments of one layer's input written to their columns."""
        if self.moments is None:
            self.moments = torch.empty(2, len(h), len(self.shift), device=h.device).unbind()
            first, second = (self.taps.split(moments) for moments in self.moments)
            self.views = {module: list(zip(first[module], second[module], strict=True)) for module in first}
        if torch.is_autocast_enabled(h.device.type):  # it would halve the precision of the sums' products
            with torch.autocast(h.device.type, enabled=False):
                return self.taps.sites[module].measure(h, self.views[module], self.taps.scratch)
        self.taps.sites[module].measure(h, self.views[module], self.taps.scratch)

    def finish(self) -> tuple[Tensor, Tensor]:
        """First and second moments (B, F)."""
        assert self.copied.keys() == self.taps.sites.keys(), "the network took another way than at first"
        for module, other in self.copied.items():
            for mine, theirs in zip(self.views[module], self.views[other], strict=True) if other else ():
                mine[0].copy_(theirs[0])
                mine[1].copy_(theirs[1])
        (first, second), self.moments, self.views = self.moments, None, {}
        for moments, add in zip((first, second), self.add, strict=True):
            torch.addcmul(add, moments, self.scale, out=moments)
        return first, second

    def set_gradient(self, first: Tensor, second: Tensor) -> None:
        """From the gradients (B, F) of the moments. Those that all images share, as a mean's, come with stride 0."""
        if first.stride(0) == second.stride(0) == 0:
            first, second = first[:1], second[:1]
        slope = second * (2 * self.taps.share)
        self.slope = self.taps.split(slope)
        self.offset = self.taps.split(torch.addcmul(first * self.taps.share, slope, self.shift, value=-1))
        for module, other in self.copied.items():
            for gradient in (self.slope, self.offset) if other else ():
                for mine, theirs in zip(gradient[module], gradient[other], strict=True):
                    theirs += mine

    def pull_back(self, module: nn.Module, grad: Tensor, h: Tensor) -> Tensor:
        """The gradient of h: the layer's, `grad`, and that of the moments."""
        if not self.slope:  # the moments were not used
            return grad
        site = self.taps.sites[module]
        grad = grad if site.sole else grad.clone()
        site.pull_back(grad, h, self.slope[module], self.offset[module], self.taps.scratch)
        return grad


class _Tap(torch.autograd.Function):
    """The identity on h, measured. The token ties it to `_Collect`, whose backward has to come first."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, work: _Pass, module: nn.Module) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(h)
        ctx.work, ctx.module = work, module
        work.measure(module, h)
        return h, h.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        return ctx.work.pull_back(ctx.module, grad, *ctx.saved_tensors), None, None


class _Collect(torch.autograd.Function):
    """The moments that the taps have written."""

    @staticmethod
    def forward(ctx: Any, work: _Pass, *tokens: Tensor) -> tuple[Tensor, Tensor]:
        ctx.work = work
        return work.finish()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, first: Tensor, second: Tensor) -> tuple[None, ...]:
        ctx.work.set_gradient(first, second)
        return (None,) * len(ctx.needs_input_grad)
