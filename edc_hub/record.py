"""What an evaluation leaves behind: what a reader of its figures must know, and the files."""

from pathlib import Path
from typing import Any

from torch import Tensor

from . import card, disk, documents, launch, recipes, report, results
from .accuracy import top1
from .comparison import Comparison, Parsed
from .protocol import Evaluation
from .realset import RealSet
from .recipe import Recipe
from .results import Outcome
from .trials import Bench, Done
from .work import Session


def outcome(done: Done, bench: Bench) -> Outcome:
    """The accuracy of a trial, from its predictions."""
    trial, truth = done.trial, bench.truth
    live, ema = (top1(done.tensors[key].long(), truth) for key in ("live", "ema"))
    steps, seconds = done.facts["steps"], done.facts["seconds"]
    return Outcome(trial.row, trial.student, trial.set, trial.draw, trial.seed, live, ema, steps, seconds)


def about(parsed: Parsed, bench: Bench, done: list[Done], session: Session) -> dict[str, Any]:
    """Everything that a reader of the figures must know, for results.json."""
    asked, first, judged = parsed.comparison, parsed.sets[0], bench.judged_on
    every = [each.facts for each in done]
    unknown = {part: dict.fromkeys(facts, "unknown") for part, facts in launch.machine(session).items()}  # older ones
    rows = {}
    for row in dict.fromkeys(each.trial.row for each in done):
        own = [each.facts for each in done if each.trial.row == row]
        images, bytes_ = (_mean([facts[key] for facts in own]) for key in ("images", "bytes"))
        rows[row] = {"images": images, "bytes": bytes_}
        if all(parts := [facts.get("bytes_of") for facts in own]):  # not of the whole real set
            rows[row]["bytes_of"] = {part: _mean([each[part] for each in parts]) for part in parts[0]}
    papers = {  # the students that papers mean by a name, where the images are theirs too
        name: entry.arch
        for name, entry in bench.students.items()
        if bench.of_own_images and not entry.args and entry.input_size is None and entry.stem == "auto"
    }
    return {
        "set": {
            "id": asked.called,
            "revision": asked.revision,
            "name": first.manifest["name"],
            "method": first.manifest["method"],
            "ipc": first.ipc,
            "part": bool(first.manifest["control"] or asked.source.classes),  # a control, or some classes alone
            "seeds": [condensed.manifest["seed"] for condensed in parsed.sets],
            "fingerprints": [condensed.manifest["fingerprint"] for condensed in parsed.sets],
        },
        "protocol": parsed.protocol,
        "own_protocol": bench.of_own_images and _is_own(asked, bench.recipe),
        "evaluation": _portable(asked.evaluation, bench.recipe),
        "split": asked.split,
        "test": {
            "id": judged.id,
            "split": judged.split,
            "own": bench.of_own_images,
            "commit": judged.commit,
            "fingerprint": judged.fingerprint,
            "images": len(bench.truth),
            "transform": _transform(judged, bench.size),
        },
        "bytes": bench.lessons.bytes(first, asked.evaluation.labels),
        "label_epochs": first.epochs,
        "published_as": papers,
        "averaged": [name for name, section in bench.sections.items() if section.ema.decay],
        "rows": rows,
        "unavailable": bench.unavailable,
        "hardware": _joined([{"device": each["device"], **(unknown | each)["hardware"]} for each in every]),
        "versions": _joined([(unknown | each)["versions"] for each in every]),
    }


def _transform(judged: RealSet, size: int) -> str:
    """How a test image becomes the `size` pixels that students see."""
    if judged.resize == "squash":
        return f"squashed to {judged.size}x{judged.size}" + (f", centre crop {size}" if judged.size > size else "")
    return f"shorter side {judged.size}, centre crop {size}"


def _is_own(asked: Comparison, recipe: Recipe) -> bool:
    """Whether students are trained as the set's own recipe says, whichever they are."""
    ours, theirs = (_portable(each, recipe) for each in (asked.evaluation, recipe.evaluation))
    return all(ours[key] == theirs[key] for key in ours if key not in ("students", "precision"))


def _joined(facts: list[dict[str, Any]]) -> dict[str, Any]:
    """What holds for all students; where they differ, every value in words."""
    found = {key: sorted({each[key] for each in facts}, key=str) for key in facts[0]}
    return {key: each[0] if len(each) == 1 else ", ".join(map(str, each)) for key, each in found.items()}


def _mean(values: list[int | None]) -> int | None:
    """Of what differs from trial to trial, rounded; None where nobody knows it."""
    return None if None in values else round(sum(values) / len(values))


def _portable(section: Evaluation, recipe: Recipe) -> dict[str, Any]:
    """The protocol as a recipe publishes it: local paths by their last part."""
    recipe = recipe.model_copy(update={"evaluation": section})
    return documents.read(recipes.published(recipe), "evaluation")["evaluation"]


def replaces(found: dict[str, Any], folder: Path, session: Session) -> bool:
    """Whether results go into a dataset folder: those on the set's own test images, and not in the place of another
    protocol's, as those of `rd3 (epochs 5)` are not `rd3`'s, nor of more students'. Those of the set's own protocol
    replace any other's."""
    if not found["about"]["test"]["own"]:
        session.report(f"{folder} gets no results: they are not on the test images of the set's own recipe")
        return False
    old = disk.json_of(folder / "results.json")
    try:
        protocols = [results["about"]["protocol"] for results in (old, found)]
        sets_own = [results["about"].get("own_protocol") for results in (old, found)]
        more = [
            f"{student}, {row}"
            for student, own in old["students"].items()
            for row, figures in own["rows"].items()
            if figures["n"] > found["students"].get(student, {"rows": {}})["rows"].get(row, {"n": 0})["n"]
        ]
    except (KeyError, TypeError):  # none there, or a damaged one
        return True
    alike = protocols[0] == protocols[1] or sets_own == [True, True]  # names of one protocol may differ by version
    if sets_own == [False, True] or (alike and not more):
        return True
    if alike:
        why, remedy = f"of more students ({more[0]})", "name all in one command, which finds trained students, or "
    else:
        why, remedy = f"of protocol {protocols[0]}", ""
    session.report(f"{folder} keeps its results, which are {why}; {remedy}remove its results.json to replace them")
    return False


def curves(done: list[Done]) -> bytes:
    """The learning curves of all trials as a PNG."""
    panels: dict[str, dict[str, list[Tensor]]] = {}
    for each in done:
        lines = panels.setdefault(each.trial.student, {}).setdefault(each.trial.row, [])
        lines += [each.tensors["loss"], each.tensors["curve"]]
    return report.curves(panels)


def write(found: dict[str, Any], picture: bytes, folder: Path) -> None:
    """Writes results.json and the curves; into a dataset folder, the table into its card too."""
    results.write(found, folder)
    is_set = (folder / "manifest.json").is_file()
    place = (folder / "assets" if is_set else folder) / "curves.png"
    disk.write_atomically(place, lambda path: path.write_bytes(picture))
    if is_set:
        card.again(folder)
