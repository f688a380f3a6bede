"""Combinations of keys that cannot work, found before anything is loaded."""

from collections.abc import Iterator

from . import methods
from .errors import InputError
from .protocol import Evaluation, named_students, of_student, student_name
from .recipe import Recipe
from .selection import selected, title
from .versions import NUMBERED, misnamed


_EDC_CROPS = 1024  # crops a class that initialize.variant edc draws


def validate(recipe: Recipe) -> None:
    """Raises InputError with the first combination of keys that cannot work. Looks at nothing but the recipe."""
    for rules in (_options, _source, _observers, _initialize, _synthesize, _relabel, _images, _hub):
        for problem in rules(recipe):
            raise InputError(problem)
    validate_cuts(recipe, recipe.source.size)
    validate_protocol(recipe.evaluation, recipe.source.size)


def validate_protocol(section: Evaluation, size: int) -> None:
    """Raises InputError with the first combination of keys of a protocol that cannot work on images of `size` px."""
    for problem in _protocol(section, size):
        raise InputError(problem)


def _protocol(section: Evaluation, size: int) -> Iterator[str]:
    if not section.students:
        yield "evaluation.students: an empty list; name one, e.g. [resnet18]"
    names = [student_name(student) for student in section.students]
    files = [name.replace("/", "-") for name in names]
    for name, file in zip(names, files, strict=True):
        if files.count(file) > 1:
            yield f"evaluation.students: '{name}' is given twice; give each its own name"
    for name in section.per_student:
        of_student(section, name, name)  # raises for keys that are none, also of students that are not trained now
    for name, student in named_students(section).items():
        each = of_student(section, name, student.arch)
        if (each.labels == "hard") != (each.loss == "ce"):
            other = "loss: ce, or labels: stored" if each.labels == "hard" else "labels: hard, or a soft loss"
            yield f"evaluation.loss: {each.loss} does not go with labels: {each.labels}; write {other}"
        if each.labels == "stored" and each.augment != "set":
            yield (
                f"evaluation.augment: {each.augment}, but stored labels are those of the set's own views; "
                "write augment: set, or labels: online"
            )
        if each.teachers and each.labels != "online":
            yield f"evaluation.teachers: not asked with labels {each.labels}; write labels: online, or teachers: []"
        if each.augment == "own":
            _divides("evaluation.view.shuffle", each.view.shuffle, "strips", size, 0)


def validate_cuts(recipe: Recipe, size: int) -> None:
    """Raises InputError where images of `size` px cannot be cut into equal parts as the recipe says."""
    _divides("initialize.factor", recipe.initialize.factor, "tiles", size, 1)
    _divides("relabel.shuffle", recipe.relabel.shuffle, "strips", size, 0)
    _divides("images.grid", recipe.images.grid, "pictures a side", size, 1)


def _divides(key: str, parts: int, noun: str, size: int, none: int) -> None:
    if parts and size % parts:
        raise InputError(f"{key}: {parts} {noun} do not divide {size} px; write a divisor of it, or {none}")


def _options(recipe: Recipe) -> Iterator[str]:
    if recipe.options.model_extra and recipe.method != "relabel" and not methods.place(recipe.method):
        yield (
            f"options.{min(recipe.options.model_extra)}: method {recipe.method} reads no options; remove it, or write "
            "method: package.module:function"
        )


def _source(recipe: Recipe) -> Iterator[str]:
    source = recipe.source
    if source.classes is not None:
        twice = [entry for entry in source.classes if source.classes.count(entry) > 1]
        if twice:
            yield f"source.classes: {twice[0]!r} is given twice; keep one"
        if len(source.classes) < 2:
            yield f"source.classes: {len(source.classes)} given, a classifier needs two; add one or write null for all"
    if recipe.moments.patch > source.size:
        yield f"moments.patch: {recipe.moments.patch} px is wider than the images; write at most {source.size}"


def _observers(recipe: Recipe) -> Iterator[str]:
    networks = recipe.observers.networks
    if not networks:
        yield "observers.networks: none given, and soft labels need one; write e.g. [{name: a, arch: resnet18}]"
    trained = [net.name for net in networks if net.train]
    if recipe.source.streaming and trained:
        yield f"source.streaming: {', '.join(trained)} would train in random order; write false, or give them weights"
    users = {"relabel": True, "synthesize": recipe.synthesize.iterations > 0}
    users["initialize"] = recipe.initialize.kind in ("rded", "kmeans")
    for section, used in users.items():
        entries = getattr(recipe, section).observers
        if used and entries == []:
            yield f"{section}.observers: an empty list, but it needs one; name an observer or write null for all"
        selected(recipe, entries, f"{section}.observers")


def _initialize(recipe: Recipe) -> Iterator[str]:
    start = recipe.initialize
    if start.factor > 1 and start.kind != "rded":
        yield f"initialize.factor: {start.factor} tiles a side need kind rded, got {start.kind}; write 1 or kind: rded"
    if start.difficulty != "easiest" and start.kind != "rded":
        yield f"initialize.difficulty: {start.difficulty} crops need kind rded, got {start.kind}; write easiest"
    pictures = recipe.ipc * recipe.images.grid**2
    wanted = pictures * start.factor**2
    drawn = _EDC_CROPS if start.variant == "edc" else start.images_per_class
    if start.kind == "rded" and wanted > drawn:
        remedy = "write variant: rded" if start.variant == "edc" else f"raise images_per_class to {wanted}"
        asked = f"ipc {recipe.ipc} at factor {start.factor}"
        asked += f" and images.grid {recipe.images.grid}" if recipe.images.grid > 1 else ""
        yield f"initialize: {asked} needs {wanted} crops a class, got {drawn}; {remedy}"
    if start.kind == "kmeans" and start.observers and len(chosen := selected(recipe, start.observers)) > 1:
        yield f"initialize.observers: kmeans uses the features of one observer; write [{title(*chosen[0])}]"
    if start.kind == "kmeans" and pictures > start.images_per_class:
        yield f"initialize.images_per_class: {start.images_per_class} cannot give {pictures} centres; write {pictures}"


def _synthesize(recipe: Recipe) -> Iterator[str]:
    section = recipe.synthesize
    if section.jitter >= recipe.source.size:
        yield f"synthesize.jitter: {section.jitter} px rolls past the image; write less than {recipe.source.size}"
    if section.class_scope == "local" and section.alpha == 1:
        yield "synthesize.class_scope: local has no effect at alpha 1; write alpha below 1 or another scope"
    if section.class_scope == "local" and recipe.source.streaming:
        yield "synthesize.class_scope: local draws real images for every block; write source.streaming: false"
    if not section.layers:
        yield "synthesize.layers: an empty list; name layers, or write weight: 0 to match none"
    if section.iterations:
        yield from _levers(recipe)


def _levers(recipe: Recipe) -> Iterator[str]:
    section, (low, high) = recipe.synthesize, recipe.synthesize.crop_area
    curriculum, every = section.curriculum, section.residual.every
    if curriculum.kind != "none" and not low <= curriculum.start <= high:
        yield (
            f"synthesize.curriculum.start: {curriculum.start:g} is outside synthesize.crop_area [{low:g}, {high:g}]; "
            f"write e.g. {high:g}"
        )
    if curriculum.kind != "none" and curriculum.milestone == 0:
        yield "synthesize.curriculum.milestone: 0, where no crop is larger; write e.g. 0.5, or curriculum.kind: none"
    if curriculum.kind == "step" and curriculum.milestone == 1:
        yield "synthesize.curriculum.milestone: 1, where a step never comes down to crop_area; write e.g. 0.5"
    if section.drop_rate and set(section.layers) == {"bn"}:
        yield f"synthesize.drop_rate: {section.drop_rate:g} of the convolutions, and layers are bn alone; write 0"
    if section.sizes == []:
        yield "synthesize.sizes: an empty list; name sides of the view, or write null for source.size"
    if section.sizes and section.jitter >= min(section.sizes):
        yield f"synthesize.jitter: {section.jitter} px rolls past a view of {min(section.sizes)} px; write less"
    yield from _sizes(recipe)
    if section.mix in ("mixup", "cutmix"):
        if section.block * recipe.images.grid**2 == 1:
            yield f"synthesize.mix: {section.mix} mixes two images of a block, and block is 1; write 2 or more"
        if section.class_scope == "per_class" and section.alpha < 1:
            yield f"synthesize.mix: a {section.mix} is of no one class; write mixture for class_scope per_class"
        if section.densification.weight:
            yield f"synthesize.mix: a {section.mix} is of no one class; write densification.weight: 0"
    observers = len(selected(recipe, section.observers))
    if section.together > observers:
        yield f"synthesize.together: {section.together} observers a step, and there are {observers}; write {observers}"
    if every >= section.iterations:
        yield f"synthesize.residual.every: {every} of {section.iterations} steps merges nothing; write less, or 0"


def _sizes(recipe: Recipe) -> Iterator[str]:
    """Views of another side have other tiles, but in networks that see one side alone."""
    section, size, patch = recipe.synthesize, recipe.source.size, recipe.moments.patch
    free = {net.name: net.arch for net in recipe.observers.networks if net.input_size is None}
    other = [side for side in section.sizes or [] if -(-side // patch) != -(-size // patch)]
    for name, _ in selected(recipe, section.observers) if "patch" in section.layers and other else ():
        if name in free and not free[name].startswith("convnet"):
            yield other_tiles(name, other[0])
            return


def other_tiles(network: str, side: int) -> str:
    """What is wrong where a network's tiles at a size of `synthesize.sizes` cannot be matched to its moments."""
    return (
        f"synthesize.sizes: {network} has other tiles at {side} px than in the moments; write synthesize.layers "
        "[bn, conv], or give the network an input_size"
    )


def _relabel(recipe: Recipe) -> Iterator[str]:
    section = recipe.relabel
    if section.batch == 1 and section.mix != "none":
        yield f"relabel.batch: {section.mix} mixes two views of a batch, got 1; write 2 or more, or mix: none"
    if section.batch == 1 and section.observer_mode == "batch":
        yield "relabel.batch: observer_mode batch needs statistics of a batch, got 1; write 2 or more"
    yield from _stored(recipe)


def _stored(recipe: Recipe) -> Iterator[str]:
    section, evaluation = recipe.relabel, recipe.evaluation
    if section.codec == "observers":
        if section.budget is not None:
            yield "relabel.budget: codec observers stores no views; write null, or another codec"
        if section.full:
            yield "relabel.full: codec observers stores no views; write false, or codec: dense with a budget"
        if evaluation.labels == "stored":
            yield "relabel.codec: observers stores no views to train on; write --evaluation.labels online"
    elif section.full and section.codec == "dense" and section.budget is None:
        yield "relabel.full: true, but soft_labels has all label epochs as it is; write a budget or another codec"


def _images(recipe: Recipe) -> Iterator[str]:
    grid, factor = recipe.images.grid, recipe.initialize.factor
    if grid > 1 and factor > 1:
        yield f"initialize.factor: {factor}, and images.grid {grid} has its own tiles; write 1 for one of the two"
    if recipe.relabel.codec != "observers" and recipe.relabel.epochs < grid**2:
        yield (
            f"relabel.epochs: {recipe.relabel.epochs}, and an epoch shows one of the {grid**2} pictures of an image "
            f"(images.grid); write {grid**2} or more"
        )


def _hub(recipe: Recipe) -> Iterator[str]:
    section = recipe.hub
    if section.push and section.id is None:
        yield "hub.id: push is on, and the set has no name; write --hub.id ORG/NAME"
    for key, name in (("id", section.id), ("observers", section.observers)):
        if name is not None and (problem := misnamed(name)):
            yield f"hub.{key}: {problem}"
    if section.push and recipe.relabel.codec == "observers" and section.observers is None:
        yield "hub.observers: a set without stored views needs its observers beside it; write --hub.observers ORG/NAME"
    if section.tag is not None and not NUMBERED.fullmatch(section.tag):
        yield f"hub.tag: {section.tag!r} is no version; write e.g. v1.0.0, or null"
