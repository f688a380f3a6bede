"""Real image-classification sets: anything `load_dataset` reads, found by the features of its columns."""

import difflib
import hashlib
import os
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets.packaged_modules.parquet.parquet import ParquetConfig

from . import digits, disk, folders, recipe, work
from .errors import InputError
from .realset import Indexed, RealSet, Stream


__all__ = ["Opened", "RealSet", "check_ipc", "load"]

VERSION = 1  # of what a fingerprint stands for: decoding, squaring, the draw of the holdout


def load(section: recipe.Source, split: Literal["train", "holdout", "test"] = "train") -> RealSet:
    """Opens a split of the real set; decodes nothing yet.

    `train` is the training split without the holdout, `holdout` the part of it that is kept back, `test` the test
    split. Labels come from the label column alone.

    Raises InputError: no such set or split, no image or label column or several, no labels, an unknown class.
    """
    if split == "holdout" and section.holdout == 0:
        raise InputError("source.holdout: 0 keeps no image back; give a fraction such as 0.1")
    opened = Opened(section)
    name = section.test_split if split == "test" else section.train_split
    dataset = opened.split(name)
    image, label = _columns(section, dataset.features)
    column = opened.column(name, label)
    known = column if split != "test" else None  # names of plain labels are those of the training split
    if known is None and not isinstance(dataset.features[label], datasets.ClassLabel):
        known = opened.column(section.train_split, label)
    labels, names, numbers = _labels(column, dataset.features[label], known, f"{name}' of {opened.id}", label)
    if split != "test" and section.holdout:
        held = stratified(labels, section.holdout, section.holdout_seed)
        labels = np.where(held == (split == "holdout"), labels, -1)
    if section.classes is not None:
        labels, names = _chosen(section.classes, labels, names, numbers)
    facts = {
        "content": opened.content(name),
        "config": section.name,
        "columns": [image, label],
        "split": name,
        "names": names,
        "labels": hashlib.sha256(labels.tobytes()).hexdigest(),
        "size": section.size,
        "resize": section.resize,
    }
    dataset = dataset.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    return RealSet(
        id=opened.id,
        commit=opened.commit,
        fingerprint=work.fingerprint("source", VERSION, **facts),
        names=names,
        labels=torch.from_numpy(labels),
        size=section.size,
        split=name,
        resize=section.resize,
        source=(Stream if section.streaming else Indexed)(dataset, image),
        cache=folders.cache() / "streams",
    )


def check_ipc(real: RealSet, ipc: int, each: int = 1) -> None:
    """Raises InputError naming the class with the fewest images, if these are fewer than `ipc` of `each` pictures."""
    counts, wanted = torch.bincount(real.labels[real.labels >= 0], minlength=len(real.names)), ipc * each
    least = int(counts.argmin())
    if counts[least] < wanted:
        short = int((counts < wanted).sum())
        others = f" ({short} classes have fewer than {wanted})" if short > 1 else ""
        made, key = (f" of {each} pictures", ", initialize.factor or images.grid") if each > 1 else ("", "")
        there = f"class '{real.names[least]}' of {real.id} has {counts[least]}{others}"
        remedy = f"lower ipc{key}, or leave such classes out with source.classes"
        raise InputError(f"ipc: {ipc} images{made} a class, but {there}; {remedy}")


def stratified(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Boolean mask (n,) with `fraction` of each class, rounded, at least one image of two and never all; -1 never.

    A row's lot depends on its number and the seed, so it is the same whatever classes are chosen.
    """
    lots = torch.rand(len(labels), generator=work.generator(seed, "source", "holdout"), dtype=torch.float64).numpy()
    order = np.lexsort((lots, labels))
    order = order[labels[order] >= 0]
    counts = np.bincount(labels[order]) if len(order) else np.zeros(0, np.int64)
    rank = np.arange(len(order)) - (np.cumsum(counts) - counts)[labels[order]]
    take = np.minimum(np.maximum(np.rint(counts * fraction), 1), counts - 1)
    mask = np.zeros(len(labels), bool)
    mask[order] = rank < take[labels[order]]
    return mask


class Opened:
    """A set whose files are known: a Hub id, a local folder, or the digits."""

    def __init__(self, section: recipe.Source):
        self.section, self.id, self.commit, self.folder = section, section.path, None, None
        if section.path == "sklearn/digits":
            if section.name is not None:
                raise InputError("source.name: sklearn/digits has no configurations; write --source.name null")
            self.memory, self.digest = digits.load(stratified)
            self.splits = list(self.memory)
            return
        self.folder = _folder(section.path)
        self.arguments = {"path": section.path, "name": section.name, "revision": section.revision}
        if self.folder:
            self.id = self.folder.name
            self.arguments |= {
                "path": str(self.folder),
                "revision": None,
                "cache_dir": str(folders.cache_of(self.folder)),
            }
        with _reading(section):
            self.builder = datasets.load_dataset_builder(**self.arguments)
        if not self.folder and re.fullmatch("[0-9a-f]{40}", self.builder.hash or ""):
            self.commit = self.arguments["revision"] = self.builder.hash
        self.splits = [str(name) for name in (self.builder.config.data_files or self.builder.info.splits or {})]

    def split(self, name: str) -> datasets.Dataset | datasets.IterableDataset:
        if name not in self.splits:
            key = "train_split" if name == self.section.train_split else "test_split"
            raise InputError(f"source.{key}: no split '{name}' in {self.id}; there are: {', '.join(self.splits)}")
        if self.section.path == "sklearn/digits":
            return self.memory[name].to_iterable_dataset() if self.section.streaming else self.memory[name]
        with _reading(self.section):
            if not self.section.streaming:
                self.builder.download_and_prepare()
                return self.builder.as_dataset(split=name)
            return self.builder.as_streaming_dataset(split=name)

    def column(self, name: str, column: str) -> pa.ChunkedArray:
        """One column of a split. Of streamed parquet nothing else is read."""
        dataset = self.split(name)
        with _reading(self.section):
            if not self.section.streaming:
                return dataset.select_columns([column]).with_format("arrow")[:][column]
            if self.section.path != "sklearn/digits" and isinstance(self.builder.config, ParquetConfig):
                only = datasets.load_dataset_builder(**self.arguments, columns=[column])
                dataset = only.as_streaming_dataset(split=name)
            tables = dataset.select_columns([column]).with_format("arrow").iter(batch_size=1000)
            return pa.chunked_array([chunk for table in tables for chunk in table[column].chunks])

    def content(self, split: str) -> str:
        """Stands for the bytes of a split: the commit of a Hub set, or a hash of the files of a local one."""
        if self.section.path == "sklearn/digits":
            return self.digest
        if not self.folder:
            return f"{self.id}@{self.commit or self.builder.hash}"
        files = [Path(file) for file in (self.builder.config.data_files or {}).get(split, folders.files(self.folder))]
        return folders.content({os.path.relpath(file, self.folder): file for file in files})


@contextmanager
def _reading(section: recipe.Source) -> Iterator[None]:
    """Turns the failures of `datasets` that a user can mend into an InputError."""
    try:
        yield
    except ConnectionError as error:
        raise InputError(
            f"source.path: cannot reach '{section.path}' on the Hub, and no local folder has this name; go online "
            f"(is HF_HUB_OFFLINE set?) or give a folder"
        ) from error
    except datasets.exceptions.DatasetNotFoundError as error:
        key = "revision" if "evision" in str(error) else "path"
        raise InputError(
            f"source.{key}: {_line(error)}; check the spelling, or run `hf auth login` if it is private or gated"
        ) from error
    except Exception as error:  # any reader of any format
        if isinstance(error, ValueError) and re.search("onfig.* (not found|missing)", str(error)):
            raise InputError(f"source.name: {_line(error)}") from error
        reason = _line(error) + (f" ({_line(error.__cause__)})" if error.__cause__ else "")
        codes = {getattr(failure, "errno", None) for failure in (error, error.__cause__)}
        if codes & disk.FULL.keys() or "disk space" in str(error):
            raise InputError(
                f"source.path: no room to prepare {section.path} in {datasets.config.HF_DATASETS_CACHE} ({reason}); "
                "free some space, set HF_HOME to another disk, or write source.streaming: true"
            ) from error
        raise InputError(f"source.path: load_dataset cannot read {section.path}: {reason}; give another") from error


def _line(error: BaseException) -> str:
    """What an error says, as one line of bearable length."""
    return textwrap.shorten(str(error), 240, placeholder=" …").rstrip(".") or type(error).__name__


def _columns(section: recipe.Source, features: datasets.Features) -> tuple[str, str]:
    """Image and label column: as named, or the only one whose feature fits."""
    for key in ("image_column", "label_column"):
        given = getattr(section, key)
        if given is not None and given not in features:
            raise InputError(f"source.{key}: no column '{given}' in {section.path}; there are: {', '.join(features)}")
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    image = section.image_column or _only(images, "image", section, features)
    if not isinstance(features[image], datasets.Image) and not _is_encoded(features[image]):
        raise InputError(f"source.image_column: '{image}' holds {features[image]}; name a column of images")
    named = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    plain = [name for name, feature in features.items() if name != image and _is_plain(feature)]
    label = section.label_column or _only(named or plain, "label", section, features)
    if not isinstance(features[label], datasets.ClassLabel) and not _is_plain(features[label]):
        raise InputError(f"source.label_column: '{label}' holds {features[label]}; name a column of class labels")
    return image, label


def _is_encoded(feature: object) -> bool:
    """Whether `datasets` takes a column for images when told so: encoded bytes, paths, or both."""
    if isinstance(feature, dict):
        return set(feature) == {"bytes", "path"}
    return isinstance(feature, datasets.Value) and bool(re.fullmatch("(large_)?(string|binary)", feature.dtype))


def _is_plain(feature: object) -> bool:
    return isinstance(feature, datasets.Value) and bool(
        re.fullmatch("u?int[0-9]+|(large_)?string|bool", feature.dtype)
    )


def _only(found: list[str], kind: str, section: recipe.Source, features: datasets.Features) -> str:
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"source.{kind}_column: {section.path} has several: {', '.join(found)}; name one")
    raise InputError(
        f"source.{kind}_column: {section.path} has no {kind} column among {', '.join(features)}; "
        f"name the one that holds {kind}s, or give another set"
    )


def _labels(
    column: pa.ChunkedArray, feature: object, known: pa.ChunkedArray | None, where: str, name: str
) -> tuple[np.ndarray, list[str], list[int]]:
    """Labels int64 (N,) with -1 for none, the class names, and the number that stands for each class in the source."""
    if isinstance(feature, datasets.ClassLabel):
        labels, names = pc.fill_null(column, -1).to_numpy().astype(np.int64), list(feature.names)
        numbers = list(range(len(names)))
    else:
        values = sorted(value for value in pc.unique(known).to_pylist() if value is not None and value != -1)
        labels = pc.fill_null(pc.index_in(column, pa.array(values, column.type)), -1).to_numpy().astype(np.int64)
        strange = [v for v in pc.unique(column).to_pylist() if v is not None and v != -1 and v not in set(values)]
        if strange:
            raise InputError(
                f"source.label_column: '{strange[0]}' in split '{where} is no label of the training split"
            )
        names = [str(value) for value in values]
        numbers = values if values and isinstance(values[0], int) else list(range(len(names)))
    if not (labels >= 0).any():
        raise InputError(f"source.label_column: '{name}' is empty all over split '{where}; name a split with labels")
    return labels, names, numbers


def _chosen(
    classes: list[str | int], labels: np.ndarray, names: list[str], numbers: list[int]
) -> tuple[np.ndarray, list[str]]:
    """Keeps the classes given by name or number, in their order."""
    new = np.full(len(names) + 1, -1)  # the last: label -1 stays -1
    for position, entry in enumerate(classes):
        values = names if isinstance(entry, str) else numbers
        if entry not in values:
            near = difflib.get_close_matches(str(entry), names, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"there are {len(names)}: {', '.join(names[:5])}, …"
            raise InputError(f"source.classes: no class {entry!r}; {hint}")
        index = values.index(entry)
        if new[index] >= 0:
            raise InputError(f"source.classes: class '{names[index]}' is given twice; list each class once")
        new[index] = position
    return new[labels], [names[index] for index in np.argsort(new[:-1], kind="stable")[-len(classes) :]]


def _folder(path: str) -> Path | None:
    """The local folder that `path` means, or None for a Hub id."""
    if path.strip() in ("", "imagefolder", "parquet", "arrow", "webdataset"):  # load_dataset would take what lies here
        raise InputError(f"source.path: '{path}' names no set; give a Hub id, a local folder or sklearn/digits")
    folder = disk.local(path, "source.path")
    if folder.is_dir():
        return folder.resolve()
    if folder.is_file():
        raise InputError(f"source.path: {path} is a file; give the folder that holds it")
    if path.startswith((".", "~", "/")) or path.count("/") > 1:
        raise InputError(f"source.path: no folder {path}; give an existing folder, a Hub id or sklearn/digits")
    return None
