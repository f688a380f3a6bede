"""Steps on a GPU, launched from Python and replayed as CUDA graphs (`edc_hub.recorded`).

    python benchmarks/recorded.py [--students resnet18 convnet3] [--steps 1000] [--processes 6]

A student's step is forward, loss, backward, AdamW and weight average on a batch of 25 images of 32 px that lies on the
GPU. A step of synthesis is `synthesize.optimise`'s on a block of 100 images of 32 px, five observers of CIFAR-100 (of
random weights) in turn, without what it takes to record them. The last figure is what a step takes where so many
processes share the GPU, each with work of its own.
"""

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import stages
import torch
import torch.multiprocessing
from accelerate import PartialState

from edc_hub import networks, objective, students, synthesize
from edc_hub.feed import Batch
from edc_hub.protocol import Evaluation
from edc_hub.recorded import Recorded
from edc_hub.work import Progress, Session, Store, generator


BATCH, CLASSES, SIZE = 25, 10, 32


def milliseconds(student: str, steps: int, recorded: bool) -> float:
    """Of one step, over `steps` after a warm-up."""
    torch.set_num_threads(1)
    device = torch.device("cuda")
    session = Session(Store(Path("unused")), PartialState(), device)
    section = Evaluation(optimizer="adamw", lr=1e-3, ema={"decay": 0.99, "bn": "live"}, loss="mse_ce")
    face = {"image_size": SIZE, "mean": [0.5] * 3, "std": [0.25] * 3}
    learner = students.Learner(networks.build(student, CLASSES, seed=0, **face), section, session)
    learner.descend.enabled = recorded
    label = torch.randint(CLASSES, (BATCH,), device=device)
    x, soft = torch.rand(BATCH, 3, SIZE, SIZE, device=device), torch.randn(BATCH, CLASSES, device=device)
    batch = Batch(x, soft, label, label, torch.ones(BATCH, device=device))
    learner.begin(section.lr)
    for _ in range(20):
        learner.step(batch)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        learner.step(batch)
    torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start) / steps


def synthesis(steps: int, recorded: bool, device: str = "cuda") -> float:
    """Milliseconds of one step, over `steps`."""
    torch.set_num_threads(1)
    objective.Recorded = partial(Recorded, enabled=recorded)
    session = Session(Store(Path("unused")), PartialState(), torch.device(device))
    start, of_class = stages.images(100), torch.arange(10).repeat_interleave(10)
    made = [stages.build(name).to(session.device, memory_format=torch.channels_last) for name in stages.NETWORKS]
    wanted = [stages.targets(network, of_class, session) for network in made]

    def seconds(iterations: int) -> float:
        section = stages.SETUP.synthesize.model_copy(update={"iterations": iterations})
        recipe = stages.SETUP.model_copy(update={"synthesize": section})
        observed = [synthesize.Observed(*both, of_class, recipe, session) for both in zip(made, wanted, strict=True)]
        never, begun = Progress(Path("unused"), math.inf), time.perf_counter()
        synthesize.optimise(start, of_class, observed, recipe, session, generator(0, "benchmark", "block"), never)
        return time.perf_counter() - begun

    seconds(20)
    return 1000 * (seconds(40 + steps) - seconds(40)) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", nargs="*", default=["resnet18", "convnet3"])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=6)
    given = parser.parse_args()
    of: dict[str, Callable[..., float]] = {name: partial(milliseconds, name) for name in given.students}
    print("| step | from Python, ms | replayed, ms | replayed, processes together, ms each |\n|---|---|---|---|")
    for name, function in (of | {"synthesis": synthesis}).items():
        plain, replayed = (function(given.steps, recorded) for recorded in (False, True))
        with torch.multiprocessing.get_context("spawn").Pool(given.processes) as pool:
            shared = pool.starmap(function, [(given.steps, True)] * given.processes)
        print(f"| {name} | {plain:.2f} | {replayed:.2f} | {sum(shared) / len(shared):.2f} |", flush=True)


if __name__ == "__main__":
    main()
