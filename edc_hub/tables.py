"""The tables of a condensed set: which columns, and how tensors become parquet files and come back.

Equal tables give equal bytes: the writer's options are fixed here and nothing of the machine enters.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import ClassLabel, Features, Image, List, Value
from torch import Tensor

from .labels import Labels


SHARD_BYTES = 500_000_000


class Written(NamedTuple):
    """What was written of one configuration: columns, bytes in memory, and rows of each file."""

    features: Features
    memory: int
    rows: dict[str, int]


def _image_rows(files: list[bytes], source_rows: Tensor, labels: Labels, names: list[str]) -> Iterator[tuple]:
    """Row groups of `images` with their features; a group is at most a fifth of a shard."""
    ipc = len(files) // len(names)
    soft = labels.mean
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
        yield (
            features,
            {
                "image": pa.array([{"bytes": files[i], "path": None} for i in ids.tolist()], features["image"].pa_type),
                "label": _array(ids // ipc),
                "image_id": _array(ids.int()),
                "ipc_index": _array((ids % ipc).short()),
                "source_rows": pa.array(
                    [[row for row in rows if row >= 0] for rows in source_rows[ids].tolist()], pa.list_(pa.int32())
                ),
                "soft_label": _array(soft[ids]),
            },
        )


def _label_rows(labels: Labels) -> Iterator[tuple]:
    """Row groups of `soft_labels` with their features: one label epoch each."""
    for epoch in range(labels.epochs):
        table, soft = labels.epoch(epoch)
        columns = {**table, "soft_label": soft}
        features = Features({name: _feature(column) for name, column in columns.items()})
        yield features, {name: _array(column) for name, column in columns.items()}


def _feature(column: Tensor) -> Value | List:
    value = Value(str(column.dtype).removeprefix("torch."))
    return value if column.dim() == 1 else List(value, length=column.shape[1])


def _array(column: Tensor) -> pa.Array:
    flat = pa.array(column.reshape(-1).numpy())
    return flat if column.dim() == 1 else pa.FixedSizeListArray.from_arrays(flat, column.shape[1])


def _write_shards(folder: Path, groups: Iterator[tuple]) -> tuple[Features, int, dict[str, int]]:
    """Writes row groups as parquet files of about SHARD_BYTES: features, bytes in memory, and rows of each file."""
    shards: list[Path] = []
    rows, memory, writer, features = [], 0, None, None
    folder.mkdir(parents=True)
    for features, columns in groups:
        table = pa.table(columns, schema=features.arrow_schema)
        memory += table.nbytes
        if writer is None or shards[-1].stat().st_size + table.nbytes > SHARD_BYTES:
            if writer is not None:
                writer.close()
            shards.append(folder / str(len(shards)))
            rows.append(0)
            writer = pq.ParquetWriter(shards[-1], table.schema, compression="zstd", write_page_index=True)
        writer.write_table(table, row_group_size=len(table))
        rows[-1] += len(table)
    writer.close()
    names = [f"train-{i:05d}-of-{len(shards):05d}.parquet" for i in range(len(shards))]
    for shard, name in zip(shards, names):
        shard.rename(folder / name)
    return features, memory, dict(zip(names, rows))


def _tensor(column: pa.ChunkedArray) -> Tensor:
    array = column.combine_chunks()
    if pa.types.is_fixed_size_list(array.type):
        flat = array.flatten().to_numpy(zero_copy_only=False)
        return torch.from_numpy(flat.copy()).view(len(array), -1)
    return torch.from_numpy(array.to_numpy(zero_copy_only=False).copy())


