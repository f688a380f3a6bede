"""The recipe of `edc-hub evaluate`: which sets, which controls, and the protocol, which a set's own recipe begins.

Nothing here imports torch.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field, ValidationError

from . import arguments, documents, keys, recipes, rules
from .errors import InputError
from .protocol import Evaluation
from .recipe import Source
from .section import Count, Positive, Rate, Section


if TYPE_CHECKING:  # torch is imported once the keys are known to be right
    from .condensed import CondensedSet


_FLAGS = {"print_recipe": "print the resolved recipe and what its rows are called"}
_SHIPPED = recipes.ROOT / "evaluation"


class Comparison(Section):
    """What `edc-hub evaluate` measures."""

    dataset: list[str] = Field([], description="condensed sets: folders or ORG/NAME; several: one set of many seeds")
    revision: str | None = Field(None, description="tag, branch or commit of sets on the Hub")
    split: Literal["test", "holdout"] = Field("test", description="what accuracy is measured on; holdout for choices")
    seeds: list[Count] = Field([0, 1, 2], description="seeds of the students, each trained on each set")
    controls: list[Literal["initial", "random", "hard", "real"]] = Field(
        ["initial", "random", "hard", "real"],
        description="(i) initial images, (ii) random real images, (iii) hard labels, (iv) real images of equal bytes",
    )
    upper_bound: bool = Field(False, description="train on the whole real set too")
    upper_bound_epochs: Positive = Field(60, description="epochs over the whole real set")
    curve_points: Count = Field(0, description="times that accuracy is also measured on the way, for the curve alone")
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field([], description="trackers")
    source: Source = Field(Source(), description="the real set, as the condensed set's recipe has it")
    evaluation: Evaluation = Field(Evaluation(), description="protocol, as the condensed set's recipe has it")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where networks run")
    threads: Positive | None = Field(None, description="CPU threads a process; cores / local processes when not given")
    checkpoint_seconds: Rate = Field(60.0, description="seconds between the saves inside a long unit of work")
    output_dir: str | None = Field(None, description="run folder; evaluation/ beside the set when not given")

    @property
    def precision(self) -> str:
        return self.evaluation.precision


class Parsed(NamedTuple):
    comparison: Comparison
    sets: "list[CondensedSet]"
    protocol: str  # with what differs from the preset
    print_recipe: bool


def parse(argv: list[str] | None) -> Parsed:
    """What a command line asks for, with the sets it names opened. `--help` prints to stdout and exits with 0.

    Layers: field default < the set's own recipe (or, where another protocol is named, that protocol) < the recipe
    file < the command line. Raises InputError on anything wrong.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(_usage(), flush=True)
        raise SystemExit(0)
    named, overrides, flags = arguments.split(argv, Comparison, _FLAGS)
    if len(named) > 1:
        raise InputError(f"recipe: expected at most one, got {' '.join(named)}; a set is named by --dataset")
    layers = [documents.load(recipes.find(named[0], _SHIPPED))] if named else []
    given = recipes.layered([*layers, overrides], Comparison)
    asked = _model(given)
    if not asked.dataset:
        raise InputError("dataset: none given; write --dataset FOLDER or --dataset ORG/NAME")
    from .condensed import CondensedSet

    sets = [CondensedSet.load(_folder(place), revision=asked.revision) for place in asked.dataset]
    _refuse_different(sets, asked.dataset)
    comparison = _model(_resolved(given, sets[0]))
    rules.validate_protocol(comparison.evaluation)
    return Parsed(comparison, sets, _row_name(comparison.evaluation, sets[0]), flags["print_recipe"])


def _usage() -> str:
    flags = "\n".join(f"  --{name}  {meaning}" for name, meaning in _FLAGS.items())
    shipped = ", ".join(recipes.shipped(_SHIPPED))
    head = (
        "usage: edc-hub evaluate [RECIPE] --dataset FOLDER|ORG/NAME[,…] [--section.key value ...]\n\n"
        f"RECIPE is a YAML file or one of: {shipped}\n"
        "Without one the protocol is that of the set's own recipe; --evaluation.protocol names another.\n"
        f"A value is YAML: 2e-5, true, null, [0.5, 1.0]; a list may be written a,b.\n\n{flags}\n"
    )
    return "\n".join([head, *keys.help_lines(Comparison)])


def _model(content: dict[str, Any]) -> Comparison:
    try:
        return Comparison.model_validate(content)
    except ValidationError as error:
        raise InputError(keys.complaint(error, Comparison)) from error


def _folder(place: str) -> str:
    """A finished run's dataset folder where the run is named. InputError for a run without one."""
    run = Path(place).expanduser()
    if not run.is_dir():
        return place
    if (run / "recipe.yaml").is_file() and not (run / "manifest.json").is_file():  # a run, not a dataset folder
        if not (run / "dataset/manifest.json").is_file():
            raise InputError(f"dataset: no finished set in run {place}; edc-hub condense {run}/recipe.yaml goes on")
        run = run / "dataset"
    return str(run)


def _refuse_different(sets: "list[CondensedSet]", places: list[str]) -> None:
    first = sets[0].manifest
    for place, other in zip(places[1:], sets[1:], strict=True):
        for key in ("name", "method", "ipc", "classes"):
            if other.manifest[key] != first[key]:
                raise InputError(
                    f"dataset: {places[0]} and {place} differ in {key}; one figure is of sets of one recipe and "
                    "several seeds, so evaluate them apart"
                )


def _resolved(given: dict[str, Any], first: "CondensedSet") -> dict[str, Any]:
    """The keys and values of the whole recipe: the set's own below what is given."""
    carried = first.recipe
    evaluation = carried.get("evaluation") or {}
    protocol = (given.get("evaluation") or {}).get("protocol", evaluation.get("protocol"))
    below = [evaluation]
    if protocol != evaluation.get("protocol"):
        below = [{"protocol": protocol}, *_blocks(protocol, first)]
    under = [{"source": carried["source"]}, *({"evaluation": block} for block in below)]
    return recipes.layered([*under, given], Comparison)


def _blocks(protocol: str, first: "CondensedSet") -> list[dict[str, Any]]:
    return recipes.blocks("protocol", protocol, first.manifest["name"], first.manifest["ipc"])


def _row_name(section: Evaluation, first: "CondensedSet") -> str:
    """The protocol's name, and in brackets every value that is not the preset's: `rd3 (labels stored)`."""
    preset = Evaluation.model_validate(recipes.layered(_blocks(section.protocol, first), Evaluation))
    ours, theirs = section.model_dump(), preset.model_dump()
    named = {"protocol", "students", "teachers"}
    if section.augment != "own":
        named.add("view")  # not in use
    changed = [key for key in ours if key not in named and ours[key] != theirs[key]]
    values = [f"{key} {_value(ours[key], theirs[key])}" for key in changed]
    return f"{section.protocol} ({', '.join(values)})" if values else section.protocol


def _value(ours: Any, theirs: Any) -> str:
    if not isinstance(ours, dict):
        return str(ours)
    return " ".join(f"{key} {value}" for key, value in ours.items() if value != theirs.get(key))
