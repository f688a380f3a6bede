"""Per-image moments of what flows into a network's layers, differentiable back to the pixels (Eq. 4).

A tap is a forward pre-hook on one BatchNorm2d or Conv2d. It sums its input over positions (channel moments), and over
channels and the positions of a tile (patch moments), image by image: the statistics of a class, a block or a whole
set are weighted means of these. All is measured about a fixed shift, so that float32 serves where a mean is far
larger than its spread. Memory traffic is what taps cost: on a CPU they work in chunks that stay in the cache, and the
backward is written out; it adds to the gradient that the layer has just made and allocates nothing of its size.
"""

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import InputError
from .networks import Network


Kind = Literal["bn", "conv", "patch"]
KINDS: tuple[Kind, ...] = ("bn", "conv", "patch")
CHUNK = 1 << 19  # numbers of a tensor that are worked on together: 2 MiB, the level-2 caches of two cores
SMALL = 64  # positions up to which a shift is spread over them beforehand: short inner loops are slow


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

    The network must be in eval mode. `layers` picks what is measured: the channels of BatchNorm2d inputs, of Conv2d
    inputs, the tiles of Conv2d inputs. Raises InputError if the network has nothing of the kind.
    """

    def __init__(self, network: Network, *, patch: int, layers: Sequence[Kind] = KINDS):
        self._module = network.module
        self._layers = _probe(network, patch, layers)
        parts = []
        for layer in self._layers.values():
            parts += [(layer.name, layer.kind, layer.channels)] * layer.channel_asked
            parts += [(layer.name, "patch", layer.tiles)] * layer.patch_asked
        if not parts:
            raise InputError(
                f"synthesize.layers: {network.facts['arch']} has no input of the kinds {', '.join(layers)}; add others"
            )
        self.layout = Layout.of(parts)
        self._handles: list[Any] = []
        self.shift = torch.zeros(self.layout.size, device=network.mean.device)

    @property
    def shift(self) -> Tensor:
        """float32 (F,), what moments are measured about: best the mean that is expected. 0 at first."""
        return self._shift

    @shift.setter
    def shift(self, shift: Tensor) -> None:
        self._shift = shift
        asked = {(s.name, s.kind): shift[s.start : s.start + s.length] for s in self.layout.segments}
        for layer in self._layers.values():
            layer.set_shift(asked.get((layer.name, layer.kind)), asked.get((layer.name, "patch")))

    def __enter__(self) -> "Taps":
        self._fed: list[tuple[weakref.ref, tuple[Tensor, Tensor]]] = []
        self._handles = [module.register_forward_pre_hook(self._tap) for module in self._layers]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _tap(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        layer, h = self._layers[module], inputs[0]
