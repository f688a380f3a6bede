"""Toys to test with: small image sets in the layouts that users have, networks whose output is known."""

from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import torch


def picture(seed: int, side: tuple[int, int] = (8, 8)) -> PIL.Image.Image:
    """A random RGB image of (width, height) `side`."""
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*side[::-1], 3), np.uint8))


def png(image: PIL.Image.Image, kind: str = "PNG", **options) -> bytes:
    """The encoded bytes of an image; lossless where `kind` can be."""
    file = BytesIO()
    image.save(file, kind, **({"lossless": True} if kind == "WEBP" else {}), **options)
    return file.getvalue()


def write_parquet(
    folder: Path,
    splits: dict[str, list],
    *,
    names: list[str] | None = None,
    feature=None,
    image: str = "image",
    label: str | None = "label",
    extra: dict | None = None,
    encoded: list[bytes | None] | None = None,
    shared: bytes | None = None,
    side: tuple[int, int] = (8, 8),
) -> None:
    """Writes `folder/data/<split>.parquet` and the README that names the splits.

    Each entry of `splits` is a label: of ClassLabel(names), or of `feature`. Images are `encoded`, or all `shared`, or
    `picture(row)`; `extra` are further columns.
    """
    for split, labels in splits.items():
        rows = range(len(labels))
        data = encoded or [shared or png(picture(row, side)) for row in rows]
        columns = {image: [None if value is None else {"bytes": value, "path": None} for value in data[: len(labels)]]}
        features = {image: datasets.Image()}
        if label is not None:
            columns[label] = labels
            features[label] = feature or datasets.ClassLabel(names=names or ["a", "b"])
        for name, kind in (extra or {}).items():
            features[name] = kind
            columns[name] = columns[image] if isinstance(kind, datasets.Image) else list(rows)
            if isinstance(kind, datasets.Value) and kind.dtype == "string":
                columns[name] = [str(row) for row in rows]
        (folder / "data").mkdir(parents=True, exist_ok=True)
        dataset = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        dataset.to_parquet(folder / "data" / f"{split}.parquet")
    lines = [f"  - split: {split}\n    path: data/{split}.parquet\n" for split in splits]
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{''.join(lines)}---\n")


class Net(torch.nn.Module):
    """A fixed random network with the face of ours: x in [0, 1] in, its own normalisation."""

    def __init__(self, seed: int, mean: list[float], classes: int = 3):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.facts = {"mean": mean}
        self.filters = torch.randn((6, 3, 3, 3), generator=generator)
        self.head = torch.randn((6, classes), generator=generator)

    def features(self, x):
        x = x - torch.tensor(self.facts["mean"], dtype=x.dtype)[:, None, None]
        return torch.nn.functional.conv2d(x, self.filters.to(x.dtype)).relu().mean((2, 3))

    def forward(self, x):
        return self.features(x) @ self.head.to(x.dtype)


class Watching:
    """Observers by name; `loaded` counts the loads."""

    def __init__(self, **networks):
        self.networks, self.loaded = networks, 0

    def load(self, name, epoch):
        self.loaded += 1
        return self.networks[name]

    def fingerprint(self, name, epoch):
        return f"{name}@{epoch}"
