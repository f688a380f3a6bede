"""Images that somebody else has condensed, in the order of our schema and under the classes of our source."""

import shlex
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import disk, manifest, pixels, recipe, remote, source
from .errors import InputError
from .source import RealSet


if TYPE_CHECKING:
    from .given import Given


class Foreign(NamedTuple):
    images: Tensor
    """uint8 (C*ipc, 3, s, s), class-major, in the order of the rows inside a class."""
    ipc: int
    facts: dict[str, Any]
    """What a manifest says of where they come from: id, commit, split, fingerprint, and flags that were given."""
    grid: int
    """Pictures a side of each image, by the manifest of a set of ours; 1 where nothing says so."""


def load(given: "Given", section: recipe.Source, real: RealSet) -> Foreign:
    """Reads the images. They are kept as they are where all are square and of one size, else need `given.size`.

    Raises InputError as `source.load` does, and for images of several sizes, classes that are not those of `real`,
    and classes of unequal numbers of images.
    """
    asked = recipe.Source(
        path=given.place,
        name=given.config,
        revision=given.revision,
        image_column=given.image_column,
        label_column=given.label_column,
        train_split=given.split,
        size=given.size or section.size,
        resize=section.resize,
    )
    found = source.load(asked)
    labels = _classes(found, section, real)[found.labels]
    rows, ipc = _class_major(found, labels, real.names, given.ipc)
    side = given.size or _side(found, rows)
    if side != found.size:
        found = source.load(asked.model_copy(update={"size": side}))
    name = found.id if given.place == given.images else disk.local(given.images, "images").absolute().name  # of a run
    facts = {"id": name, "commit": found.commit, "split": found.split, "fingerprint": found.fingerprint}
    if flags := _flags(given):
        facts["flags"] = flags
    place, commit = given.place, found.commit
    made = manifest.there(remote.fetch(place, commit, "manifest.json") if commit else disk.local(place, "images"))
    return Foreign(found.images(rows), ipc, facts, manifest.grid(made) if "format_version" in made else 1)  # of ours


def _flags(given: "Given") -> str:
    """What else the command says of the images, for a card: `--split validation --ipc 1`."""
    named = given.model_dump(exclude={"images", "revision"}, exclude_defaults=True)
    return shlex.join([word for key, value in named.items() for word in (f"--{key}", str(value))])


def _classes(found: RealSet, section: recipe.Source, real: RealSet) -> Tensor:
    """Our number, int64 (n + 1,), of each class of theirs, -1 for none; the last is that of label -1.

    By name; or, where theirs are plain numbers and as many, by the numbers that `source.classes` lists, else in
    their order.
    """
    theirs, ours = found.names, real.names
    if not set(ours) <= set(theirs) and len(theirs) == len(ours) and all(name.isdecimal() for name in theirs):
        numbers = [int(name) for name in theirs]
        chosen = section.classes if sorted(section.classes or [], key=str) == sorted(numbers, key=str) else None
        order = chosen or sorted(numbers)
        return torch.tensor([*(order.index(number) for number in numbers), -1])
    missing = [name for name in ours if name not in theirs]
    if missing:
        what = f"no class '{missing[0]}'" + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
        raise InputError(
            f"--images: {found.id} has {what} of {real.id}; it has {len(theirs)}: {', '.join(theirs[:5])}"
            f"{', …' if len(theirs) > 5 else ''}; give labels that are the names of the {len(ours)} classes or their "
            "numbers, or keep fewer with source.classes"
        )
    return torch.tensor([*(ours.index(name) if name in ours else -1 for name in theirs), -1])


def _class_major(found: RealSet, labels: Tensor, names: list[str], ipc: int | None) -> tuple[Tensor, int]:
    """Rows int64 (C*ipc,) class by class, the first `ipc` of each or all, and that number."""
    counts = torch.bincount(labels[labels >= 0], minlength=len(names))
    least, most = int(counts.argmin()), int(counts.argmax())
    few, many = int(counts[least]), int(counts[most])
    wanted = ipc or many
    if few < wanted:
        short = f"--images: {found.id} has {few} images of class '{names[least]}'"
        if few == 0:
            raise InputError(f"{short}; leave it out with source.classes, or give a set that has it")
        said = f"{wanted} are asked for" if ipc else f"{many} of '{names[most]}', and a set has as many of each"
        raise InputError(f"{short}, {said}; write --ipc {few} to take the first {few} of each")
    return torch.cat([(labels == label).nonzero().flatten()[:wanted] for label in range(len(names))]), wanted


def _side(found: RealSet, rows: Tensor) -> int:
    """The side of the images, all square and of one size. InputError where they are not."""
    sizes: Counter[tuple[int, int]] = Counter()
    for part in rows.sort().values.split(256):
        for file in found.source.read(part.numpy()):
            try:
                sizes[pixels.decode(*file).size] += 1
            except Exception:  # each codec fails in its own way; `images` says which row it is
                continue
    odd = [size for size, _ in sizes.most_common() if size[0] != size[1]]
    if odd or len(sizes) > 1:
        shown = ", ".join(f"{width}x{height}" for (width, height), _ in sizes.most_common(3))
        what = "not square" if len(sizes) == 1 else f"of {len(sizes)} sizes"
        raise InputError(
            f"--images: the images of {found.id} are {what} ({shown}); write --size {found.size} to bring them to the "
            "size of the recipe's source, or another size"
        )
    return next(iter(sizes))[0] if sizes else found.size
