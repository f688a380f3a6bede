"""Accuracy of the lines of code that a card shows, for the whole set and for its first k images of each class.

    edc-hub showcase RUN [--seeds 3]

The very text of the card is executed in the folder of the run, once for each k and seed. Accuracy is top-1 of the last
epoch on the whole test split; nothing is selected on it. It goes into results.json and into the card.
"""

import sys
from contextlib import chdir
from pathlib import Path
from typing import Any

from pydantic import Field

from . import arguments, disk, documents, launch, recipes, results
from .recipe import Recipe
from .section import Positive, Section


BATCH = 256  # test images a forward pass


class Options(Section):
    """What the command takes beside the run."""

    seeds: Positive = Field(3, description="students for each number of images")


def command(argv: list[str]) -> None:
    """Parses, measures, writes."""
    run, options = arguments.of_run(argv, "showcase", Options)
    if not launch.is_first():  # under a launcher
        return
    # with its path of a local source; before the lock, which would make a folder that is not there
    recipe = recipes.of_run(run)
    with launch.lock(run):
        publish(run / "dataset", measure(run, recipe, options.seeds))


main = launch.entry(command)


def measure(run: Path, recipe: Recipe, seeds: int) -> list[dict[str, Any]]:
    """For each k of `prefixes` the accuracies, a student each, of the example on the first k images of each class."""
    from . import manifest as manifests
    from . import report, snippets, source

    manifest = manifests.read(run / "dataset/manifest.json")
    code = snippets.example(manifest, recipe.evaluation, "./dataset")
    test = source.load(recipe.source, "test")
    images, labels = test.images(test.rows()), test.labels[test.rows()]
    found = []
    for k in prefixes(manifest["ipc"]):
        accuracy = [_train(run, prefix(code, k, manifest["ipc"]), seed, images, labels) for seed in range(seeds)]
        found.append({"images_per_class": k, "accuracy": [round(value, 4) for value in accuracy]})
        print(f"first {k} of each class: {report.accuracy(accuracy)}", file=sys.stderr, flush=True)
    return found


def prefixes(ipc: int) -> list[int]:
    """1, 2, 5, 10, 20, … up to the number of images of each class, which is the last."""
    steps = (digit * 10**power for power in range(5) for digit in (1, 2, 5))
    return [*(k for k in steps if k < ipc), ipc]


def prefix(code: str, k: int, ipc: int) -> str:
    """The example for the first k images of each class; as it stands for all of them."""
    if k == ipc:
        return code
    first = code.index('.with_format("torch"')
    return f'{code[:first]}.filter(lambda row: row["ipc_index"] < {k}){code[first:]}'


def _train(run: Path, code: str, seed: int, images, labels) -> float:
    import torch

    torch.manual_seed(seed)
    names: dict[str, Any] = {}
    with chdir(run):
        exec(code, names)
    net, right = names["net"].eval(), 0
    with torch.no_grad():
        for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True):
            right += (net((x / 255 - names["mean"]) / names["std"]).argmax(1) == y).sum().item()
    return right / len(labels)


def publish(folder: Path, found: list[dict[str, Any]]) -> None:
    """Writes `prefixes` into results.json, and the card, which shows them."""
    from . import card, snippets
    from . import manifest as manifests

    evaluation = recipes.resolve(documents.load(folder / "recipe.yaml")).evaluation
    sha = snippets.digest(manifests.read(folder / "manifest.json"), evaluation)
    with disk.turn(folder.parent):
        old = disk.json_of(folder / "results.json")
        results.write({**old, "prefixes": [{**it, "example_sha256": sha} for it in found]}, folder)
        card.again(folder)


if __name__ == "__main__":
    sys.exit(main())
