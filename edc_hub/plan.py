"""`--dry_run`: what a run would make and how long it would take, from a few iterations of each stage.

Observers are built untrained, one batch of real images is decoded, and nothing is written.
"""

import copy
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from . import (
    canvas,
    codecs,
    encoding,
    initialize,
    labels,
    launch,
    matching,
    moments,
    observers,
    rded,
    source,
    views,
)
from .networks import Network
from .objective import Objective, Observed, Slope
from .pixels import to_float
from .recipe import Recipe
from .recorded import PLAIN, Recorded
from .section import Network as Section
from .selection import users
from .source import RealSet
from .taps import Taps
from .targets import Targets
from .work import Session


def dry_run(recipe: Recipe) -> None:
    """Prints the plan on stdout."""
    with TemporaryDirectory() as nothing, launch.session(recipe, Path(nothing)) as session:
        real = source.load(recipe.source)
        initialize.check(recipe, real)
        labels.check(recipe, len(real.names))
        networks = untrained(recipe, len(real.names), session)
        if session.state.is_main_process:  # before what may take minutes
            processes, device = session.state.num_processes, session.device
            print(f"{real.id}: {len(real.names)} classes, {len(real.rows())} training images at {real.size} px")
            print(f"run folder: {launch.run_folder(recipe)}   processes: {processes}   device: {device}", flush=True)
        seconds = project(recipe, real, networks, session)
        if session.state.is_main_process:
            times(seconds)
            _print(recipe, real)


def untrained(recipe: Recipe, classes: int, session: Session) -> dict[str, Network]:
    """The observers with random weights. Raises InputError for one that is not to be had."""
    return {net.name: observers.untrained(recipe, net, classes, session) for net in recipe.observers.networks}


def project(
    recipe: Recipe, real: RealSet, networks: dict[str, Network], session: Session, shown: Tensor | None = None
) -> dict[str, float]:
    """Projected seconds of each stage on the processes at hand; each measurement is a line on stderr.

    Args: shown: what is labelled, uint8 (n, 3, s, s), where that is not of the size of the real images.
    """
    rows, classes, processes = real.rows(), len(real.names), session.state.num_processes
    generator = torch.Generator().manual_seed(0)
    together = min(recipe.synthesize.block, classes * recipe.ipc)
    if not recipe.source.streaming:  # of a stream the first rows are read, and no more
        rows = rows[torch.randperm(len(rows), generator=generator)]
    picked = rows[: max(recipe.moments.batch, together)].sort().values
    images, labels, _ = next(iter(real.batches(picked, len(picked))))
    images, labels = images.to(session.device), labels.to(session.device)
    size, total, count = len(images), classes * recipe.ipc, len(rows)
    shown = images if shown is None else shown[:size].to(session.device)

    def clock(what: str, call: Callable[..., object], *arguments: Any) -> float:
        session.report(f"measuring {what}")
        return seconds_of(partial(call, *arguments), session)

    look = {
        name: clock(f"{name} looking at images", _looking(network, session), shown) / len(shown)
        for name, network in networks.items()
    }

    in_use = {stage: [name for name, _ in entries] for stage, entries in users(recipe).items()}

    def looks(stage: str) -> float:
        return sum(look[name] for name in in_use.get(stage, []))

    training = [net for net in recipe.observers.networks if net.train is not None]
    steps = {net.name: net.train.epochs * count / min(net.train.batch, size) for net in training}
    batches = {net.name: (images[: net.train.batch], labels[: net.train.batch]) for net in training}
    trained = sum(
        clock(f"{net.name} in training", _training(net, networks[net.name], session), *batches[net.name])
        * steps[net.name]
        for net in training
    )

    start = recipe.initialize
    crops = classes * start.images_per_class * start.crops
    if start.variant == "edc":
        crops = count + classes * rded.EDC_IMAGES * rded.EDC_CROPS  # all images, then the crops of those kept
    scored = {"rded": crops, "kmeans": classes * start.images_per_class}

    section = recipe.synthesize
    matched = in_use.get("synthesize", [])
    taps = {name: Taps(networks[name], patch=recipe.moments.patch) for name in matched}
    measured = 0.0
    for name, tap in taps.items():
        measured += clock(f"moments of {name}", moments.forward, networks[name], tap, images, session) / size
    block = images[:together], labels[:together].sort().values
    each = sum(
        clock(f"synthesis by {name}", _iterating(recipe, networks[name], *block, session)) for name in matched
    ) / max(1, len(matched))
    blocks = -(-total // section.block)
    busiest = -(-blocks // processes)

    side = shown.shape[-1]
    table = views.sample(recipe.relabel, torch.arange(len(shown)), side, generator)
    viewed = clock("views", views.apply, shown, table, recipe.relabel.view_size or side) / len(shown)
    labelled = _label_epochs(recipe, total, classes) * sets(recipe)
    if recipe.relabel.full:
        labelled += recipe.relabel.epochs - _label_epochs(recipe, total, classes)
    return {
        "observers": trained / max(1, min(processes, len(training))),
        "moments": measured * count / processes,
        "initialize": looks("initialize") * scored.get(start.kind, 0) / processes,
        "synthesize": each * section.iterations * busiest,
        "relabel": (looks("relabel") + viewed) * labelled * total / processes,
    }


def seconds_of(call: Callable[[], object], session: Session) -> float:
    """Seconds of one call: the better of two after a warm-up, on a GPU after it is recorded."""
    times = []
    for _ in range(PLAIN + 3 if session.device.type == "cuda" else 3):
        start = time.perf_counter()
        call()
        if session.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[-2:])


def _looking(network: Network, session: Session) -> Callable[[Tensor], Tensor]:
    """Logits of uint8 images."""

    def forward(images: Tensor) -> Tensor:
        with torch.no_grad(), session.autocast():
            return network(to_float(images, session.device))

    return Recorded(forward, session.device)


def _training(net: Section, network: Network, session: Session) -> Callable[[Tensor, Tensor], Tensor]:
    """A step of an observer's training, on uint8 images and labels; `network` stays as it is."""
    training = observers.trainer(copy.deepcopy(network).train().requires_grad_(True), net.train, session)
    return lambda images, labels: training.descend(to_float(images, session.device), labels)


def _iterating(
    recipe: Recipe, network: Network, images: Tensor, labels: Tensor, session: Session
) -> Callable[[], tuple[Tensor, Tensor]]:
    """A step of synthesis by one observer, but for Adam's part."""
    section = recipe.synthesize.model_copy(update={"pick": "turn"})  # there is one to pick from
    taps = Taps(network, patch=recipe.moments.patch, layers=section.layers)
    with torch.no_grad(), taps:
        network(to_float(images, session.device))
    first, second = taps.collect()
    mean, var = matching.group(first, second, taps.shift, torch.full((1, len(images)), 1 / len(images)).to(first))
    present = labels.unique().cpu()
    of_classes = mean.expand(len(present), -1), var.expand(len(present), -1)
    targets = Targets(taps.layout, mean[0], var[0], present, *of_classes, mean[0], var[0])
    labels = labels.repeat_interleave(recipe.images.grid**2)  # images stand for canvases
    observed = [Observed(network, targets, labels.cpu(), recipe, session)]
    objective = Objective(observed, labels, recipe.model_copy(update={"synthesize": section}), session.device)
    slope, z, generator = Slope(objective, session), objective.space.to_z(images), torch.Generator()
    return lambda: slope(objective.draw(0, generator), z, z)


def times(seconds: dict[str, float]) -> None:
    """Prints projected seconds and their sum."""
    print(f"\n{'stage':<14}{'projected':>12}")
    for stage, value in (*seconds.items(), ("total", sum(seconds.values()))):
        print(f"{stage:<14}{human(value):>12}")
    print()


def _print(recipe: Recipe, real: RealSet) -> None:
    classes, total = len(real.names), len(real.names) * recipe.ipc
    found = sizes(recipe, real.images(real.rows()[: min(32, len(real.rows()))]), total, classes)
    show(recipe, found)
    count, full = sets(recipe), found.get("soft_labels_full", (0, 0))[1]
    # labels lie in artifacts/views too, dense
    made = total * _label_epochs(recipe, total, classes) * (_view_bytes(recipe) + 2 * classes)
    whole = count * (sum(size for _, size in found.values()) - full + made) + full + max(0, full - made)
    print(f"{'disk':<14}{count:>12} sets  {whole / 2**20:>12.1f} MiB, controls and shared artifacts included")


def sizes(recipe: Recipe, sample: Tensor, total: int, classes: int) -> dict[str, tuple[int, float]]:
    """Rows and bytes of each configuration of `total` images, from a sample of them uint8 (n, 3, s, s)."""
    sample = sample[:32]
    image = sum(map(len, encoding.encode(sample, recipe.images))) / len(sample) + 2 * classes
    found = {"images": (total, total * image)}
    if rows := total * _label_epochs(recipe, total, classes):
        row = _view_bytes(recipe) + codecs.row_bytes(recipe.relabel, classes)
        found["soft_labels"] = rows, rows * row
    if recipe.relabel.full:
        rows = total * recipe.relabel.epochs
        found["soft_labels_full"] = rows, rows * (_view_bytes(recipe) + 2 * classes)
    return found


def show(recipe: Recipe, found: dict[str, tuple[int, float]]) -> None:
    """Prints what a set would hold and, with `hub.push`, what its publication would do."""
    for config, (rows, size) in found.items():
        kind = "" if config == "images" else f", {recipe.relabel.codec if config == 'soft_labels' else 'dense'}"
        print(f"{config:<16}{rows:>10} rows  {size / 2**20:>12.1f} MiB before compression{kind}")
    if recipe.hub.push:
        from . import publish

        print(publish.planned(recipe, {config: size for config, (_, size) in found.items()}))


def sets(recipe: Recipe) -> int:
    """How many sets a run makes: its own and the controls."""
    own = 1 + (recipe.method != "relabel")  # what others' images started from nobody knows
    return own + recipe.relabel.random_draws if recipe.relabel.controls else 1


def _view_bytes(recipe: Recipe) -> int:
    """Bytes of the columns of one view, without its labels."""
    table = views.sample(recipe.relabel, torch.arange(2), recipe.source.size, torch.Generator())
    table = canvas.stored(table, recipe.images.grid)
    return sum(column[0].numel() * column.element_size() for column in table.values())


def _label_epochs(recipe: Recipe, total: int, classes: int) -> int:
    """Label epochs of `total` images that fit the budget, by uncompressed bytes."""
    section = recipe.relabel
    if section.codec == "observers":
        return 0
    one = total * (_view_bytes(recipe) + codecs.row_bytes(section, classes))
    return section.epochs if section.budget is None else min(section.epochs, max(1, int(section.budget * 1e6 / one)))


def human(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
