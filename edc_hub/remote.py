"""Parquet files on the Hub, of which no more is read than what is asked for."""

from functools import cached_property

import pyarrow as pa
import pyarrow.compute
import pyarrow.dataset
from huggingface_hub import HfFileSystem

from .hub_errors import plain, steady


_AHEAD = 2**16  # bytes that are read past what was asked for; the default is 5 MB


class Parquet:
    """Parquet files of a data set at one commit; row groups that a filter leaves out are not downloaded."""

    def __init__(self, id: str, commit: str, paths: list[str]):
        self._id, self._commit = id, commit
        self._paths = [f"datasets/{id}@{commit}/{path}" for path in paths]

    @cached_property
    def _files(self) -> pyarrow.dataset.Dataset:
        return pyarrow.dataset.dataset(self._paths, filesystem=HfFileSystem(block_size=_AHEAD), format="parquet")

    def to_table(self, filter: pyarrow.compute.Expression) -> pa.Table:
        """The rows that fit the filter. Errors: InputError in one line where the Hub cannot be reached."""
        with plain(self._id, reading=f" at revision {self._commit}"):
            return steady(lambda: self._files.to_table(filter=filter), attempts=3)
