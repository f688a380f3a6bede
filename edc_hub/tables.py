"""The tables of a condensed set: which columns, and how tensors become parquet files and come back.

Equal tables give equal bytes: the writer's options are fixed here and nothing of the machine enters.
"""

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import ClassLabel, Features, Image, List, Value
from torch import Tensor

from . import codecs
from .recipe import Relabel


if TYPE_CHECKING:
    from .labels import Labels


SHARD_BYTES = 500_000_000
ROWS = 2000  # fewer rows a group and the group's own headers outweigh them


class Written(NamedTuple):
    """What was written of one configuration: columns, bytes in memory, and rows of each file."""

    features: Features
    memory: int
    rows: dict[str, int]


def image_rows(files: list[bytes], source_rows: Tensor, soft: Tensor, names: list[str]) -> Iterator[tuple]:
    """Row groups of `images` with their features; a group is at most a fifth of a shard."""
    ipc = len(files) // len(names)
    features = Features(
        {
            "image": Image(),
            "label": ClassLabel(names=list(names)),
            "image_id": Value("int32"),
            "ipc_index": Value("int16"),
            "source_rows": List(Value("int32")),
            "soft_label": List(Value("float16"), length=soft.shape[1]),
        }
    )
    step = max(1, SHARD_BYTES // 5 // max(map(len, files)))
    for start in range(0, len(files), step):
        ids = torch.arange(start, min(start + step, len(files)))
        stored = [{"bytes": files[i], "path": None} for i in ids.tolist()]
        rows = [[row for row in tiles if row >= 0] for tiles in source_rows[ids].tolist()]
        columns = {
            "image": pa.array(stored, features["image"].pa_type),
            "label": _array(ids // ipc),
            "image_id": _array(ids.int()),
            "ipc_index": _array((ids % ipc).short()),
            "source_rows": pa.array(rows, pa.list_(pa.int32())),
            "soft_label": _array(soft[ids]),
        }
        yield features, columns


def epochs_a_group(count: int) -> int:
    """Label epochs of `count` images that a row group holds: one, or as many as make ROWS rows."""
    return max(1, ROWS // count)


def label_rows(labels: "Labels", section: Relabel) -> Iterator[tuple]:
    """Row groups of `soft_labels` with their features, the labels as `relabel.codec` stores them."""
    step = epochs_a_group(len(labels.mean))
    for start in range(0, labels.epochs, step):
        parts = []
        for epoch in range(start, min(start + step, labels.epochs)):
            table, soft = labels.epoch(epoch)
            parts.append({**table, **codecs.encode(soft, section)})
        columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        features = Features({name: _feature(column) for name, column in columns.items()})
        yield features, {name: _array(column) for name, column in columns.items()}


def _feature(column: Tensor) -> Value | List:
    value = Value(str(column.dtype).removeprefix("torch."))
    return value if column.dim() == 1 else List(value, length=column.shape[1])


def _array(column: Tensor) -> pa.Array:
    flat = pa.array(column.reshape(-1).numpy())
    return flat if column.dim() == 1 else pa.FixedSizeListArray.from_arrays(flat, column.shape[1])


def write(folder: Path, groups: Iterator[tuple[Features, dict[str, pa.Array]]]) -> Written:
    """Writes row groups to `train-*.parquet` files of at most about SHARD_BYTES in `folder`."""
    folder.mkdir(parents=True)
    rows, memory, filled, writer, features = [], 0, 0, None, None
    for features, columns in groups:
        table = pa.table(columns, schema=features.arrow_schema)
        if writer is None or filled + table.nbytes > SHARD_BYTES:
            if writer is not None:
                writer.close()
            # the number of shards is known at the end, and only then the names
            writer = _writer(folder / str(len(rows)), table.schema)
            rows.append(0)
            filled = 0
        writer.write_table(table, row_group_size=len(table))
        rows[-1] += len(table)
        filled += table.nbytes
        memory += table.nbytes
    writer.close()
    names = [f"train-{i:05d}-of-{len(rows):05d}.parquet" for i in range(len(rows))]
    for i, name in enumerate(names):
        (folder / str(i)).rename(folder / name)
    return Written(features, memory, dict(zip(names, rows, strict=True)))


def _writer(where: Path | pa.NativeFile, schema: pa.Schema) -> pq.ParquetWriter:
    # logits hardly repeat: with a dictionary they take two fifths more
    repeated = [path for field in schema for path, kind in _leaves(field) if not pa.types.is_float16(kind)]
    return pq.ParquetWriter(where, schema, compression="zstd", write_page_index=True, use_dictionary=repeated)


def _leaves(field: pa.Field, above: str = "") -> Iterator[tuple[str, pa.DataType]]:
    """Path in the file and type of what a column consists of."""
    path, kind = above + field.name, field.type
    if pa.types.is_struct(kind):
        for inner in kind:
            yield from _leaves(inner, f"{path}.")
    elif pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        yield f"{path}.list.element", kind.value_type
    else:
        yield path, kind


def file_bytes(groups: Iterator[tuple[Features, dict[str, pa.Array]]]) -> int:
    """Bytes of one file of these row groups; none is kept."""
    writer, sink = None, pa.MockOutputStream()
    for features, columns in groups:
        table = pa.table(columns, schema=features.arrow_schema)
        writer = writer or _writer(sink, table.schema)
        writer.write_table(table, row_group_size=len(table))
    writer.close()
    return sink.size()


def tensor(column: pa.ChunkedArray) -> Tensor:
    """A column of numbers, or of lists of one length, as a tensor."""
    array = column.combine_chunks()
    if pa.types.is_fixed_size_list(array.type):
        flat = array.flatten().to_numpy(zero_copy_only=False)
        return torch.from_numpy(flat.copy()).view(len(array), -1)
    return torch.from_numpy(array.to_numpy(zero_copy_only=False).copy())


def column_bytes(files: list[str], columns: Collection[str]) -> tuple[int, int]:
    """Compressed bytes of some columns in parquet files, and the files' size."""
    found = 0
    for file in files:
        facts = pq.read_metadata(file)
        for group in map(facts.row_group, range(facts.num_row_groups)):
            chunks = map(group.column, range(group.num_columns))
            named = (chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns)
            found += sum(chunk.total_compressed_size for chunk in named)
    return found, sum(map(os.path.getsize, files))
