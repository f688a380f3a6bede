"""Real images by row number: small sets as one uint8 tensor, large ones decoded as they are asked for.

Whoever picks images picks row numbers; only these are decoded. A stream is read in ascending order, and the encoded
bytes of rows that are needed in another order are kept in a file first.
"""

import hashlib
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import torch
from filelock import FileLock
from torch import Tensor

from . import pixels
from .disk import disk_errors, write_atomically
from .errors import InputError
from .pixels import View


MEMORY = 4 * 2**30  # bytes of decoded pixels up to which a set is kept in memory once it was read
AHEAD = 2  # batches that are decoded while the networks work on one
PART = 256  # rows read at once where the caller names no batch

Encoded = tuple[pa.Buffer | None, str | None]  # bytes, or the file they are in


def encoded(table: pa.Table, column: str) -> list[Encoded]:
    """The image column of a table as (bytes, path) pairs, without a copy of the bytes."""
    data, path = table[column].combine_chunks().flatten()
    return [(value.as_buffer(), name) for value, name in zip(data, path.to_pylist(), strict=True)]


class Indexed:
    """Random access by row number to an Arrow-backed dataset."""

    def __init__(self, dataset: datasets.Dataset, column: str):
        self.dataset, self.column = dataset.with_format("arrow"), column

    def read(self, rows: np.ndarray) -> list[Encoded]:
        return encoded(self.dataset[rows.tolist()], self.column)


class Stream:
    """Ascending access by row number to an iterable dataset; it starts anew when asked for a row it has passed."""

    def __init__(self, dataset: datasets.IterableDataset, column: str):
        self.dataset, self.column = dataset.with_format("arrow"), column
        self.lock, self.tables, self.close = threading.Lock(), None, lambda: None

    def read(self, rows: np.ndarray) -> list[Encoded]:
        with self.lock:
            if self.tables is None or rows[0] < self.first:
                self.close()
                self.tables = self.dataset.iter(batch_size=PART)
                # an open reader that is left to the end of the interpreter fails there with a traceback
                self.close = weakref.finalize(self, self.tables.close)
                self.first, self.table = 0, next(self.tables)
            found: list[Encoded] = []
            while True:
                end = self.first + len(self.table)
                here = rows[len(found) : np.searchsorted(rows, end)]
                if len(here):
                    found += encoded(self.table.take(here - self.first), self.column)
                if len(found) == len(rows):
                    return found  # the table stays: the next rows may be in it
                self.first, self.table = end, next(self.tables, None)
                if self.table is None:
                    self.tables = None
                    raise InputError(f"source.path: the stream ended at row {end}, before row {rows[-1]}; start again")


@dataclass(eq=False)
class RealSet:
    """Images of one split with their labels. Rows are numbered as in the source's split, used or not."""

    id: str
    """Hub id, or the name of a local folder."""
    commit: str | None
    """Commit of a Hub set."""
    fingerprint: str
    """Stands for everything that decides images and labels: content, columns, split, classes, size, holdout."""
    names: list[str]
    """Class names, in the order of the source or of source.classes."""
    labels: Tensor
    """int64 (N,) on the CPU, by row number; -1: the row is not used."""
    size: int
    """Side of the square images."""
    split: str
    resize: str
    source: Indexed | Stream = field(repr=False)
    cache: Path = field(repr=False)
    """Where rows of a stream are kept."""

    def __post_init__(self) -> None:
        used = (self.labels >= 0).numpy()
        self._slot = np.cumsum(used) - 1
        self._kept: tuple[np.ndarray, Indexed] | None = None
        self._known = np.zeros(0, bool)
        shape = (int(used.sum()), 3, self.size, self.size)
        if np.prod(shape, dtype=np.int64) <= MEMORY and isinstance(self.source, Indexed):
            self._memory, self._known = torch.empty(shape, dtype=torch.uint8), np.zeros(shape[0], bool)

    def rows(self, label: int | None = None) -> Tensor:
        """Ascending row numbers, int64, of one class or of all that are used."""
        return (self.labels >= 0 if label is None else self.labels == label).nonzero().flatten()

    def images(self, rows: Tensor) -> Tensor:
        """uint8 (n, 3, s, s), in the order of `rows`. One pass over a stream.

        Raises InputError naming the row of an image that cannot be decoded.
        """
        wanted, where = np.unique(rows.numpy(), return_inverse=True)
        parts = [wanted[start : start + PART] for start in range(0, len(wanted), PART)]
        found = torch.empty((len(wanted), 3, self.size, self.size), dtype=torch.uint8)
        for index, images in enumerate(_ahead(parts, self._square)):
            found[index * PART : (index + 1) * PART] = images
        ordered = len(where) == len(wanted) and bool((where[:-1] < where[1:]).all())
        return found if ordered else found[torch.from_numpy(where)]

    def batches(
        self, rows: Tensor, batch: int, *, view: View | None = None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Images uint8 (b, 3, s, s), labels int64 (b,) and rows int64 (b,), in the order of `rows`.

        The next batches are decoded meanwhile; no more than a few are held. Rows of a stream should ascend: others
        are first kept in a file.
        """
        order = rows.numpy()
        parts = [order[start : start + batch] for start in range(0, len(order), batch)]
        self._prepare(order)

        def make(part: np.ndarray) -> Tensor:
            if view is None:
                return self._square(part)
            if view.kind == "pad_crop":
                draws = pixels.uniforms(view.seed, part, 3)
                return pixels.pad_crop(self._square(part), draws, view.pad, view.flip)
            draws = pixels.uniforms(view.seed, part, pixels.CROP_DRAWS)
            cut = [lambda image, u=u: pixels.crop(image, u, self.size, area=view.area, flip=view.flip) for u in draws]
            return self._decode(part, cut)

        for part, images in zip(parts, _ahead(parts, make), strict=True):
            part = torch.from_numpy(part)
            yield images, self.labels[part], part

    def crops(
        self, rows: Tensor, batch: int, draws: Tensor, size: int, *, area: tuple[float, float], ratio, flip: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Several RandomResizedCrops of each original image: uint8 (b, k, 3, size, size) and rows int64 (b,).

        `draws` float64 (n, k, CROP_DRAWS) in [0, 1) decide them.
        """
        order, numbers = rows.numpy(), draws.numpy()
        self._prepare(order)
        parts = [np.arange(start, min(start + batch, len(order))) for start in range(0, len(order), batch)]

        def make(part: np.ndarray) -> Tensor:
            def cut(image: PIL.Image.Image, of_image: np.ndarray) -> np.ndarray:
                return np.stack([pixels.crop(image, u, size, area=area, ratio=ratio, flip=flip) for u in of_image])

            return self._decode(order[part], [lambda image, u=numbers[i]: cut(image, u) for i in part])

        for part, images in zip(parts, _ahead(parts, make), strict=True):
            yield images, rows[torch.from_numpy(part)]

    def preload(self) -> None:
        """Decodes a set that fits in memory now, so that a broken image is found before any long work."""
        if len(self._known):
            for _ in self.batches(self.rows(), PART):
                pass

    def keep(self, rows: Tensor) -> None:
        """Makes these rows of a stream readable in any order: one pass copies their encoded bytes to a file.

        Nothing to do where every row is at hand. The file lies in the cache of `datasets` and is found again.
        """
        if isinstance(self.source, Indexed):
            return
        wanted = np.unique(rows.numpy())
        digest = hashlib.sha256(self.fingerprint.encode() + wanted.tobytes()).hexdigest()[:16]
        path = self.cache / f"rows-{digest}.arrow"
        with disk_errors(path, "HF_HOME"):
            self.cache.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):
                if not path.exists():
                    write_atomically(path, lambda part: self._copy(wanted, part), "HF_HOME")
        self._kept = wanted, Indexed(datasets.Dataset.from_file(str(path)), "image")

    def _copy(self, rows: np.ndarray, path: Path) -> None:
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, pa.schema({"image": kind})) as writer:
            for start in range(0, len(rows), PART):
                part = self.source.read(rows[start : start + PART])
                column = pa.array([{"bytes": data and data.to_pybytes(), "path": name} for data, name in part], kind)
                writer.write_batch(pa.record_batch({"image": column}))

    def _prepare(self, order: np.ndarray) -> None:
        if isinstance(self.source, Stream) and not self._has(order) and (np.diff(order) < 0).any():
            self.keep(torch.from_numpy(order))

    def _has(self, rows: np.ndarray) -> bool:
        if self._kept is None:
            return False
        kept = self._kept[0]
        return bool((kept[np.searchsorted(kept, rows).clip(max=len(kept) - 1)] == rows).all())

    def _read(self, rows: np.ndarray) -> list[Encoded]:
        if self._has(rows):
            return self._kept[1].read(np.searchsorted(self._kept[0], rows))
        return self.source.read(rows)

    def _square(self, rows: np.ndarray) -> Tensor:
        def cut(image: PIL.Image.Image) -> np.ndarray:
            return pixels.square(image, self.size, self.resize)

        if not len(self._known):
            return self._decode(rows, [cut] * len(rows))
        slots = self._slot[rows]
        new = ~self._known[slots]
        if new.any():
            decoded = self._decode(rows[new], [cut] * int(new.sum()))
            self._memory[torch.from_numpy(slots[new])] = decoded
            self._known[slots[new]] = True
        return self._memory[torch.from_numpy(slots)]

    def _decode(self, rows: np.ndarray, cuts: list[Callable[[PIL.Image.Image], np.ndarray]]) -> Tensor:
        """Each row's image through its own cut (…, h, w, 3), stacked as uint8 (n, …, 3, h, w); on every thread."""
        found = self._read(rows)

        def one(index: int) -> np.ndarray:
            try:
                image = pixels.decode(*found[index])
            except Exception as error:  # each codec of Pillow fails in its own way
                reason = str(error).partition("\n")[0] or type(error).__name__
                if isinstance(error, PIL.UnidentifiedImageError):  # names an object in memory
                    reason = "no image format is recognised"
                raise InputError(
                    f"source.path: the image in row {rows[index]} of split '{self.split}' of {self.id} cannot be "
                    f"decoded ({reason}); replace it or remove the row"
                ) from error
            return cuts[index](image)

        threads = torch.get_num_threads()  # each takes one share: a task an image costs more than a small image
        with ThreadPoolExecutor(threads) as pool:
            shares = pool.map(lambda share: list(map(one, share)), np.array_split(range(len(rows)), threads))
            stacked = torch.from_numpy(np.stack([image for share in shares for image in share]))
        return stacked.movedim(-1, -3).contiguous()


def _ahead(parts: list[np.ndarray], make: Callable[[np.ndarray], Tensor]) -> Iterator[Tensor]:
    """`make` of each part in order, on another thread, up to AHEAD parts before they are asked for."""
    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(make, part) for part in parts[:AHEAD])
        try:
            for part in [*parts[AHEAD:], *[None] * min(AHEAD, len(parts))]:
                done = waiting.popleft().result()
                if part is not None:
                    waiting.append(thread.submit(make, part))
                yield done
        finally:
            for future in waiting:
                future.cancel()
