"""`--dry_run`: what a run would make and how long it would take, from a few iterations of each stage.

Observers are built untrained, one batch of real images is decoded, and nothing is written.
"""

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor

from . import condensed, launch, matching, observers, source, synthesize, views, work
from .moments import Targets
from .recipe import Recipe, selected
from .source import RealSet
from .taps import Taps
from .work import Session


def dry_run(recipe: Recipe) -> None:
    """Prints the plan on stdout."""
    with TemporaryDirectory() as nothing, launch.session(recipe, Path(nothing)) as session:
        real = source.load(recipe.source)
        source.check_ipc(real, recipe.ipc)
        seconds = _seconds(recipe, real, session)
        if session.state.is_main_process:
            _print(recipe, real, seconds, session)


def _seconds(recipe: Recipe, real: RealSet, session: Session) -> dict[str, float]:
    """Projected seconds of each stage on the processes at hand."""
    rows = real.rows()
    generator = torch.Generator().manual_seed(0)
    picked = rows[torch.randperm(len(rows), generator=generator)[: max(recipe.moments.batch, recipe.synthesize.block)]]
    images, labels, _ = next(iter(real.batches(picked.sort().values, len(picked))))
    images, labels = images.to(session.device), labels.to(session.device)
    built = {net.name: observers.untrained(recipe, net, len(real.names), session) for net in recipe.observers.networks}
    count, total = len(rows), len(real.names) * recipe.ipc
    result = {}

    train = 0.0
    for net in recipe.observers.networks:
        if net.train is not None:
            batch = slice(0, net.train.batch)
            step = _clock(
                lambda net=net, batch=batch: _train_step(built[net.name], images[batch], labels[batch]), session
            )
            train += step * net.train.epochs * count / min(net.train.batch, len(images))
    result["observers"] = train / min(session.state.num_processes, max(1, len(built)))

    matched = selected(recipe, recipe.synthesize.observers) if recipe.synthesize.iterations else []
    forward = {
        name: _clock(lambda net=net: _forward(net, images), session) / len(images) for name, net in built.items()
    }
    taps = sum(
        _clock(lambda name=name: _tapped(recipe, built[name], images), session) for name in {n for n, _ in matched}
    )
    result["moments"] = taps / len(images) * count / session.state.num_processes

    scored = {"rded": recipe.initialize.images_per_class * recipe.initialize.crops, "kmeans": count / len(real.names)}
    looks = scored.get(recipe.initialize.kind, 0) * len(real.names)
    looking = sum(forward[name] for name, _ in selected(recipe, recipe.initialize.observers))
    result["initialize"] = looks * looking / session.state.num_processes

    if matched:
        each = sum(
            _clock(lambda n=name: _iteration(recipe, built[n], images, labels, session), session)
            for name, _ in matched
        )
        blocks = -(-total // recipe.synthesize.block)
        share = -(-blocks // session.state.num_processes)  # the busiest process
        result["synthesize"] = each / len(matched) * recipe.synthesize.iterations * share
    else:
        result["synthesize"] = 0.0

    labelling = sum(forward[name] for name, _ in selected(recipe, recipe.relabel.observers))
    table = views.sample(recipe.relabel, torch.arange(len(images)), real.size, generator)
    size = recipe.relabel.view_size or real.size
    labelling += _clock(lambda: views.apply(images, table, size), session) / len(images)
    sets = 2 + recipe.relabel.random_draws if recipe.relabel.controls else 1
    result["relabel"] = labelling * recipe.relabel.epochs * total * sets / session.state.num_processes
    return result


def _clock(call: Callable[[], object], session: Session) -> float:
    """Seconds of one call: the better of two after a warm-up."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        if session.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _forward(network, images: Tensor) -> Tensor:
    with torch.no_grad():
        return network(images.float() / 255)


def _tapped(recipe: Recipe, network, images: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), (taps := Taps(network, patch=recipe.moments.patch)):
        network(images.float() / 255)
    return taps.collect()


def _train_step(network, images: Tensor, labels: Tensor) -> None:
    network.train().requires_grad_(True)
    F.cross_entropy(network(images.float() / 255), labels).backward()
    network.eval().requires_grad_(False).zero_grad()


def _iteration(recipe: Recipe, network, images: Tensor, labels: Tensor, session: Session) -> None:
    section = recipe.synthesize.model_copy(update={"iterations": 1})
    block = slice(0, section.block)
    images, labels = images[block], labels[block].sort().values
    taps = Taps(network, patch=recipe.moments.patch, layers=section.layers)
    with torch.no_grad(), taps:
        network(images.float() / 255)
    first, second = taps.collect()
    mean, var = matching.group(first, second, taps.shift, torch.full((1, len(images)), 1 / len(images)).to(first))
    present = labels.unique().cpu()
    targets = Targets(
        taps.layout,
        mean[0],
        var[0],
        present,
        mean.expand(len(present), -1),
        var.expand(len(present), -1),
        mean[0],
        var[0],
    )
    observed = [synthesize.Observed(network, targets, labels.cpu(), recipe)]
    one = recipe.model_copy(update={"synthesize": section})
    progress = work.Progress(Path("/nonexistent"), float("inf"))
    synthesize.optimise(images, labels, observed, one, session, torch.Generator(), progress)


def _print(recipe: Recipe, real: RealSet, seconds: dict[str, float], session: Session) -> None:
    classes, total = len(real.names), len(real.names) * recipe.ipc
    sample = real.images(real.rows()[: min(32, len(real.rows()))])
    image_bytes = sum(map(len, condensed.encode(sample, recipe.images))) / len(sample) * total + total * classes * 2
    view = views.sample(recipe.relabel, torch.arange(2), real.size, torch.Generator())
    row = sum(column[0].numel() * column.element_size() for column in view.values())
    label_bytes = total * recipe.relabel.epochs * (row + 2 * classes)
    print(f"{real.id}: {classes} classes, {len(real.rows())} training images at {real.size} px")
    print(
        f"run folder: {launch.run_folder(recipe)}   processes: {session.state.num_processes}   device: {session.device}"
    )
    print(f"\n{'stage':<14}{'projected':>12}")
    for stage, value in seconds.items():
        print(f"{stage:<14}{_human(value):>12}")
    print(f"{'total':<14}{_human(sum(seconds.values())):>12}")
    print(f"\n{'images':<14}{total:>12} images{image_bytes / 2**20:>12.1f} MiB")
    print(
        f"{'soft_labels':<14}{total * recipe.relabel.epochs:>12} rows  {label_bytes / 2**20:>12.1f} MiB uncompressed"
    )


def _human(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
