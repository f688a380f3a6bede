"""A student's training step on a GPU, launched from Python and replayed as a CUDA graph (`edc_hub.recorded`).

    python benchmarks/recorded.py [--students resnet18 convnet3] [--steps 1000] [--processes 6]

A step is forward, loss, backward, AdamW and weight average on a batch of 25 images of 32 px that lies on the GPU. The
last figure is what a step takes where so many processes share the GPU, each with a student of its own.
"""

import argparse
import time
from pathlib import Path

import torch
import torch.multiprocessing
from accelerate import PartialState

from edc_hub import networks, students
from edc_hub.feed import Batch
from edc_hub.protocol import Evaluation
from edc_hub.work import Session, Store


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", nargs="+", default=["resnet18", "convnet3"])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=6)
    given = parser.parse_args()
    print("| student | from Python, ms | replayed, ms | replayed, processes together, ms each |\n|---|---|---|---|")
    for student in given.students:
        plain, replayed = (milliseconds(student, given.steps, recorded) for recorded in (False, True))
        with torch.multiprocessing.get_context("spawn").Pool(given.processes) as pool:
            shared = pool.starmap(milliseconds, [(student, given.steps, True)] * given.processes)
        print(f"| {student} | {plain:.2f} | {replayed:.2f} | {sum(shared) / len(shared):.2f} |", flush=True)


if __name__ == "__main__":
    main()
