"""The recipe of `edc-hub evaluate`: which sets, which controls, and the protocol, which a set's own recipe begins.

Nothing here imports torch.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field

from . import arguments, disk, documents, keys, recipes, rules
from .errors import InputError
from .protocol import Evaluation, Student, unread
from .recipe import Recipe, Relabel, Source
from .section import Count, Distinct, Positive, Rate, Section, Threads


if TYPE_CHECKING:  # torch is imported once the keys are known to be right
    from .condensed import CondensedSet


_FLAGS = {
    "dry_run": "print which students are missing and the projected time, write nothing",
    "print_recipe": "print the resolved recipe and what its rows are called",
}
_SHIPPED = recipes.ROOT / "evaluation"
_ONE_TEACHER = ("rded", "sre2l", "cda", "rd3")  # protocols whose labels are those of one trained ResNet-18
_VIEWS = ("crop_area", "flip", "rand_augment", "shuffle", "mix", "observer_mode")  # what labels are of
_MADE = ("name", "method", "options", "ipc", "moments", "initialize", "synthesize", "relabel", "images")  # the set
_OWN = ("seed", "path", "controls", "random_draws")  # what sets of one figure need not share


class Comparison(Section):
    """What `edc-hub evaluate` measures."""

    dataset: list[str] = Field([], description="run, folder or ORG/NAME; several: one recipe's sets of other seeds")
    revision: str | None = Field(None, description="tag, branch or commit of sets on the Hub")
    split: Literal["test", "holdout"] = Field("test", description="what accuracy is measured on; holdout for choices")
    seeds: Distinct[Count] = Field([0, 1, 2], description="seeds of the students; each is trained on each set")
    controls: list[Literal["initial", "random", "hard", "real"]] = Field(
        ["initial", "random", "hard", "real"],
        description="(i) initial images, (ii) random real images, (iii) hard labels, (iv) real images of equal bytes",
    )
    upper_bound: bool = Field(False, description="train on the whole real set too")
    upper_bound_epochs: Positive = Field(60, description="epochs over the whole real set")
    curve_points: Count = Field(0, description="measurements on the way, for the picture of the curves alone")
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field([], description="trackers of the curves")
    source: Source = Field(Source(), description="the real set, as the condensed set's recipe has it")
    evaluation: Evaluation = Field(Evaluation(), description="protocol, as the condensed set's recipe has it")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where networks run")
    threads: Threads | None = Field(
        None, description="CPU threads a process; as the run's when not given, else cores / local processes"
    )
    checkpoint_seconds: Rate = Field(60.0, description="seconds between the saves inside a long unit of work")
    output_dir: str | None = Field(None, description="run folder; evaluation/ beside the set when not given")

    @property
    def precision(self) -> str:
        return self.evaluation.precision

    @property
    def called(self) -> str:
        """The name of the first set: that of its run, else of its folder; its id on the Hub."""
        folder = Path(os.path.abspath(disk.local(self.dataset[0], "dataset")))
        if not folder.is_dir():
            return self.dataset[0]
        return folder.parent.name if folder.name == "dataset" else folder.name


class _Typed(Comparison):
    """What a command line may say."""

    students: list[str | Student] | None = Field(None, description="short for evaluation.students")


class Parsed(NamedTuple):
    comparison: Comparison
    sets: "list[CondensedSet]"
    protocol: str  # with what differs from the preset
    dry_run: bool = False
    print_recipe: bool = False


def parse(argv: list[str]) -> Parsed:
    """What a command line asks for, with the sets it names opened.

    Layers: field default < the set's own recipe (or, where another protocol is named, that protocol) < the recipe
    file < the command line. Raises InputError on anything wrong.
    """
    arguments.help_asked(argv, _usage)
    named, overrides, flags = arguments.split(argv, _Typed, _FLAGS)
    if (students := overrides.pop("students", None)) is not None:
        arguments.put_students(overrides, students)
    if len(named) > 1:
        raise InputError(f"recipe: expected at most one, got {' '.join(named)}; a set is named by --dataset")
    if named and os.path.isdir(os.path.expanduser(named[0])):
        raise InputError(f"dataset: {named[0]} is a folder, and a recipe is a file; write --dataset {named[0]}")
    layers = [documents.load(recipes.find(named[0], _SHIPPED))] if named else []
    found = resolve(keys.layered([*layers, overrides], Comparison))
    recipes.refuse_strangers(overrides, found.comparison.evaluation)
    return found._replace(**flags)


def resolve(given: dict[str, Any]) -> Parsed:
    """What is asked for by keys and values, nested like a recipe, with the sets they name opened."""
    asked = keys.validated(Comparison, given)
    if not asked.dataset:
        raise InputError("dataset: none given; write --dataset FOLDER or --dataset ORG/NAME")
    from .condensed import CondensedSet

    sets = [CondensedSet.load(place, revision=asked.revision) for place in asked.dataset]
    for place, condensed in zip(asked.dataset, sets, strict=True):
        _refuse_strange_run(place, condensed)
    _refuse_different(sets, asked.dataset)
    comparison = keys.validated(Comparison, _resolved(given, sets[0]))
    rules.validate_protocol(comparison.evaluation, sets[0].manifest["images"]["size"])
    _refuse_seen_holdout(comparison, sets[0])
    for key in ("size", "mean", "std"):
        if key in (given.get("source") or {}) and getattr(comparison.source, key) != sets[0].recipe["source"][key]:
            raise InputError(f"source.{key}: students see the set's images, which decide it; remove it")
    return Parsed(comparison, sets, _row_name(comparison.evaluation, sets[0]))


def _usage() -> str:
    head = (
        "usage: edc-hub evaluate [RECIPE] --dataset FOLDER|ORG/NAME[,…] [--section.key value ...]\n\n"
        f"RECIPE is a YAML file or one of: {recipes.listing(_SHIPPED)}\n"
        "Without one the protocol is that of the set's own recipe; --evaluation.protocol names another.\n"
        "A value is YAML: 2e-5, true, null, [0.5, 1.0]; a list may be written a,b."
    )
    return arguments.usage(head, _Typed, _FLAGS)


def _refuse_strange_run(place: str, condensed: "CondensedSet") -> None:
    """Raises InputError for a set in a run folder of another recipe: controls and observers there are not its own."""
    if condensed.run is None:
        return
    changed = _differing(condensed.recipe, documents.load(condensed.run / "recipe.yaml"), _MADE)
    if changed:
        raise InputError(
            f"dataset: {place} lies in the run {condensed.run}, whose recipe differs in {', '.join(changed[:3])}; "
            "evaluate a copy outside of it, without the run's controls"
        )


def _differing(one: dict[str, Any], other: dict[str, Any], sections: tuple[str, ...]) -> list[str]:
    """The keys, dotted, in which two recipes make other sets."""
    both = (recipes.resolve(content).model_dump(include=set(sections)) for content in (one, other))
    ours, theirs = (keys.leaves(content, Recipe) for content in both)
    every = (key for key in ours | theirs if key.rpartition(".")[2] not in _OWN)
    return [key for key in every if ours.get(key) != theirs.get(key)]


def _refuse_different(sets: "list[CondensedSet]", places: list[str]) -> None:
    """One figure is of sets of one recipe and several seeds. Raises InputError naming what differs, or a set twice."""
    prints = [condensed.manifest["fingerprint"] for condensed in sets]
    for number, (place, other) in enumerate(zip(places, sets, strict=True)):
        if prints.index(prints[number]) < number:
            raise InputError(f"dataset: {places[prints.index(prints[number])]} and {place} are one set; give it once")
        changed = [key for key in ("classes", "control") if other.manifest[key] != sets[0].manifest[key]]
        changed += _differing(sets[0].recipe, other.recipe, (*_MADE, "source", "observers"))
        if other.manifest["source"]["fingerprint"] != sets[0].manifest["source"]["fingerprint"]:
            changed.append("the real images they are of (source.revision)")
        if changed:
            raise InputError(
                f"dataset: {places[0]} and {place} differ in {', '.join(changed[:3])}; one figure is of sets of one "
                "recipe and several seeds, so evaluate them apart"
            )


def _refuse_seen_holdout(comparison: Comparison, first: "CondensedSet") -> None:
    """Raises InputError where the split `holdout` would hold images that the set was made from."""
    if comparison.split != "holdout":
        return
    carried = first.recipe["source"]
    if not carried["holdout"]:
        raise InputError(
            "split: holdout, but the set was condensed from all training images (source.holdout 0); condense with "
            "--source.holdout 0.1, or write --split test"
        )
    for key in ("name", "train_split", "label_column", "classes", "holdout", "holdout_seed"):
        ours = getattr(comparison.source, key)
        if ours != carried[key]:
            raise InputError(
                f"source.{key}: {ours}, but the set was condensed with {carried[key]} and saw other images; remove it"
            )


def _resolved(given: dict[str, Any], first: "CondensedSet") -> dict[str, Any]:
    """The keys and values of the whole recipe: the set's own below what is given."""
    carried = first.recipe
    evaluation = carried.get("evaluation") or {}
    protocol = (given.get("evaluation") or {}).get("protocol", evaluation.get("protocol"))
    below = dict(evaluation)
    if protocol != evaluation.get("protocol"):
        below = {"protocol": protocol, **_preset(protocol, first)}
    recipes.let_through(below, given.get("evaluation") or {})
    source, wanted = dict(carried["source"]), given.get("source") or {}
    if wanted.get("path", source["path"]) == source["path"]:  # the images it was made from, whatever came since
        source["revision"] = first.manifest["source"]["commit"] or source["revision"]
    threads = documents.load(first.run / "recipe.yaml").get("threads") if first.run else None
    under = [{"source": source}, {"evaluation": below}, {"threads": threads}]
    return keys.layered([*under, given], Comparison)


def _preset(protocol: str, first: "CondensedSet") -> dict[str, Any]:
    return recipes.protocol(protocol, first.manifest["name"], first.manifest["ipc"])


def _row_name(section: Evaluation, first: "CondensedSet") -> str:
    """The protocol's name, and in brackets every value in use that is not the preset's: `rd3 (labels stored)`."""
    preset = _preset(section.protocol, first)
    ours, theirs = section.model_dump(), Evaluation.model_validate(preset).model_dump()
    named = {"protocol", "students", "teachers", *unread(section)}
    recipes.let_through(preset, {key: value for key, value in ours.items() if value != theirs[key]})
    theirs["per_student"] = preset["per_student"]
    changed = [key for key in ours if key not in named and ours[key] != theirs[key]]
    values = [f"{key} {_value(ours[key], theirs[key])}" for key in changed]
    if section.labels == "stored" and first.epochs < section.epochs:
        values.append(f"{first.epochs} label epochs")
    values += _views_unlike(section, first)
    codec = first.manifest["soft_labels"]["codec"]
    if section.labels == "stored" and codec != "dense":
        values.append(f"top {first.recipe['relabel']['top_k']} labels" if codec == "top_k" else f"{codec} labels")
    nets = _labelling(section, first)
    one = section.protocol in _ONE_TEACHER and section.labels != "hard"
    if (one and nets != ["resnet18"]) or (not one and section.labels == "online" and section.teachers):
        values.append(f"labels of {len(nets)} networks" if len(nets) > 1 else f"labels of {nets[0]}")
    return f"{section.protocol} ({', '.join(values)})" if values else section.protocol


def _views_unlike(section: Evaluation, first: "CondensedSet") -> list[str]:
    """How stored views and their labels were made, where the method of the protocol's name makes them otherwise."""
    method = section.protocol if section.protocol in recipes.methods() else first.manifest["method"]
    known = method in recipes.methods() or ":" in method  # not relabel, nor another release's
    if section.labels != "stored" or not known:
        return []
    below = recipes.blocks("method", method, first.manifest["name"], first.manifest["ipc"])
    below = keys.layered(below, Recipe).get("relabel") or {}
    ours, theirs = first.recipe["relabel"], Relabel.model_validate(below).model_dump()
    return [f"{key} {ours[key]}" for key in _VIEWS if ours[key] != theirs[key]]


def _labelling(section: Evaluation, first: "CondensedSet") -> list[str]:
    """Architectures of the networks whose logits students learn from."""
    if section.labels == "online" and section.teachers:
        return [net.arch for net in section.teachers]
    return [net["arch"] for net in first.manifest["observers"] if "relabel" in net["roles"]]


def _value(ours: Any, theirs: Any) -> str:
    if not isinstance(ours, dict):
        return str(ours)
    return " ".join(f"{key} {value}" for key, value in ours.items() if value != theirs.get(key))
