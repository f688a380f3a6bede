"""What is trained to judge a condensed set: students on the set, on its controls, and on the real set.

A trial is one student on one row of the table with one seed, and one unit of work: sharded over the processes, found
again by the next comparison that has it, taken up where it was killed.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import controls, feed, launch, lessons, networks, recipes, source, students, teachers, views, work
from .comparison import Comparison
from .condensed import CondensedSet
from .errors import InputError, naming
from .lessons import Lessons, Trial
from .networks import Network
from .protocol import Evaluation, in_use, named_students, of_student
from .realset import RealSet
from .recipe import Recipe
from .results import ROWS
from .students import STAGE, VERSION
from .work import Progress, Session, Unit


_NOT_OF_ONE = {"protocol", "students", "teachers", "per_student"}  # keys that are not a single student's own


class Done(NamedTuple):
    """A trained trial: predictions and curves (students.Trained) and steps, seconds, parameters, images."""

    trial: Trial
    tensors: dict[str, Tensor]
    facts: dict


@dataclass
class Bench:
    """What the trials of one comparison share."""

    comparison: Comparison
    sets: list[CondensedSet]
    session: Session
    folder: Path
    """Of the comparison: where controls of a set from the Hub are made."""

    def __post_init__(self) -> None:
        section = self.comparison.evaluation
        self.students = named_students(section)
        self.sections = {name: of_student(section, name, given.arch) for name, given in self.students.items()}
        self.size: int = self.sets[0].manifest["images"]["size"]
        self.source = self.comparison.source.model_copy(update={"size": self.size})
        self.teachers = teachers.Teachers(self.sets[0], section, self.source, self.session)
        self.unavailable: dict[str, str] = {}
        self.lessons = Lessons(self.sections, self.teachers, lambda: self.real, self.recipe.images, self.session)

    @cached_property
    def recipe(self) -> Recipe:
        """The set's own."""
        return recipes.resolve(self.sets[0].recipe)

    @cached_property
    def real(self) -> RealSet:
        """The training split without the hold-out."""
        return source.load(self.source)

    @cached_property
    def judged_on(self) -> RealSet:
        """The split that accuracy is measured on, at `test_resize` where the protocol has one. Raises InputError where
        its images are too small, its classes not the set's, or it is kept from other training images than the set's.
        """
        names, resize = self.sets[0].names, self.comparison.evaluation.test_resize
        split = source.load(self.source.model_copy(update={"size": resize or self.size}), self.comparison.split)
        if names != split.names:
            wrong = next((pair for pair in zip(names, split.names, strict=False) if pair[0] != pair[1]), None)
            what = f"class '{wrong[1]}' where the set has '{wrong[0]}'" if wrong else f"{len(split.names)} classes"
            raise InputError(
                f"source.path: {split.id} has {what} ({len(names)} in the set); give the set that it was condensed "
                "from, or the same source.classes"
            )
        if resize and split.size < self.size:
            raise InputError(f"evaluation.test_resize: {split.size} is less than the images' {self.size} px; raise it")
        if self.comparison.split == "holdout" and self.other_images:  # a row's lot hangs on its number
            raise InputError(
                f"split: holdout, but {self.other_images} and may have seen some of these; give source.path and "
                "source.revision of its own, or write --split test"
            )
        return split

    @cached_property
    def test(self) -> tuple[Tensor, Tensor]:
        """Test images uint8 (T, 3, s, s), the centre after `test_resize`, and their classes int64 (T,)."""
        split, edge = self.judged_on, (self.judged_on.size - self.size) // 2
        inner, count = slice(edge, edge + self.size), students.TEST_BATCH
        found = torch.empty((len(self.truth), 3, self.size, self.size), dtype=torch.uint8)
        for part, (images, *_) in zip(found.split(count), split.batches(split.rows(), count), strict=True):
            part.copy_(images[..., inner, inner])  # at `test_resize` whole images may not all fit
        return found, self.truth

    @property
    def truth(self) -> Tensor:
        """The classes of the test images, int64 (T,); reads no image."""
        return self.judged_on.labels[self.judged_on.rows()]

    def heading(self, protocol: str) -> str:
        """What students are judged on and how they are trained, in a line."""
        split = self.judged_on.split if self.comparison.split == "test" else f"holdout of {self.judged_on.split}"
        return f"{self.judged_on.id}, split {split}: protocol {protocol}"

    def network(self, name: str, seed: int) -> Network:
        """A student with random weights. Raises InputError for a name or a size that does not work."""
        given, facts = self.students[name], self.sets[0].manifest["images"]
        face = {"image_size": facts["size"], "mean": facts["mean"], "std": facts["std"]}
        with naming(f"evaluation.students: {name}"):
            return networks.described(given, len(self.sets[0].names), seed=seed, **face)

    @cached_property
    def other_images(self) -> str | None:
        """What is wrong where the real set here is not the one that the set was condensed from; else None."""
        return controls.other_images(self.sets[0], self)

    @cached_property
    def of_own_images(self) -> bool:
        """Whether accuracy is measured on the images that the set's own recipe names, made square as there."""
        asked, own = self.comparison.source, self.recipe.source
        if any(getattr(asked, key) != getattr(own, key) for key in ("name", "test_split", "resize", "classes")):
            return False
        return asked.path == own.path or self.other_images is None  # a set on its own has a folder's name alone

    def trials(self) -> list[Trial]:
        """Every trial of the comparison. Rows that cannot be had are noted in `unavailable`."""
        asked, seeds = self.comparison, self.comparison.seeds
        real = self._real_asked
        if real and self.other_images:
            self.unavailable |= dict.fromkeys(sorted(real), self.other_images)
            real = []
        made = [{kind: self._controls(each, kind) for kind in ("initial", "random")} for each in self.sets]
        found = []
        for name, section in self.sections.items():
            for number, condensed in enumerate(self.sets):
                rows = [("set", condensed), *(("initial", control) for control in made[number]["initial"])]
                hard = ["hard_unmixed", "hard_mixed"] if "hard" in asked.controls else []
                if hard and section.labels == "hard":
                    self.unavailable |= dict.fromkeys(sorted(hard), "the set's own labels are hard")
                    hard = []
                # real images are drawn by the student's seed: the same for every set
                others = [*hard, *(real if number == 0 else [])]
                view = self.lessons.view(condensed, section)
                if not view or view.mix == "none":
                    mixed = [row for row in others if ROWS[row].mixed]
                    self.unavailable |= dict.fromkeys(mixed, "the protocol mixes no views")
                    others = [row for row in others if row not in mixed]
                rows += [(row, condensed) for row in others]
                found += [Trial(row, name, number, 0, seed, images) for row, images in rows for seed in seeds]
                for draw, control in enumerate(made[number]["random"]):  # a draw is a seed in itself
                    found.append(Trial("random", name, number, draw, seeds[draw % len(seeds)], control))
        return found

    @property
    def _real_asked(self) -> list[str]:
        """The rows of real images that are asked for."""
        rows = ["real_unmixed", "real_mixed"] if "real" in self.comparison.controls else []
        return [*rows, "upper_bound"] if self.comparison.upper_bound else rows

    def _controls(self, condensed: CondensedSet, kind: str) -> list[CondensedSet]:
        if kind not in self.comparison.controls:
            return []
        found, reason = controls.find(condensed, kind, self)
        if not found:
            self.unavailable[kind] = reason
        return found

    def check(self) -> None:
        """Raises InputError for what cannot be trained, before anything is."""
        precisions = {section.precision for section in self.sections.values()}
        if "bfloat16" in precisions and self.session.device.type == "cpu" and launch.emulates_bfloat16():
            self.session.report("evaluation.precision: this CPU emulates bfloat16, many times slower than float32")
        for name, section in self.sections.items():
            network, shown = self.network(name, 0), (self.lessons.view(condensed, section) for condensed in self.sets)
            for side in {view.view_size or self.size for view in shown if view}:
                networks.check(network, side, f"give {name} an input_size in evaluation.students")
            stored = any(path.startswith("soft_labels/") for path in self.sets[0].manifest["files"])
            if section.labels == "stored" and not stored:
                raise InputError(
                    f"evaluation.labels: stored, but {self.sets[0].manifest['name']} carries no soft_labels and "
                    f"{section.loss} needs soft labels; write --evaluation.labels online or mean"
                )
            if section.labels == "online":
                _ = self.teachers.fingerprints
            mixed = self.sets[0].manifest["soft_labels"]["batch"]
            if section.labels == "stored" and section.shuffled == "batches" and section.batch != mixed:
                raise InputError(
                    f"evaluation.shuffled: batches keeps those that were labelled, of {mixed} views, and "
                    f"evaluation.batch is {section.batch}; write rows, or batch: {mixed}"
                )
        _ = self.of_own_images  # which may read the training split
        real = self._real_asked
        if real and not self.other_images:
            lessons.check_memory(
                self.real,
                whole="upper_bound" in real,
                budget=max(sum(self.lessons.bytes(self.sets[0], it.labels).values()) for it in self.sections.values()),
                section=self.recipe.images,
                trainings=len(self.sections) * len(self.comparison.seeds) * len(real),
                device=self.session.device,
            )

    def unit(self, trial: Trial) -> Unit:
        section, row = self.section(trial), ROWS[trial.row]
        given, made = self.students[trial.student], trial.images.manifest
        images = dict(made["images"])
        count = images.pop("count")
        view = feed.settings(made["soft_labels"]).model_dump()
        about = {"images": images, "classes": made["classes"], "view": view}
        if row.images != "whole":  # the whole real set is the same for every condensed one
            about |= {"files": made["configs"], "count": count}
            about |= {"decode": made["decode"]} if "decode" in made else {}
        if row.images == "real":
            about |= {
                "budget": self.lessons.budget(trial),
                "encoding": self.recipe.images.model_dump(exclude={"grid"}),
            }
        if row.images == "set" and row.hard and self.sections[trial.student].labels != "stored":
            about["drawn"] = True  # its views, where the set's row has its own
        if row.images != "whole" and row.hard and self.lessons.whole_batches(trial):
            about["whole_batches"] = True
        few = len(trial.images.labels) < section.batch
        if few and section.labels == "online" and self.lessons.whole_batches(trial):
            about["filled"] = True  # its one batch, for the teachers
        if section.ema.decay and section.ema.bn == "reestimated":
            about["clean"] = "by batch"  # its crops were drawn for as many views as the device makes at once
        used = in_use(section)
        later = {"shuffled"} if used.shuffled == "rows" else set()  # so that students trained before are found
        fingerprint = work.fingerprint(
            STAGE,
            VERSION,
            row=trial.row,
            **about,
            views=views.VERSION,
            student=given.model_dump(exclude={"name"}) | {"arch": networks.identity(given.arch)},
            section=used.model_dump(mode="json", exclude=_NOT_OF_ONE | later),
            teachers=[*self.teachers.fingerprints, self.teachers.of_batches] if section.labels == "online" else None,
            real=self.real.fingerprint if row.images in ("real", "whole") else None,
            test=[self.judged_on.fingerprint, self.comparison.split],
            curve_points=self.comparison.curve_points,
            seed=trial.seed,
        )
        return Unit(STAGE, f"{trial.student.replace('/', '-')}-{trial.row}-{trial.seed}", fingerprint)

    def run(self, trials: list[Trial]) -> list[Done]:
        """Trains what is missing, on all processes."""
        by_unit = {self.unit(trial): trial for trial in trials}

        def make(unit: Unit, _generator: torch.Generator, progress: Progress) -> tuple[dict[str, Tensor], dict]:
            return self._train(by_unit[unit], progress)

        work.run(list(by_unit), make, self.session, seed=0, label="students")
        store = self.session.store
        return [Done(trial, store.load(unit), store.facts(unit)) for unit, trial in by_unit.items()]

    def section(self, trial: Trial) -> Evaluation:
        """The student's protocol, changed as the row asks."""
        section = self.sections[trial.student]
        if ROWS[trial.row].hard:
            section = section.model_copy(update={"loss": "ce", "labels": "hard"})
        if ROWS[trial.row].images == "whole":
            section = section.model_copy(update={"epochs": self.comparison.upper_bound_epochs})
        return section

    def _train(self, trial: Trial, progress: Progress) -> tuple[dict[str, Tensor], dict]:
        section = self.section(trial)
        seed = students.first_weights(trial.student, trial.seed)
        network, fed = self.network(trial.student, seed), self.lessons.feed(trial, section, seed)
        trained = students.train(
            network,
            fed,
            self.test,
            section,
            self.session,
            seed=seed,
            curve_points=self.comparison.curve_points,
            progress=progress,
            label=f"{trial.student} {trial.row}",
        )
        read = self.lessons.read_bytes(trial, section)
        facts = {
            "steps": section.epochs * fed.steps,
            "images": fed.count,
            "bytes": read and sum(read.values()),
            "bytes_of": read,
            "device": launch.device_name(self.session),
            **launch.machine(self.session),
            "seconds": round(progress.elapsed, 1),
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
        }
        return trained._asdict(), facts
