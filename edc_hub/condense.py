"""The main job: a real image-classification set becomes a condensed set.

    accelerate launch -m edc_hub.condense recipes/cifar100.yaml [--section.key value …]

Six stages, each an artefact that the next reads: observers, moments, initial images, synthesis, soft labels, the
dataset folder. The same command again goes on where it was; on several processes it gives the same bytes.
"""

import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path

from . import launch, recipes, work
from .recipe import Recipe
from .work import Session


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status (0, 1, 2)."""
    return launch.status(lambda: command(sys.argv[1:] if argv is None else argv))


def command(argv: list[str]) -> None:
    """Parses, then prints the recipe or the plan, or does the job."""
    parsed = recipes.parse(argv, prog="condense")
    recipe = parsed.recipe
    if parsed.print_recipe:
        print(recipes.dump(recipe), end="")
        return
    if parsed.dry_run:
        from .plan import dry_run

        dry_run(recipe)
        return
    folder = launch.run_folder(recipe)
    with work.lock(folder) if launch.is_first() else nullcontext():
        with launch.session(recipe, launch.artifacts(recipe)) as session:
            dataset = condense(recipe, folder, session)
            if session.state.is_main_process:
                print(dataset)


def condense(recipe: Recipe, folder: Path, session: Session) -> Path:
    """Does the whole job on every process of the group; returns the dataset folder."""
    from . import initialize, moments, observers, source, synthesize

    clock = Clock(session)
    with clock("source"):
        real = source.load(recipe.source)
        source.check_ipc(real, recipe.ipc)
    if session.state.is_main_process:
        work.sweep(launch.artifacts(recipe))
        work.write_atomically(folder / "recipe.yaml", lambda path: path.write_text(recipes.dump(recipe)))
    with clock("observers"):
        watching = observers.obtain(recipe, real, session)
    matched = recipe.synthesize.iterations > 0
    with clock("moments"):
        targets = moments.obtain(recipe, real, watching, session) if matched else None
    with clock("initialize"):
        initial = initialize.obtain(recipe, real, watching, session)
    with clock("synthesize"):
        images = synthesize.obtain(recipe, real, watching, targets, initial, session)
    dataset = folder / "dataset"
    publish(recipe, real, watching, images, initial, dataset, "relabel", session, clock)
    if recipe.relabel.controls:
        control(recipe, real, watching, initial, folder / "controls", session, clock)
    if session.state.is_main_process:
        finish(recipe, real, clock, folder, session)
    return dataset


def control(recipe, real, watching, initial, folder: Path, session: Session, clock: "Clock") -> None:
    """The sets that show what synthesis adds: the initial images, and random real images, with labels made alike."""
    from . import initialize

    label = "control initial"
    publish(recipe, real, watching, initial.images, initial, folder / "initial", label, session, clock, "initial")
    for draw in range(recipe.relabel.random_draws):
        rows = initialize.random_rows(real, recipe.ipc, work.generator(recipe.seed, "random", str(draw)))
        start = initialize.Initial(real.images(rows), rows.int().view(-1, 1), "")
        place, label = folder / "random" / str(draw), f"control random {draw}"
        publish(recipe, real, watching, start.images, start, place, label, session, clock, "random")


def publish(
    recipe, real, watching, images, initial, folder: Path, label: str, session: Session, clock, control=None
) -> None:
    """Encodes and labels a set of images and writes its dataset folder."""
    from . import condensed, labels

    with clock(label):
        files = condensed.encode(images, recipe.images)
        soft = labels.obtain(recipe, condensed.decode(files), watching, session, label)
        if session.state.is_main_process:
            condensed.write(
                folder,
                recipe=recipe,
                files=files,
                initial=initial,
                real=real,
                labels=soft,
                observers=watching,
                control=control,
            )
        session.state.wait_for_everyone()


class Clock:
    """Times the stages: a line on stderr for each, and `seconds` for run.json."""

    def __init__(self, session: Session):
        self.session, self.seconds = session, {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - start, 2)
        self.session.report(f"{stage:<20}{self.seconds[stage]:>10.1f} s")


def finish(recipe: Recipe, real, clock: Clock, folder: Path, session: Session) -> None:
    """Writes run.json, what was measured, and says where the set is and how to load it."""
    import resource

    import torch

    gpu = torch.cuda.is_available() and session.device.type == "cuda"
    facts = {
        "seconds": clock.seconds,
        "processes": session.state.num_processes,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "peak_gpu_memory_gb": round(torch.cuda.max_memory_allocated() / 2**30, 2) if gpu else 0.0,
        "source": {"id": real.id, "commit": real.commit, "fingerprint": real.fingerprint},
        "versions": {name: version(name) for name in ("torch", "datasets", "transformers", "timm", "accelerate")},
        "python": platform.python_version(),
    }
    work.write_atomically(folder / "run.json", lambda path: path.write_text(json.dumps(facts, indent=2) + "\n"))
    dataset = folder / "dataset"
    size = sum(path.stat().st_size for path in dataset.rglob("*") if path.is_file())
    count = len(real.names) * recipe.ipc
    session.report(
        f"\n{count} images, {size / 2**20:.1f} MiB in {dataset}\n"
        f'  from datasets import load_dataset\n  load_dataset("{dataset}", split="train")'
    )


if __name__ == "__main__":
    sys.exit(main())
