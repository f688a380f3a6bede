"""What the stages cost beside the bare network, for each observer of CIFAR-100 and for all five together.

    python benchmarks/stages.py [--json FILE] [--networks resnet18 …] [--stages moments …] [--rounds 15] [--threads 2]

Both sides work on the same batch in one process, turn by turn, so that a busy machine slows both; reported are the
median of the rounds' ratios and their quartiles. Peak memory is that of a fresh process for each side. The bare
network is a no-grad forward for moments and relabel, for synthesis forward, cross-entropy and backward to the input
with frozen weights, for training forward, loss, backward and the step of the optimiser. Batches and settings are those
of the shipped recipe cifar100; a round of training is as many steps as have their views made at once.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from accelerate import PartialState

from edc_hub import crops, feed, labels, launch, matching, moments, networks, recipes, students, synthesize, views
from edc_hub.condensed import CondensedSet
from edc_hub.networks import Network
from edc_hub.pixels import Space
from edc_hub.taps import Taps
from edc_hub.targets import Targets
from edc_hub.work import Session, Store, generator


CLASSES = 100
SETUP = recipes.parse(["cifar100"], "condense").recipe
NETWORKS = {network.name: network for network in SETUP.observers.networks[:5]}
TOGETHER = "all five together"

Step = Callable[[], None]


def build(name: str) -> Network:
    """An observer with random weights, and BatchNorm buffers that fit: what a step costs does not depend on more."""
    network = networks.described(NETWORKS[name], CLASSES, seed=0, **SETUP.source.face)
    with torch.no_grad():
        for _ in range(10):
            network.train()(images(16) / 255)
    return network.eval().requires_grad_(False)


def images(count: int) -> torch.Tensor:
    """uint8 (count, 3, 32, 32), smooth noise."""
    coarse = torch.rand(count, 3, 8, 8, generator=generator(0, "benchmark", "images"))
    return (255 * F.interpolate(coarse, SETUP.source.size, mode="bicubic").clamp(0, 1)).to(torch.uint8)


def moments_step(names: list[str], session: Session) -> tuple[Step, Step]:
    """A batch of the pass over the real set."""
    batch, of_class = images(SETUP.moments.batch), torch.full((SETUP.moments.batch,), 3)
    watching = {}
    for name in names:
        network = build(name)
        taps = Taps(network, patch=SETUP.moments.patch)
        taps.shift = moments.forward(network, taps, batch, session)[0].mean(0)
        watching[name] = network, taps
    sums = {name: torch.zeros(3, 8, taps.layout.size, dtype=torch.float64) for name, (_, taps) in watching.items()}

    @torch.no_grad()
    def bare() -> None:
        x = batch.float() / 255
        for network, _ in watching.values():
            network(x)

    def ours() -> None:
        for name, (network, taps) in watching.items():
            present, partial = moments.class_sums(*moments.forward(network, taps, batch, session), of_class)
            sums[name][:, present] += partial

    return bare, ours


def synthesis_step(names: list[str], session: Session, flatness: str = "none") -> tuple[Step, Step]:
    """One iteration of each observer on a block of ten classes."""
    section = SETUP.synthesize.model_copy(
        update={"flatness": SETUP.synthesize.flatness.model_copy(update={"kind": flatness})}
    )
    recipe = SETUP.model_copy(update={"synthesize": section})
    start, of_class = images(section.block), torch.arange(10).repeat_interleave(section.block // 10)
    made = [build(name) for name in names]
    observed = [
        synthesize.Observed(network, targets(network, of_class, session), of_class, recipe, session)
        for network in made
    ]
    space, draws = Space(recipe.source, session.device), generator(0, "benchmark", "crops")
    z = space.to_z(start).requires_grad_()
    average = z.detach().clone()
    adam = torch.optim.Adam([z], lr=section.lr, betas=tuple(section.betas), eps=section.eps)

    def bare() -> None:
        for network in made:
            x = (start.float() / 255).requires_grad_()
            torch.autograd.grad(F.cross_entropy(network(x), of_class), x)

    def ours() -> None:
        for one in observed:  # what a step of `synthesize.optimise` computes, which a GPU replays from a recording
            crop, averaged = crops.Crop(start.shape[-1], section, draws), None
            if flatness == "logits":
                average.lerp_(z.detach(), 1 - section.flatness.beta)
                averaged = crop(space.to_x(average))
            loss = one.loss(crop(space.to_x(z)), averaged, of_class, section)
            (z.grad,) = torch.autograd.grad(loss, z)
            adam.step()
            space.clamp(z)

    return bare, ours


def targets(network: Network, of_class: torch.Tensor, session: Session) -> Targets:
    """Targets near what the images have, so that the losses are of a usual size."""
    taps = Taps(network, patch=SETUP.moments.patch)
    mean, var = matching.group(*moments.forward(network, taps, images(len(of_class)), session), taps.shift)
    mean, var, ids = 1.1 * mean, 0.9 * var, of_class.unique()
    by_class = mean.expand(len(ids), -1), var.expand(len(ids), -1)
    return Targets(taps.layout, mean[0], var[0], ids, *by_class, mean[0], var[0])


def relabel_step(names: list[str], session: Session) -> tuple[Step, Step]:
    """A batch of views with their mean logits."""
    section, made = SETUP.relabel, [build(name) for name in names]
    stored, draws = images(1000), generator(0, "benchmark", "views")
    ids, size = torch.arange(section.batch), SETUP.source.size
    x = stored[: section.batch].float() / 255

    @torch.no_grad()
    def bare() -> None:
        for network in made:
            network(x)

    def ours() -> None:
        table = views.sample(section, ids, size, draws)
        labels.mean_logits(made, views.apply(stored, table, section.view_size or size), section, session).half()

    return bare, ours


def training_step(names: list[str], session: Session) -> tuple[Step, Step]:
    """Steps of each student on stored views with stored labels, weight average included."""
    section, size = SETUP.evaluation, SETUP.source.size
    fed = feed.Stored(labelled_set(epochs=10), section.batch, session.device, seed=0)
    endless = (batch for epoch in range(10**6) for batch in fed.epoch(epoch, generator(0, "benchmark", str(epoch))))
    steps = views.at_once(size, section.batch, session.device) // section.batch
    batch = next(endless)
    plain, taught = [], []
    for name in names:
        learner = students.Learner(build(name).requires_grad_(), section, session)
        learner.begin(section.lr)
        taught.append(learner)
        bare_network = build(name).requires_grad_().train().to(memory_format=learner.layout)
        x = batch.x.to(memory_format=learner.layout)
        plain.append((bare_network, students.optimizer_of(section, bare_network), x))

    def bare() -> None:
        for _ in range(steps):
            for network, optimizer, x in plain:
                loss = students.loss_of(section, network(x), batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    def ours() -> None:
        for _ in range(steps):
            batch = next(endless)
            for learner in taught:
                learner.step(batch)

    return bare, ours


def labelled_set(epochs: int) -> CondensedSet:
    """The face of a condensed set of 1000 images in memory, with labels of noise."""
    section, draws, stored = SETUP.relabel, generator(0, "benchmark", "labels"), images(1000)
    drawn = []
    for epoch in range(epochs):
        for ids in torch.randperm(len(stored), generator=draws).split(section.batch):
            drawn.append(views.sample(section, ids, SETUP.source.size, draws, epoch=epoch))
    table = {name: torch.cat([part[name] for part in drawn]) for name in drawn[0]}
    soft = torch.randn(len(stored) * epochs, CLASSES, generator=draws).half()
    facts = {**section.model_dump(), "view_size": SETUP.source.size}
    return SimpleNamespace(
        pictures=stored,
        of_pictures=lambda of_images: of_images,
        labels=torch.arange(1000) // 10,
        names=[str(name) for name in range(CLASSES)],
        epochs=epochs,
        manifest={"soft_labels": facts},
        labelled=lambda start, stop: (views.take(table, slice(1000 * start, 1000 * stop)), soft[1000 * start :]),
    )


STAGES: dict[str, Callable[[list[str], Session], tuple[Step, Step]]] = {
    "moments": moments_step,
    "synthesis": synthesis_step,
    "synthesis, flatness": lambda names, session: synthesis_step(names, session, "logits"),
    "relabel": relabel_step,
    "training": training_step,
}


def times(stage: str, names: list[str], rounds: int, session: Session) -> dict[str, float]:
    """Milliseconds of both sides and quartiles of the rounds' ratios."""
    bare, ours = STAGES[stage](names, session)
    bare(), ours()
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        bare()
        middle = time.perf_counter()
        ours()
        taken.append((middle - start, time.perf_counter() - middle))
    low, median, high = statistics.quantiles([b / a for a, b in taken], n=4, method="inclusive")
    bare_ms, ours_ms = (1000 * statistics.median(side) for side in zip(*taken, strict=True))
    return {"bare_ms": bare_ms, "ours_ms": ours_ms, "ratio": median, "low": low, "high": high}


def memory(stage: str, names: list[str], threads: int) -> float:
    """MB that the peak of a process with ours is above that of one with the bare network."""
    peaks = []
    for side in ("bare", "ours"):
        command = [sys.executable, __file__, "--peak", side, "--stages", stage, "--threads", str(threads)]
        done = subprocess.run([*command, "--networks", *names], capture_output=True, text=True, check=True)
        peaks.append(float(done.stdout))
    return peaks[1] - peaks[0]


def peak() -> float:
    """MB of memory that this process had at most. (ru_maxrss would count its parent's, from before the exec.)"""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write what was measured to this file")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak", choices=["bare", "ours"], help=argparse.SUPPRESS)  # the fresh process of `memory`
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    launch.keep_freed_memory()  # as the commands do
    with tempfile.TemporaryDirectory() as folder:
        session = Session(Store(Path(folder)), PartialState(cpu=True), torch.device("cpu"))
        if given.peak:
            step = STAGES[given.stages[0]](given.networks, session)[given.peak == "ours"]
            for _ in range(4):
                step()
            print(peak())
            return
        report(given, session)


def report(given: argparse.Namespace, session: Session) -> None:
    """Prints a row as soon as it is measured; writes them all as JSON if asked to."""
    print(f"{platform.processor() or platform.machine()}, {given.threads} threads, torch {torch.__version__}")
    print("| stage | network | bare, ms | ours, ms | ratio | quartiles | memory over bare, MB |")
    print("|---|---|---|---|---|---|---|")
    together = {TOGETHER: given.networks} if len(given.networks) == len(NETWORKS) else {}
    rows = []
    for stage in given.stages:
        for label, names in ({name: [name] for name in given.networks} | together).items():
            row = {"stage": stage, "network": label, **times(stage, names, given.rounds, session)}
            row["memory_mb"] = memory(stage, names, given.threads)
            rows.append(row)
            cells = [stage, label, f"{row['bare_ms']:.0f}", f"{row['ours_ms']:.0f}", f"{row['ratio']:.2f}"]
            cells += [f"{row['low']:.2f} to {row['high']:.2f}", f"{row['memory_mb']:.0f}"]
            print(f"| {' | '.join(cells)} |", flush=True)
    if given.json:
        facts = {"machine": platform.machine(), "threads": given.threads, "torch": torch.__version__}
        given.json.write_text(json.dumps({**facts, "rounds": given.rounds, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
