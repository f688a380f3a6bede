"""One hooked input: the moments of each image in few passes, and what their gradients give back.

The moments of the real set and synthesis use the same sums. Memory traffic and the number of calls are all they cost:
on a CPU a site works in chunks that stay in the cache, and the backward, which is written out, adds to the gradient
that the layer has just made.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


Kind = Literal["bn", "conv", "patch"]
KINDS: tuple[Kind, ...] = ("bn", "conv", "patch")
CHUNK = 1 << 19  # numbers that are worked on together: 2 MiB, the level-2 caches of two cores
SMALL = 64  # positions up to which inner loops are so short that maps are spread out beforehand
TINY = 16  # positions up to which a matrix product sums them faster than a reduction


class Site:
    """The input (B, D, H, W) of one layer: what is asked of it, and the shift its moments are about.

    Channel moments are over positions. Patch moments are over channels and the positions of a tile, `side` a side; a
    map of another size is first enlarged (bilinear) to whole tiles. h may have any memory format and precision;
    moments are float32.
    """

    def __init__(self, module: nn.Module, name: str, shape: torch.Size, side: int, layers: Sequence[Kind]):
        _, self.channels, height, width = shape
        kind: Kind = "bn" if isinstance(module, nn.BatchNorm2d) else "conv"
        self.kind, self.side, self.size, self.positions = kind, side, (height, width), height * width
        self.grid = -(-height // side), -(-width // side)
        self.extent = self.grid[0] * side, self.grid[1] * side
        self.channel, patch = kind in layers, kind == "conv" and "patch" in layers
        self.columns, tiles = self.channels * self.channel, self.grid[0] * self.grid[1]
        self.parts: list[tuple[str, Kind, int]] = [(name, kind, self.channels)] * self.channel
        self.parts += [(name, "patch", tiles)] * patch
        self.values = [self.positions] * self.channel + [self.channels * side**2] * patch
        """How many values each of the `parts` is a mean of."""
        # How tiles are summed. The map is one tile: from the channels' sums; or less than one: by a small matrix.
        self.tile: Literal["none", "map", "small", "pooled", "enlarged"] = "none"
        if patch and tiles == 1:
            self.tile = "map" if self.extent == self.size else "small"
        elif patch:
            self.tile = "pooled" if self.extent == self.size else "enlarged"
        # A layer of another class may hand its output's gradient on as its input's: that one is not ours to change.
        self.sole = type(module).forward in (nn.Conv2d.forward, nn.BatchNorm2d.forward)

    def set_shift(self, shift: Tensor) -> None:
        """`shift` (f,) of the channels and tiles asked for."""
        self.shift, tiles = shift, shift[self.columns :]
        # Where channels are not asked for, any shift of theirs will do: it cancels.
        channels = shift[: self.columns] if self.channel else tiles.mean().expand(self.channels)
        self.about = channels[:, None, None].expand(-1, *self.size)
        if self.positions < TINY:
            self.about = self.about.contiguous()
        self.ones = shift.new_ones(self.positions)
        spread, tiles = channels - channels.mean(), tiles - channels.mean()
        self.weights = torch.stack([torch.ones_like(spread), 2 * spread]) / self.channels
        self.tile_slope = -2 * tiles
        # `finish`: moments are scale * what is measured + add
        none = shift.new_zeros(self.columns)
        self.scale = torch.cat([none + 1 / self.positions, torch.ones_like(tiles)])
        self.add_first = torch.cat([none, spread.mean() - tiles])
        self.add_second = torch.cat([none, spread.square().mean() - 2 * spread.mean() * tiles + tiles.square()])
        if self.tile == "small":
            self._set_small(shift.device)

    def _set_small(self, device: torch.device) -> None:
        """A map h smaller than a tile, enlarged to it: the tile's mean is w.h, its mean square |h R|^2 = h.G h.

        A product with so small a matrix is slow: where it can, it takes the maps of several channels at once.
        """
        eye = torch.eye(self.positions, dtype=torch.float64).view(-1, 1, *self.size)
        enlarged = self._enlarged(eye).flatten(1)  # (HW, side^2)
        gram = enlarged @ enlarged.t() / self.side**2
        values, vectors = torch.linalg.eigh(gram)
        root = vectors * values.clamp_min(0).sqrt()
        several = [n for n in (2, 4, 8, 16) if n * self.positions <= TINY and self.channels % n == 0]
        self.tile_average = enlarged.mean(1).float().to(device)
        self.gram, self.root = (torch.block_diag(*[m.float()] * max([1, *several])).to(device) for m in (gram, root))

    def same(self, other: "Site") -> bool:
        """Whether the other site's moments of a tensor are this one's."""
        return self.kind == other.kind and torch.equal(self.shift, other.shift)

    def measure(self, h: Tensor, moments: Sequence[tuple[Tensor, Tensor]], scratch: Tensor) -> None:
        """Writes what `finish` makes first and second moments of, in one pass over h.

        `moments` holds a pair (B, length) for each of the `parts`: sums over positions of h - c_d and (h - c_d)^2,
        and for tiles the means that moving these to the tile's own shift k needs:
        (h - k)^2 = (h - c_d)^2 + 2 (c_d - k) (h - c_d) + (c_d - k)^2. `scratch` is memory to work in.
        """
        rows = moments[0] if self.channel else None
        if self.tile == "map" and not rows:
            rows = h.new_empty(2, len(h), self.channels, dtype=torch.float32).unbind()
        if self.tile in ("small", "pooled", "enlarged"):
            cells = 1 if self.tile == "small" else self.extent[0] * self.extent[1]
            sums, squares = (h.new_empty(len(h), n, cells, dtype=torch.float32) for n in (2, 1))
        for part in self._chunks(h):
            x = _cut(h, part)
            e = torch.sub(x, self.about, out=_room(x, scratch))
            if self.tile == "small":
                torch.mm(e.flatten(2) @ self.tile_average, self.weights.t(), out=_cut(sums, part)[:, :, 0])
                product = e.reshape(-1, len(self.root)) @ self.root
                torch.sum(product.square_().view(len(x), -1), 1, out=_cut(squares, part)[:, 0, 0])
            elif self.tile in ("pooled", "enlarged"):
                wide = (e if self.tile == "pooled" else self._enlarged(e)).flatten(2)
                torch.bmm(self.weights.expand(len(x), -1, -1), wide, out=_cut(sums, part))
                if self.tile == "enlarged":
                    torch.sum(wide.square_(), 1, keepdim=True, out=_cut(squares, part))
            if rows:
                self._sum(e, _cut(rows[0], part))
            e.square_()
            if rows:
                self._sum(e, _cut(rows[1], part))
            if self.tile == "pooled":
                torch.sum(e.flatten(2), 1, keepdim=True, out=_cut(squares, part))
        if self.tile == "none":
            return
        if self.tile == "map":
            sums = (rows[0] @ self.weights.t() / self.positions)[:, :, None]
            squares = rows[1].sum(1)[:, None, None] / self.positions
        sums[:, 1:].add_(squares, alpha=1 / self.channels)
        if self.tile in ("pooled", "enlarged"):
            sums = F.avg_pool2d(sums.view(-1, 2, *self.extent), self.side).flatten(2)
        first, second = moments[-1]
        first.copy_(sums[:, 0])
        torch.addcmul(sums[:, 1], first, self.tile_slope, out=second)

    def pull_back(self, grad: Tensor, h: Tensor, slope: Sequence[Tensor], offset: Sequence[Tensor], scratch: Tensor):
        """Adds h * slope + offset to `grad` (B, D, H, W), in place.

        `slope` and `offset` (b, length) for each of the `parts`: b = B, or b = 1 where all images share them.
        """
        both, alike = (slope, offset), len(slope[0]) == 1
        channel = [t[0][:, :, None, None] for t in both] if self.channel else []
        tile = [self._spread(t[-1]) for t in both] if self.tile in ("map", "pooled") else []
        if self.tile in ("small", "enlarged"):
            self._pull_back_enlarged(grad, h, slope[-1], offset[-1], scratch)
        if channel and tile and (alike or self.tile == "map"):
            channel, tile = [c + t for c, t in zip(channel, tile, strict=True)], []
        maps = [] if channel and tile else channel or tile
        if maps and alike and self.positions <= SMALL:
            maps = [m.expand(-1, self.channels, *self.size).contiguous() for m in maps]
        for part in self._chunks(h) if channel or tile else ():
            g, x = _cut(grad, part), _cut(h, part)
            for index in (0, 1):
                if maps:
                    m = maps[index] if alike else _cut(maps[index], part)
                else:
                    m = torch.add(_cut(channel[index], part), _cut(tile[index], part), out=_room(x, scratch))
                if index == 1:
                    g.add_(m)
                elif g.dtype == torch.float32:
                    g.addcmul_(x, m)
                else:
                    g.add_(x * m)

    def _pull_back_enlarged(self, grad: Tensor, h: Tensor, slope: Tensor, offset: Tensor, scratch: Tensor) -> None:
        """The same for the tiles (b, P) of the enlarged map."""
        if self.tile == "small":  # w and G are of means over the tile, slope and offset of its single values
            slope, offset = slope[:, :, None, None] * self.side**2, offset * self.tile_average * self.side**2
            offset = offset.view(-1, 1, *self.size)
        else:
            slope, offset = self._spread(slope), self._spread(offset)
        for part in self._chunks(h):
            g, x = _cut(grad, part), _cut(h, part)
            a, b = (t if len(t) == 1 else _cut(t, part) for t in (slope, offset))
            if self.tile == "small":
                scaled = torch.mul(x, a, out=_room(x, scratch)).reshape(-1, len(self.gram))
                g.add_((scaled @ self.gram).view(x.shape)).add_(b)
            else:
                wide = torch.addcmul(b, self._enlarged(x.float()), a)
                back = torch.ops.aten.upsample_bilinear2d_backward(wide, self.extent, x.shape, False)
                g.add_(back)

    def _chunks(self, h: Tensor) -> list[slice | None]:
        """Images that are worked on together; None for all of them, as where there are no caches to stay in."""
        step = CHUNK // (self.channels * self.positions) or 1
        if h.device.type != "cpu" or step >= len(h):
            return [None]
        return [slice(start, start + step) for start in range(0, len(h), step)]

    def _enlarged(self, x: Tensor) -> Tensor:
        return F.interpolate(x, self.extent, mode="bilinear")

    def _spread(self, values: Tensor) -> Tensor:
        """Values of tiles (b, P) as a map (b, 1, H', W')."""
        if self.tile == "map":
            return values[:, :, None, None]
        maps = values.reshape(-1, 1, self.grid[0], 1, self.grid[1], 1)
        return maps.expand(-1, -1, -1, self.side, -1, self.side).reshape(-1, 1, *self.extent)

    def _sum(self, e: Tensor, out: Tensor) -> None:
        """The sum over positions (n, D) of e."""
        if self.positions <= TINY:
            out.copy_(e.flatten(2) @ self.ones)
        else:
            torch.sum(e, (2, 3), out=out)


def _cut(t: Tensor, part: slice | None) -> Tensor:
    return t if part is None else t[part]


def _room(x: Tensor, scratch: Tensor) -> Tensor:
    """A float32 tensor of the shape of x: on a CPU always the same memory, which stays in the cache."""
    if x.device.type == "cpu":
        return scratch[: x.numel()].view(x.shape)
    return torch.empty_like(x, dtype=torch.float32)  # in the format of x
