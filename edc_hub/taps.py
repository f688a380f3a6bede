"""Per-image moments of what flows into a network's layers, differentiable back to the pixels (Eq. 4).

A tap is a forward pre-hook on one BatchNorm2d or Conv2d. It sums its input over positions (channel moments), and over
channels and the positions of a tile (patch moments), image by image: the statistics of a class, a block or a whole
set are weighted means of these. All is measured about a fixed shift, so that float32 serves where a mean is far
larger than its spread. Memory traffic is what taps cost: on a CPU they work in chunks that stay in the cache, and the
backward is written out; it adds to the gradient that the layer has just made and allocates nothing of its size.
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .errors import InputError
from .networks import Network


Kind = Literal["bn", "conv", "patch"]
KINDS: tuple[Kind, ...] = ("bn", "conv", "patch")
CHUNK = 1 << 19  # numbers of a tensor that are worked on together: 2 MiB, the level-2 caches of two cores
SMALL = 64  # positions up to which a shift is spread over them beforehand: short inner loops are slow
TINY = 16  # positions up to which a matrix product sums them faster than a reduction


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
        self._seen: dict[int, tuple[weakref.ref, _Site, tuple[Tensor, Tensor]]] = {}
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
        out = None
        if torch.is_grad_enabled():
            through, *moments = _Tap.apply(h, site, self._scratch)
            out = (through, *inputs[1:])
        else:
            moments = site.measure(h, self._scratch)
        self._moments[module] = first, second = tuple(moments)
        self._seen[id(h)] = weakref.ref(h), site, (first, second)
        return out

    def collect(self) -> tuple[Tensor, Tensor]:
        """Moments of the images of the last forward, about `shift` s: E[h - s] and E[(h - s)^2], float32 (B, F)."""
        moments = [self._moments[module] for module in self._sites]
        self._moments, self._seen = {}, {}
        return torch.cat([first for first, _ in moments], 1), torch.cat([second for _, second in moments], 1)


def _probe(network: Network, patch: int, layers: Sequence[Kind]) -> dict[nn.Module, "_Site"]:
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
    sites = {m: _Site(m, name, shapes[m], patch, layers) for name, m in network.module.named_modules() if m in shapes}
    return {module: site for module, site in sites.items() if site.parts}


class _Site:
    """One hooked input (B, D, H, W): its geometry, its shift, its sums and their pull-back."""

    def __init__(self, module: nn.Module, name: str, shape: torch.Size, side: int, layers: Sequence[Kind]):
        _, self.channels, height, width = shape
        kind: Kind = "bn" if isinstance(module, nn.BatchNorm2d) else "conv"
        self.kind, self.side, self.size, self.positions = kind, side, (height, width), height * width
        self.channel, self.patch = kind in layers, kind == "conv" and "patch" in layers
        self.columns = self.channels * self.channel
        self.grid = -(-height // side), -(-width // side)
        self.extent = self.grid[0] * side, self.grid[1] * side  # after the enlargement to whole tiles
        self.tiles = self.grid[0] * self.grid[1]
        self.aligned = self.extent == self.size
        # A layer of another class may hand its output's gradient on as its input's: that one is not ours to change.
        self.sole = type(module).forward in (nn.Conv2d.forward, nn.BatchNorm2d.forward)
        self.parts: list[tuple[str, Kind, int]] = [(name, kind, self.channels)] * self.channel
        self.parts += [(name, "patch", self.tiles)] * self.patch

    def set_shift(self, shift: Tensor) -> None:
        """`shift` (f,), as `parts` order it."""
        self.shift, tiles = shift, shift[self.columns :]
        # Where channels are not asked for, any shift of theirs will do: it cancels.
        channels = shift[: self.columns] if self.channel else tiles.mean().expand(self.channels)
        self.about = channels[:, None, None].expand(-1, *self.size)
        if self.positions <= TINY:
            self.about = self.about.contiguous()
        spread, tiles = channels - channels.mean(), tiles - channels.mean()
        self.weights = torch.stack([torch.ones_like(spread), spread])
        self.tile_first = spread.mean() - tiles
        self.tile_second = spread.square().mean() - 2 * spread.mean() * tiles + tiles.square()
        self.tile_cross = -2 / self.channels * tiles
        # what the gradient of a moment is multiplied by, for each column
        per_tile = 1 / (self.side**2 * self.channels)
        self.share = torch.full_like(shift, per_tile)
        self.share[: self.columns] = 1 / self.positions
        if self.patch and not self.aligned and self.tiles == 1:
            eye = torch.eye(self.positions, device=shift.device).view(-1, 1, *self.size)
            enlarge = F.interpolate(eye, self.extent, mode="bilinear").flatten(1)  # (HW, H'W')
            self.position_sum, self.gram = enlarge.sum(1), enlarge @ enlarge.t()

    def same(self, other: "_Site") -> bool:
        """Whether the other site's moments of a tensor are this one's."""
        return self.kind == other.kind and torch.equal(self.shift, other.shift)

    def measure(self, h: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:
        """First and second moments (B, f) of h (B, D, H, W) about the shift, in one pass over h.

        Of a tile they are taken about the channels' shifts c_d first, and moved to the tile's k afterwards:
        sum (h - k)^2 = sum (h - c_d)^2 + 2 (c_d - k) (h - c_d) + (c_d - k)^2.
        """
        images, step = len(h), self._step(h)
        rows = torch.empty(2, images, self.channels, device=h.device)
        from_rows = self.aligned and self.tiles == 1
        if self.patch and not from_rows:
            gram = not self.aligned and self.tiles == 1
            cells = self.positions if gram else self.extent[0] * self.extent[1]
            sums = torch.empty(images, 2, cells, device=h.device)
            squares = torch.empty((images, cells, cells) if gram else (images, cells), device=h.device)
        for start in range(0, images, step):
            part = slice(start, start + step)
            x = h[part]
            e = torch.sub(x, self.about, out=self._buffer(x, scratch))
            if self.channel or from_rows:
                self._sum_positions(e, rows[0, part])
            if self.patch and not from_rows:
                wide = e if self.aligned or gram else F.interpolate(e, self.extent, mode="bilinear")
                wide = wide.flatten(2)
                torch.matmul(self.weights, wide, out=sums[part])
                if gram:
                    torch.bmm(wide.mT, wide, out=squares[part])
                elif not self.aligned:
                    torch.sum(wide.square_(), 1, out=squares[part])
            e.square_()
            if self.channel or from_rows:
                self._sum_positions(e, rows[1, part])
            if self.patch and self.aligned and not from_rows:
                torch.sum(e.flatten(2), 1, out=squares[part])
        if self.patch:
            if from_rows:
                sums = rows[0] @ self.weights.t() / self.positions
                sums, squares = sums[:, :, None], rows[1].sum(1, keepdim=True) / self.positions
            elif gram:
                sums, squares = sums @ self.position_sum[:, None] / self.side**2, squares.flatten(1) @ self.gram.view(-1, 1) / self.side**2
            else:
                sums = F.avg_pool2d(sums.view(images, 2, *self.extent), self.side).flatten(2)
                squares = F.avg_pool2d(squares.view(images, 1, *self.extent), self.side).flatten(1)
            tile_first = torch.add(self.tile_first, sums[:, 0], alpha=1 / self.channels)
            tile_second = torch.addcmul(self.tile_second, sums[:, 0], self.tile_cross)
            tile_second.add_(sums[:, 1], alpha=2 / self.channels).add_(squares, alpha=1 / self.channels)
        rows.mul_(1 / self.positions)
        first, second = rows
        if not self.patch:
            return first, second
        if not self.channel:
            return tile_first, tile_second
        return torch.cat([first, tile_first], 1), torch.cat([second, tile_second], 1)

    def _step(self, h: Tensor) -> int:
        """Images that are worked on together."""
        return max(1, CHUNK // h[0].numel()) if h.device.type == "cpu" else len(h)

    def _buffer(self, x: Tensor, scratch: Tensor) -> Tensor:
        if x.device.type == "cpu":
            return scratch[: x.numel()].view(x.shape)
        return torch.empty_like(x, dtype=torch.float32)

    def _sum_positions(self, e: Tensor, out: Tensor) -> None:
        if self.positions <= TINY:
            torch.matmul(e.flatten(2), e.new_ones(self.positions), out=out)
        else:
            torch.sum(e, (2, 3), out=out)

    def pull_back(self, grad: Tensor, h: Tensor, first: Tensor, second: Tensor, scratch: Tensor) -> Tensor:
        """Adds to `grad` (B, D, H, W), in place, what the gradients (B, f) of both moments give for h.

        That is h * slope + offset. A gradient that all images share (as of a mean over the block) comes with stride
        0: slope and offset are then maps for one image.
        """
        if first.stride(0) == second.stride(0) == 0:
            first, second = first[:1], second[:1]
        slope = second * (2 * self.share)
        offset = torch.addcmul(first * self.share, slope, self.shift, value=-1)
        channel = [t[:, : self.columns, None, None] for t in (slope, offset)] if self.channel else []
        tile = []
        if self.patch and self.aligned:
            tile = [self._spread_tiles(t[:, self.columns :]) for t in (slope, offset)]
        elif self.patch:
            self._pull_back_tiles(grad, h, slope[:, self.columns :], offset[:, self.columns :], scratch)
        if channel or tile:
            self._add(grad, h, channel, tile, scratch)
        return grad

    def _spread_tiles(self, values: Tensor) -> Tensor:
        """(b, P) to maps (b, 1, H, W)."""
        if self.tiles == 1:
            return values[:, :, None, None]
        maps = values.reshape(-1, 1, self.grid[0], 1, self.grid[1], 1)
        return maps.expand(-1, -1, -1, self.side, -1, self.side).reshape(-1, 1, *self.extent)

    def _add(self, grad: Tensor, h: Tensor, channel: list[Tensor], tile: list[Tensor], scratch: Tensor) -> None:
        """grad += h * slope + offset, where slope and offset are the sums of a channel's and a tile's."""
        images, step = len(h), self._step(h)
        maps = [c + t for c, t in zip(channel, tile, strict=True)] if channel and tile and (len(tile[0]) == 1 or self.tiles == 1) else None
        if not (channel and tile):
            maps = channel or tile
        if maps and len(maps[0]) == 1 and self.positions <= SMALL:
            maps = [m.expand(-1, self.channels, *self.size).contiguous() for m in maps]
        for start in range(0, images, step):
            part = slice(start, start + step)
            g, x = grad[part], h[part]
            if maps:
                slope, offset = (m if len(m) == 1 else m[part] for m in maps)
            else:
                slope = torch.add(channel[0][part], tile[0][part], out=self._buffer(x, scratch))
            if g.dtype == torch.float32:
                g.addcmul_(x, slope)
            else:
                g += x * slope
            if not maps:
                offset = torch.add(channel[1][part], tile[1][part], out=self._buffer(x, scratch))
            g.add_(offset)

    def _pull_back_tiles(self, grad: Tensor, h: Tensor, slope: Tensor, offset: Tensor, scratch: Tensor) -> None:
        """The same through the enlargement to whole tiles."""
        images, step = len(h), self._step(h)
        if self.tiles == 1:
            offset = (offset * self.position_sum).view(-1, 1, *self.size)
        else:
            slope, offset = self._spread_tiles(slope), self._spread_tiles(offset)
        for start in range(0, images, step):
            part = slice(start, start + step)
            a, b = (t if len(t) == 1 else t[part] for t in (slope, offset))
            x = h[part]
            if self.tiles == 1:
                scaled = torch.mul(x, a[:, :, None, None], out=self._buffer(x, scratch))
                grad[part] += (scaled.flatten(2) @ self.gram).view(x.shape)
                grad[part] += b
                continue
            wide = F.interpolate(x.float(), self.extent, mode="bilinear")
            extra = torch.addcmul(b, wide, a)
            grad[part] += torch.ops.aten.upsample_bilinear2d_backward(extra, self.extent, x.shape, False, None, None)


class _Tap(torch.autograd.Function):
    """The identity on h, which also gives its moments."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, site: _Site, scratch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(h)
        ctx.site, ctx.scratch = site, scratch
        return h, *site.measure(h, scratch)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, None, None]:
        (h,) = ctx.saved_tensors
        return ctx.site.pull_back(grad if ctx.site.sole else grad.clone(), h, first, second, ctx.scratch), None, None
