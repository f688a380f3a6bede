"""What is read of data sets on the Hub: files by a pattern, and of Parquet files no more than what is asked for."""

from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.compute
import pyarrow.dataset
from huggingface_hub import HfFileSystem, snapshot_download

from .hub_errors import plain, steady, to_send


_AHEAD = 2**16  # bytes that are read past what was asked for; the default is 5 MB


def fetch(id: str, revision: str | None, pattern: str) -> Path:
    """A snapshot of a data set with the files that match a pattern; its folder is named by the commit.

    Errors: InputError in one line where it is not there, cannot be reached, or finds no place on the disk.
    """
    to_send()
    with plain(id, reading=f" at revision {revision}" if revision else ""):
        options = {"repo_type": "dataset", "revision": revision, "allow_patterns": pattern}
        return Path(steady(lambda: snapshot_download(id, **options), attempts=3))


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
