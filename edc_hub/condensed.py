"""`CondensedSet`: a condensed set as its readers have it, from a dataset folder or the Hub."""

import json
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import torch
from torch import Tensor

from . import canvas, codecs, disk, documents, encoding, manifest, randaugment, remote, tables, views
from .errors import InputError
from .recipe import Relabel
from .remote import Parquet
from .versions import OBSERVERS
from .views import ViewTable


def _recipe(path: Path) -> dict[str, Any]:
    """A resolved recipe that a set or its run carries."""
    found = documents.load(path)
    for section in ("source", "evaluation"):
        if not isinstance(found.get(section), dict):
            raise InputError(f"{path}: not the recipe of a condensed set, no section {section}; write the set again")
    return found


class CondensedSet:
    """A condensed set of N images and C classes, from a folder or the Hub. Make one with `CondensedSet.load`."""

    def __init__(
        self,
        manifest: dict[str, Any],
        fetch: Callable[[str], Path],
        remote: Callable[[list[str]], Parquet] | None = None,
        views: str = "soft_labels",
    ):
        self.manifest, self._fetch, self._remote, self._views = manifest, fetch, remote, views

    @classmethod
    def load(
        cls, folder_or_id: str | Path, *, revision: str | None = None, streaming: bool = False, full: bool = False
    ) -> "CondensedSet":
        """Opens a finished run, its dataset folder or a set on the Hub; images and labels are read when asked for.

        Args: revision: tag, branch or commit on the Hub; streaming: of a set on the Hub, `views(epoch)` downloads
        the row groups of that epoch and keeps none; full: views and labels are those of `soft_labels_full`, all label
        epochs as float16, where the set was made with `relabel.full`.
        Errors: InputError for a place without a finished set, for a format that this version does not know, for the
        revision of a folder, and where `full` asks for what the set has not.
        """
        place = str(folder_or_id)
        folder = disk.local(place, "dataset")
        if not (local := folder.is_dir()):
            folder = remote.fetch(place, revision, "manifest.json")
        elif revision:
            raise InputError(f"revision: {place} is a folder, and only sets on the Hub have revisions; remove it")
        folder = manifest.folder_of(folder, place)
        # a snapshot is named by its commit: the rest comes from the same one
        fetch = (lambda _: folder) if local else partial(remote.fetch, place, folder.name)
        facts, config = manifest.read(folder / "manifest.json", place), "soft_labels"
        if full:
            config, soft = "soft_labels_full", facts["soft_labels"]
            if "full_epochs" not in soft:
                raise InputError(f"{place}: it has no soft_labels_full; leave out full, or make it with relabel.full")
            facts["soft_labels"] = {**soft, **codecs.facts(Relabel()), "epochs": soft["full_epochs"]}
        return cls(facts, fetch, partial(Parquet, place, folder.name) if streaming and not local else None, config)

    def __repr__(self) -> str:
        count, size = self.manifest["images"]["count"], self.manifest["images"]["size"]
        return f"CondensedSet({self.manifest['name']}, {count} images of {size} px, ipc {self.ipc})"

    @property
    def names(self) -> list[str]:
        """Class names, in the order of the labels."""
        return self.manifest["classes"]

    @property
    def ipc(self) -> int:
        return self.manifest["ipc"]

    @property
    def epochs(self) -> int:
        """Label epochs that are stored."""
        return self.manifest["soft_labels"]["epochs"]

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe that the set carries; in a run's own folder with its path of a local source."""
        carried = _recipe(self._fetch("recipe.yaml") / "recipe.yaml")
        if self.run is not None:
            carried["source"]["path"] = _recipe(self.run / "recipe.yaml")["source"].get("path")
        return carried

    @property
    def source_size(self) -> int:
        """Side in pixels of the real set as the manifest's fingerprint of it stands for it."""
        return self.manifest["images"]["size"] if self.manifest["control"] else self.recipe["source"]["size"]

    @cached_property
    def published_observers(self) -> dict[str, dict[str, Any]] | None:
        """Weights, arch and bytes of each observer that is published beside the set; None where none are."""
        file = self._fetch(OBSERVERS) / OBSERVERS
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    @cached_property
    def run(self) -> Path | None:
        """The run folder that this set lies in, where it is one's own; None for a set on its own."""
        return manifest.run_of(self._fetch("manifest.json"), self.manifest["control"])

    @cached_property
    def _rows(self) -> pa.Table:
        return pyarrow.dataset.dataset(self._files("images")).to_table()

    @cached_property
    def _labelled(self) -> pyarrow.dataset.Dataset | Parquet:
        soft = self.manifest["soft_labels"]
        table = json.dumps(soft.get("randaugment")) not in ("null", json.dumps(randaugment.table()))
        if table or soft["view_version"] > views.VERSION:
            raise InputError(
                f"soft_labels: views of {self.manifest['name']} are those of another edc_hub (view_version "
                f"{soft['view_version']}, this one replays {views.VERSION}); pip install --upgrade edc-hub, or train "
                "from its images alone (evaluation.labels mean)"
            )
        if self._remote:
            return self._remote([path for path in self.manifest["files"] if path.startswith(f"{self._views}/")])
        return pyarrow.dataset.dataset(self._files(self._views))

    def _files(self, config: str) -> list[str]:
        folder = self._fetch(f"{config}/*")
        files = [folder / path for path in self.manifest["files"] if path.startswith(f"{config}/")]
        for file in files:
            if not file.is_file():
                raise InputError(f"{file}: missing, though manifest.json names it; load or write the set again")
            if file.stat().st_size != self.manifest["files"][str(file.relative_to(folder))]["bytes"]:
                raise InputError(f"{file}: not of the size that manifest.json says; load or write the set again")
        return [str(file) for file in files]

    def sizes(self, labels: str) -> dict[str, int]:
        """Bytes that a student with this source of labels (`evaluation.labels`) reads: `images`, `labels`, `views`.

        The one soft label of each image lies in the files of the images and counts as a label, of `mean` alone.
        """
        mean, total = tables.column_bytes(self._files("images"), ("soft_label",))
        found = {"images": total - mean, "labels": mean if labels == "mean" else 0, "views": 0}
        if labels == "stored":
            found["labels"], total = tables.column_bytes(self._files(self._views), codecs.COLUMNS)
            found["views"] = total - found["labels"]
        return found

    @cached_property
    def images(self) -> Tensor:
        """uint8 (N, 3, s, s), in the order of `image_id`; canvases where the manifest has `decode`."""
        return encoding.decode(self._rows["image"].combine_chunks().field("bytes").to_pylist())

    @property
    def grid(self) -> int:
        """Pictures a side of each image; 1: images are no canvases."""
        return manifest.grid(self.manifest)

    @cached_property
    def pictures(self) -> Tensor:
        """What students learn from, uint8 (N * grid^2, 3, s, s): the images, or what their canvases decode to."""
        return canvas.decode(self.images, self.grid)

    def of_pictures(self, of_images: Tensor) -> Tensor:
        """What each picture has from its image: (N, …) to (N * grid^2, …)."""
        return of_images.repeat_interleave(self.grid**2, 0)

    @cached_property
    def labels(self) -> Tensor:
        """int64 (N,)."""
        return tables.tensor(self._rows["label"])

    @cached_property
    def source_rows(self) -> Tensor:
        """Rows of the training split that each image started from, int32 (N, tiles); -1: none."""
        rows = self._rows["source_rows"].to_pylist()
        width = max(1, *map(len, rows))
        return torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.int32)

    @cached_property
    def soft_labels(self) -> Tensor:
        """Mean observer logits of the images themselves, float32 (N, C)."""
        return tables.tensor(self._rows["soft_label"]).float()

    def views(self, epoch: int) -> tuple[ViewTable, Tensor]:
        """The views of one label epoch, in the order of their batches, and their mean logits float32 (N, C).

        Errors: InputError for an epoch that the set does not have.
        """
        if not self.epochs:
            raise InputError("epoch: the set stores no labelled views; its observers label views while students train")
        if not 0 <= epoch < self.epochs:
            raise InputError(f"epoch: {epoch} is not in the set; give 0 to {self.epochs - 1}")
        table, soft = self.labelled(epoch, epoch + 1)
        return canvas.stored(table, self.grid), soft.float()

    def labelled(self, start: int, stop: int) -> tuple[ViewTable, Tensor]:
        """The views of label epochs `start` to `stop - 1`, one after the other, and mean logits float16 (rows, C).

        Their `image_id` and `mix_image_id` count `pictures`. Errors: InputError for views that this version would
        draw otherwise.
        """
        epoch = pyarrow.dataset.field("epoch")
        table = self._labelled.to_table(filter=(epoch >= start) & (epoch < stop))
        columns = {name: tables.tensor(table[name]) for name in table.column_names}
        soft = codecs.decode(columns, len(self.names))
        return canvas.joined({name: columns[name] for name in views.columns(columns)}, self.grid), soft

    def replay(self, epoch: int) -> Tensor:
        """The pixels of one label epoch's views as the observers saw them, float32 (rows, 3, v, v) in [0, 1]."""
        table = canvas.joined(self.views(epoch)[0], self.grid)
        return views.apply(self.pictures, table, self.manifest["soft_labels"]["view_size"])

    def push(
        self, repo_id: str, *, tag: str | None = None, private: bool = False, observers: str | None = None
    ) -> str:
        """Publishes the set on the Hub as `repo_id`, in one commit with one tag; returns the tag.

        Args: tag: v1.0.0; by the rules of versions when not given; private: where the repository is made; observers:
        ORG/NAME, where the observers of the set's run are to be published too, each as `ORG/NAME-<observer>`.
        Errors: InputError where the Hub refuses, and for a tag that holds other content.
        """
        from . import publish

        folder = self._fetch("*")  # all of it, where it came from the Hub
        return publish.push(folder, repo_id, tag=tag, private=private, observers=observers)[-1][1].tag
