"""How students are trained: the section `evaluation` of a recipe.

A protocol is a file of `recipes/protocols`, read as a method's file is; `evaluation.protocol` names it and keys beside
it stand above its values. Nothing here imports torch.
"""

import hashlib
import re
from typing import Any, Literal

from pydantic import Field

from . import keys
from .errors import InputError
from .section import (
    ARCH,
    Above,
    Arguments,
    Batch,
    Decay,
    Fraction,
    Name,
    Networks,
    Positive,
    Rate,
    Section,
    ViewSettings,
)


class Student(Section):
    """A student that a plain name does not describe."""

    name: Name | None = Field(None, description="its name in tables; arch when not given")
    arch: str = Field(description=ARCH)
    args: Arguments = Field({}, description="arguments of the architecture (width, depth, norm, …)")
    stem: Literal["auto", "small", "standard"] = Field("auto", description="first layer; auto: small up to 64 px")
    input_size: Positive | None = Field(None, description="side it takes, in pixels; views are resized to it")


class Ema(Section):
    """The weight average that is measured beside the live weights (EDC Table 17)."""

    decay: Decay = Field(0.99, description="decay a step; 0: no average")
    bn: Literal["live", "averaged", "reestimated"] = Field(
        "live", description="its BatchNorm statistics: the live ones | averaged too | measured anew on clean crops"
    )


class Evaluation(Section):
    """The protocol a student is trained with."""

    protocol: str = Field("edc", description="a file of recipes/protocols; other keys stand above its values")
    students: list[str | Student] = Field(["resnet18"], description="plain names (see arch), or keys and values")
    labels: Literal["stored", "online", "mean", "hard"] = Field(
        "stored", description="stored views and labels | teachers label each batch | one soft label an image | classes"
    )
    teachers: Networks = Field([], description="networks that label online; the set's observers when empty")
    augment: Literal["set", "own", "none"] = Field(
        "set", description="views drawn as the set's were | by the keys of evaluation.view | whole images"
    )
    shuffled: Literal["rows", "batches"] = Field(
        "rows", description="a label epoch's stored views: all shuffled | in the batches they were mixed in"
    )
    view: ViewSettings = Field(ViewSettings(), description="how views are drawn where augment is own")
    loss: Literal["mse_ce", "kl", "cosine", "ce"] = Field(
        "mse_ce", description="MSE of logits + ce_weight CE, class unmixed | KL | 1 - cosine of logits | CE"
    )
    ce_weight: Rate = Field(0.025, description="weight of the cross-entropy in mse_ce")
    temperature: Above = Field(20.0, description="temperature of kl; the loss is not multiplied by its square")
    optimizer: Literal["adamw", "adam", "sgd"] = Field("adamw", description="biases and norms never decay")
    lr: Rate = Field(1e-3, description="learning rate")
    weight_decay: Rate = Field(0.01, description="weight decay")
    momentum: Decay = Field(0.9, description="momentum of sgd")
    batch: Batch = Field(50, description="views a step")
    epochs: Positive = Field(1000, description="epochs")
    schedule: Literal["smooth", "ssrs", "multistep", "linear", "alrs"] = Field(
        "smooth", description="learning rate: cosine | cosine, then fast | steps | line | steps where the loss stands"
    )
    zeta: Above = Field(2.0, description="smooth, ssrs, linear head for zero at zeta x epochs")
    milestones: list[Fraction] = Field([0.8, 0.9, 0.95], description="multistep: steps, as shares of the epochs")
    gamma: Fraction = Field(0.5, description="factor of each step of multistep and alrs")
    ema: Ema = Field(Ema(), description="weight average")
    test_resize: Positive | None = Field(
        None, description="shorter side of test images before the centre crop; null: the images' own size"
    )
    precision: Literal["float32", "bfloat16", "float16"] = Field("float32", description="arithmetic of students")
    per_student: dict[str, dict[str, Any]] = Field({}, description="keys of one student: {convnet3: {lr: 0.01}}")


def unread(section: Evaluation) -> set[str]:
    """Keys that nothing reads, as the others are: of no student, where some have values of their own."""
    students = named_students(section).items() if section.per_student else ()
    own = [of_student(section, name, student.arch) for name, student in students] or [section]
    return set.intersection(*map(_unread, own))


def _unread(section: Evaluation) -> set[str]:
    read = {
        "teachers": section.labels == "online",
        "shuffled": section.labels in ("stored", "hard"),
        "view": section.augment == "own",
        "ce_weight": section.loss == "mse_ce",
        "temperature": section.loss == "kl",
        "momentum": section.optimizer == "sgd",
        "zeta": section.schedule in ("smooth", "ssrs", "linear"),
        "milestones": section.schedule == "multistep",
        "gamma": section.schedule in ("multistep", "alrs"),
    }
    return {key for key, is_read in read.items() if not is_read}


def in_use(section: Evaluation) -> Evaluation:
    """The section with the keys that nothing reads at their defaults."""
    return section.model_copy(update={key: Evaluation.model_fields[key].get_default() for key in unread(section)})


def student_name(student: str | Student) -> str:
    """What tables call a student: with arguments of its own and no name, `convnet-depth2-width32`."""
    if isinstance(student, str):
        return student
    own = (f"-{key}{value}" for key, value in student.args.items())
    made = re.sub(r"[^\w./+-]+", "-", student.arch + "".join(own)).rstrip("-")
    if student.args and len(made) > 80:  # it is part of the names of files
        made = f"{made[:70]}-{hashlib.sha256(made.encode()).hexdigest()[:8]}"
    return student.name or made


def named_students(section: Evaluation) -> dict[str, Student]:
    """The students by what tables call them."""
    given = (Student(arch=entry) if isinstance(entry, str) else entry for entry in section.students)
    return {student_name(student): student for student in given}


def of_student(section: Evaluation, name: str, arch: str) -> Evaluation:
    """The protocol of one student: `per_student` over the rest, by its name or else by its architecture.

    Raises InputError for what is no key there.
    """
    called = name if name in section.per_student else arch
    key, own = f"evaluation.per_student.{called}", section.per_student.get(called, {})
    fixed = {"protocol", "students", "labels", "teachers", "test_resize", "per_student"} & set(own)
    if fixed:
        raise InputError(f"{key}: {min(fixed)} is the same for all; remove it")
    below = section.model_dump() | {"per_student": {}}
    return keys.validated(Evaluation, keys.layered([below, own], Evaluation), above=key)
