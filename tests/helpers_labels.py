"""Small observers with random weights, and a small labelled set, for the tests of what comes after synthesis."""

from pathlib import Path
from types import SimpleNamespace

import torch
from huggingface_hub.constants import HF_HUB_CACHE
from torch import nn

from edc_hub import labels, writing
from edc_hub.encoding import decode, encode
from edc_hub.recipe import Recipe
from edc_hub.work import Session


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(count: int, size: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(256, (count, 3, size, size), generator=seeded(seed), dtype=torch.uint8)


def network(seed: int, classes: int) -> nn.Module:
    """A convolutional network with BatchNorm and dropout, frozen, in eval mode."""
    layers = nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, 2, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(8, classes),
    )
    generator = seeded(seed)
    for tensor in (*layers.parameters(), layers[1].running_mean, layers[4].running_mean):
        tensor.data.normal_(generator=generator)
    return layers.requires_grad_(False).eval()


class Observers:
    """The face of `observers.Observers` with the networks `a` and `b`; counts what was loaded."""

    def __init__(self, classes: int):
        self.networks = {"a": network(1, classes), "b": network(2, classes)}
        self.loaded: list[str] = []

    def load(self, name: str, epoch: int) -> nn.Module:
        self.loaded.append(name)
        return self.networks[name]

    def fingerprint(self, name: str, epoch: int) -> str:
        return f"{name}{epoch}"

    def facts(self, name: str, epoch: int) -> dict:
        return {
            "arch": "convnet",
            "epochs": epoch,
            "accuracy": 0.75,
            "source": "trained here",
            "sha256": f"{name}{epoch}",
        }


def recipe(ipc: int = 2, **sections) -> Recipe:
    """A recipe with the observers `a` and `b`, trained for three epochs."""
    networks = [{"name": name, "arch": "convnet", "train": {"epochs": 3}} for name in "ab"]
    return Recipe(**{"name": "toy", "ipc": ipc, "observers": {"networks": networks}, **sections})


def real(classes: int, size: int = 16) -> SimpleNamespace:
    """What the writer of a set asks of the real set."""
    names = [f"class {i}" for i in range(classes)]
    source = SOURCE if size == 16 else noise(120, size, seed=9)
    known = {"id": "toys/blocks", "commit": "c0ffee" * 6 + "0000", "fingerprint": "f" * 16}
    _has_no_card(known["id"], known["commit"])
    return SimpleNamespace(names=names, images=lambda rows: source[rows], **known)


def _has_no_card(id: str, commit: str) -> None:
    """Lets the cache of the Hub's client know that a data set has no README.md."""
    there = Path(HF_HUB_CACHE) / f"datasets--{id.replace('/', '--')}/.no_exist/{commit}/README.md"
    there.parent.mkdir(parents=True, exist_ok=True)
    there.touch()


CLASSES, IPC = 5, 2
COUNT = CLASSES * IPC
SOURCE = noise(120, 16, seed=9)  # the images of `real`


RELABEL = {"epochs": 2, "batch": 4, "rand_augment": 2, "shuffle": 2}


def written(
    folder: Path,
    session: Session,
    *,
    images=None,
    control=None,
    size=16,
    epochs: int = 2,
    relabel: dict | None = None,
    encoding: dict | None = None,
) -> Path:
    """A set of ten images with labels, written to `folder`."""
    images = noise(COUNT, size) if images is None else images
    given = recipe(
        IPC, relabel={**RELABEL, "epochs": epochs, **(relabel or {})}, images=encoding or {}, evaluation={"epochs": 2}
    )
    observers = Observers(CLASSES)
    files = encode(images, given.images)
    rows = torch.arange(COUNT).int().view(-1, 1)
    tiles = [rows + 100, rows - 5] * max(1, given.images.grid**2 // 2)
    writing.write(
        folder,
        recipe=given,
        files=files,
        initial=SimpleNamespace(images=noise(COUNT, size, seed=7), source_rows=torch.cat(tiles, 1)),
        real=real(CLASSES, size),
        labels=labels.obtain(given, decode(files), observers, session),
        observers=observers,
        control=control,
    )
    return folder
