"""One hooked input: the sums of its values and squares, image by image, and what their gradients give back.

The same few passes serve the moments of the real set and synthesis. Memory traffic is all they cost, so on a CPU a
site works in chunks that stay in the cache, forward and backward, and the backward is written out: it adds to the
gradient that the layer has just made and allocates nothing of its size.
"""

from collections.abc import Iterator, Sequence
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
    """The input (B, D, H, W) of one layer, what is asked of it, and the shift its moments are about.

    Channel moments are over positions. Patch moments are over channels and the positions of a tile, `side` a side; a
    map of another size is first enlarged (bilinear) to whole tiles. `h` may have any memory format and precision;
    moments are float32.
    """

    def __init__(self, module: nn.Module, name: str, shape: torch.Size, side: int, layers: Sequence[Kind]):
        _, self.channels, height, width = shape
        kind: Kind = "bn" if isinstance(module, nn.BatchNorm2d) else "conv"
        self.kind, self.side, self.size, self.positions = kind, side, (height, width), height * width
        self.grid = -(-height // side), -(-width // side)
        self.extent = self.grid[0] * side, self.grid[1] * side
        self.tiles = self.grid[0] * self.grid[1]
        self.aligned = self.extent == self.size
        self.channel, self.patch = kind in layers, kind == "conv" and "patch" in layers
        self.columns = self.channels * self.channel
        self.whole = self.tiles == 1 and self.aligned  # the tile is the map: its sums follow from the channels'
        # A layer of another class may hand its output's gradient on as its input's: that one is not ours to change.
        self.sole = type(module).forward in (nn.Conv2d.forward, nn.BatchNorm2d.forward)
        self.parts: list[tuple[str, Kind, int]] = [(name, kind, self.channels)] * self.channel
        self.parts += [(name, "patch", self.tiles)] * self.patch

    def set_shift(self, shift: Tensor) -> None:
        """`shift` (f,) of the channels and tiles asked for."""
        self.shift, tiles = shift, shift[self.columns :]
        # Where channels are not asked for, any shift of theirs will do: it cancels.
        channels = shift[: self.columns] if self.channel else tiles.mean().expand(self.channels)
        self.about = channels[:, None, None].expand(-1, *self.size)
        if self.positions < TINY:
            self.about = self.about.contiguous()
        self.share = torch.full_like(shift, 1 / (self.side**2 * self.channels))  # of one value in each moment
        self.share[: self.columns] = 1 / self.positions
        spread, tiles = channels - channels.mean(), tiles - channels.mean()
        self.weights = torch.stack([torch.ones_like(spread), 2 * spread]) / self.channels
        self.tile_offset = torch.stack([spread.mean() - tiles, (spread**2).mean() - 2 * spread.mean() * tiles + tiles**2])
        self.tile_slope = -2 * tiles
        if self.patch and self.tiles == 1:
            eye = torch.eye(self.positions, device=shift.device).view(-1, 1, *self.size)
            enlarge = self._enlarged(eye).flatten(1) / self.side  # (HW, H'W')
            self.position_sum, self.gram = enlarge.sum(1) / self.side, enlarge @ enlarge.t()

    def same(self, other: "Site") -> bool:
        """Whether the other site's moments of a tensor are this one's."""
        return self.kind == other.kind and torch.equal(self.shift, other.shift)

    def measure(self, h: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:
        """First and second moments of h about the shift, each float32 (B, f), in one pass over h.

        Those of a tile are taken about the channels' shifts c_d first, and then moved to the tile's k:
        (h - k)^2 = (h - c_d)^2 + 2 (c_d - k) (h - c_d) + (c_d - k)^2. `scratch` is memory to work in.
        """
        moments = h.new_empty(2, len(h), len(self.shift), dtype=torch.float32)
        rows = moments[..., : self.columns] if self.channel else moments.new_empty(2, len(h), self.channels)
        over_rows, over_maps = self.channel or (self.patch and self.whole), self.patch and not self.whole
        if over_maps:
            cells = self.positions if self.tiles == 1 else self.extent[0] * self.extent[1]
            maps = moments.new_empty(len(h), 2, cells)
            squares = moments.new_empty(len(h), *((cells, cells) if self.tiles == 1 else (cells,)))
        for part in self._chunks(h):
            e = self._centred(h[part], scratch)
            if over_maps:
                wide = (e if self.aligned or self.tiles == 1 else self._enlarged(e)).flatten(2)
                torch.matmul(self.weights, wide, out=maps[part])
                if self.tiles == 1:
                    torch.bmm(wide.mT, wide, out=squares[part])
                elif not self.aligned:
                    torch.sum(wide.square_(), 1, out=squares[part])
            if over_rows:
                self._sum_positions(e, rows[0, part])
                self._sum_positions(e.square_(), rows[1, part])
            if over_maps and self.aligned:
                torch.sum((e if over_rows else e.square_()).flatten(2), 1, out=squares[part])
        if over_rows:
            rows.mul_(1 / self.positions)
        if self.patch:
            if self.whole:
                sums = rows[0] @ self.weights.t()
                sums[:, 1] += rows[1].mean(1)
                sums = sums[:, :, None]
            elif self.tiles == 1:
                sums = maps @ self.position_sum[:, None]
                sums[:, 1] += squares.flatten(1) @ self.gram.view(-1, 1) / self.channels
            else:
                maps[:, 1].add_(squares, alpha=1 / self.channels)
                sums = F.avg_pool2d(maps.view(-1, 2, *self.extent), self.side).flatten(2)
            first, second = moments[..., self.columns :]
            torch.add(sums[:, 0], self.tile_offset[0], out=first)
            torch.addcmul(sums[:, 1], sums[:, 0], self.tile_slope, out=second).add_(self.tile_offset[1])
        return moments[0], moments[1]

    def pull_back(self, grad: Tensor, h: Tensor, first: Tensor, second: Tensor, scratch: Tensor) -> None:
        """Adds to `grad` (B, D, H, W), in place, what gradients (B, f) of first and second moments give for h.

        That is h * slope + offset. Gradients that all images share (as of a mean over the block) come with stride 0:
        slope and offset are then of one image.
        """
        if first.stride(0) == second.stride(0) == 0:
            first, second = first[:1], second[:1]
        slope = second * (2 * self.share)
        offset = torch.addcmul(first * self.share, slope, self.shift, value=-1)
        both = slope, offset
        channel = [t[:, : self.columns, None, None] for t in both] if self.channel else []
        if self.patch and not self.aligned:
            self._add_enlarged(grad, h, *(t[:, self.columns :] for t in both), scratch)
        tile = [self._spread(t[:, self.columns :]) for t in both] if self.patch and self.aligned else []
        if channel and tile and (len(slope) == 1 or self.whole):
            channel, tile = [c + t for c, t in zip(channel, tile, strict=True)], []
        if channel or tile:
            self._add(grad, h, channel, tile, scratch)

    def _add(self, grad: Tensor, h: Tensor, channel: list[Tensor], tile: list[Tensor], scratch: Tensor) -> None:
        """grad += h * slope + offset, in each the sum of a map (b, D, 1, 1) and a map (b, 1, H, W), or one of them."""
        maps = [] if channel and tile else channel or tile
        if maps and len(maps[0]) == 1 and self.positions <= SMALL:
            maps = [m.expand(-1, self.channels, *self.size).contiguous() for m in maps]
        for part in self._chunks(h):
            g, x = grad[part], h[part]
            for index in (0, 1):
                if maps:
                    m = maps[index] if len(maps[index]) == 1 else maps[index][part]
                else:
                    m = torch.add(channel[index][part], tile[index][part], out=_room(x, scratch))
                if index == 1:
                    g.add_(m)
                elif g.dtype == torch.float32:
                    g.addcmul_(x, m)
                else:
                    g.add_(x * m)

    def _add_enlarged(self, grad: Tensor, h: Tensor, slope: Tensor, offset: Tensor, scratch: Tensor) -> None:
        """The same for tiles of the enlarged map; slope and offset (b, P)."""
        if self.tiles == 1:
            slope, offset = slope[:, :, None, None], (offset * self.position_sum * self.side**2).view(-1, 1, *self.size)
        else:
            slope, offset = self._spread(slope), self._spread(offset)
        for part in self._chunks(h):
            x = h[part]
            a, b = (t if len(t) == 1 else t[part] for t in (slope, offset))
            if self.tiles == 1:
                scaled = torch.mul(x, a, out=_room(x, scratch))
                grad[part] += (scaled.flatten(2) @ self.gram).view(x.shape) * self.side**2
                grad[part] += b
            else:
                wide = torch.addcmul(b, self._enlarged(x.float()), a)
                grad[part] += torch.ops.aten.upsample_bilinear2d_backward(wide, self.extent, x.shape, False)

    def _chunks(self, h: Tensor) -> Iterator[slice]:
        """Images that are worked on together; all of them where there are no caches to stay in."""
        step = max(1, CHUNK // h[0].numel()) if h.device.type == "cpu" else len(h)
        return (slice(start, start + step) for start in range(0, len(h), step))

    def _centred(self, x: Tensor, scratch: Tensor) -> Tensor:
        return torch.sub(x, self.about, out=_room(x, scratch))

    def _enlarged(self, x: Tensor) -> Tensor:
        return F.interpolate(x, self.extent, mode="bilinear")

    def _spread(self, values: Tensor) -> Tensor:
        """Values of tiles (b, P) to a map (b, 1, H', W')."""
        if self.tiles == 1:
            return values[:, :, None, None]
        maps = values.reshape(-1, 1, self.grid[0], 1, self.grid[1], 1)
        return maps.expand(-1, -1, -1, self.side, -1, self.side).reshape(-1, 1, *self.extent)

    def _sum_positions(self, e: Tensor, out: Tensor) -> None:
        if self.positions <= TINY:
            out.copy_(e.flatten(2) @ e.new_ones(self.positions))
        else:
            torch.sum(e, (2, 3), out=out)


def _room(x: Tensor, scratch: Tensor) -> Tensor:
    """A float32 tensor of the shape of x: on a CPU always the same memory, which stays in the cache."""
    if x.device.type == "cpu":
        return scratch[: x.numel()].view(x.shape)
    return torch.empty_like(x, dtype=torch.float32)
