"""What a finished set is like for those who made it and for those who learn from it: four measures of one run.

Gradients of batches against the whole set's, distances of exact moments from the real set's, what observers see in
the stored views, and where students and observers agree. The fifth, the Hessian, is in curvature.py.
"""

import copy
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import labels, matching, moments, students, views, work
from .condensed import CondensedSet
from .errors import InputError
from .feed import Batch, Stored
from .networks import Network
from .observers import Observers, predictions
from .recipe import Recipe
from .selection import roles, selected, title
from .sites import KINDS
from .targets import Moments, Targets
from .trials import Bench, Trial
from .work import Session


BATCHES = 20  # of each size: the spread is then known to a sixth of itself
WHOLE_PIXELS = 1000 * 32 * 32  # of the views that one pass over the whole set holds at a time
TOGETHER = 100  # images of whole classes whose moments are held at a time
VIEWS = 5000  # stored views at least that observers look at: a share is then known to 0.7 points


# Gradients


def gradient(learner: students.Learner, batch: Batch) -> Tensor:
    """Gradient (P,) of the protocol's loss of one batch, in float32 and training mode, over all trained parameters."""
    parameters = [parameter for parameter in learner.network.parameters() if parameter.requires_grad]
    logits = learner.network(batch.x.to(memory_format=learner.layout))
    loss = students.loss_of(learner.section, logits, batch)
    parts = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])


def cosines(learner: students.Learner, batches: Iterator[Batch], whole: Tensor) -> Tensor:
    """Cosine of each batch's gradient to `whole` (P,): float32 on the CPU."""
    found = [F.cosine_similarity(gradient(learner, batch), whole, dim=0) for batch in batches]
    return torch.stack(found).cpu()


def fitting(sizes: list[int], condensed: CondensedSet) -> list[int]:
    """The sizes of batches that are less than the set, ascending. Raises InputError where it has too few images."""
    count = len(condensed.labels)
    fit = sorted({size for size in sizes if 2 <= size < count})  # of one image BatchNorm has no statistics
    if not fit:
        raise InputError(f"batches: {sizes}, and the set has {count} images; write sizes from 2 to {count - 1}")
    return fit


def gradients(bench: Bench, student: str, sizes: list[int], steps: int) -> dict[str, Any]:
    """Cosine of a batch's gradient to that of the whole set, by the batch's size, before and after `steps` steps.

    The set are the stored views of one label epoch, one of each image, with the loss of the student's protocol and
    the stored labels, or the classes where it has `labels: hard`; batches are drawn from them, BATCHES of each size.
    BatchNorm uses the statistics of what it is shown, as in training: the batch's, and for the whole set those of at
    most WHOLE_PIXELS. Each of `sizes` (`fitting`) has mean and sample std over its batches.
    """
    section, session, condensed = bench.sections[student], bench.session, bench.sets[0]
    count, hard = len(condensed.labels), section.labels == "hard"
    view_size = condensed.manifest["soft_labels"]["view_size"]
    learner = students.Learner(bench.network(student, students.first_weights(student, 0)), section, session)

    def fed(size: int) -> Stored:
        return Stored(condensed, size, session.device, seed=0, hard=hard)

    def batches(size: int) -> Iterator[Batch]:
        """Endless batches of the views of one label epoch, all full."""
        feed = fed(size)
        for number in itertools.count():
            shuffle = work.generator(0, "diagnosis", f"batches of {size}, pass {number}")
            yield from (batch for batch in feed.epoch(0, shuffle) if len(batch.x) == size)

    def look() -> list[dict[str, Any]]:
        watched = copy.copy(learner)
        watched.network = copy.deepcopy(learner.network).train()  # its buffers follow the batches
        part, total, seen = max(2, min(count, WHOLE_PIXELS // view_size**2)), 0, 0
        for batch in fed(part).epoch(0, work.generator(0, "diagnosis", "whole")):
            total, seen = total + gradient(watched, batch) * len(batch.x), seen + len(batch.x)
        found = []
        for size in sizes:
            values = cosines(watched, itertools.islice(batches(size), BATCHES), total / seen)
            found.append({"batch": size, "mean": values.mean().item(), "std": values.std().item(), "n": len(values)})
        return [*found, {"batch": count, "mean": 1.0, "std": 0.0, "n": 1}]  # the whole set

    with session.own_draws():
        torch.manual_seed(0)  # dropout
        points = [{"steps": 0, "sizes": look()}]
        learner.begin(section.lr)
        lessons = _lessons(fed(section.batch))
        for batch in itertools.islice(lessons, steps):
            learner.step(batch)
        points.append({"steps": steps, "sizes": look()})
    return {"student": student, "protocol": section.protocol, "loss": section.loss, "views": count, "points": points}


def _lessons(feed: Stored) -> Iterator[Batch]:
    """Endless training batches, epoch after epoch."""
    for epoch in itertools.count():
        yield from feed.epoch(epoch, work.generator(0, "diagnosis", f"epoch {epoch}"))


# Moments


def class_distances(
    network: Network, targets: Targets, images: Tensor, classes: Tensor, recipe: Recipe, session: Session
) -> dict[str, Tensor]:
    """Distance of the moments of each class's images from its targets, by kind of layer: float32 (G,) on the CPU.

    |mean - target| + |variance - target|, un-squared norms over the channels or tiles of a layer, as in the second
    form of EDC's Eq. 5, averaged over the layers of a kind. Variances are exact, of all values of the class together.
    Args: images uint8 (B, 3, s, s); classes int64 (B,), those of `targets.class_ids`.
    """
    first, second = moments.of_images(network, images, targets.global_mean, KINDS, recipe, session)
    members = (targets.class_ids[:, None] == classes.to(session.device)).float()
    mean, var = matching.group(first, second, targets.global_mean, members / members.sum(1, keepdim=True))
    apart = torch.stack([mean - targets.class_mean, var - targets.class_var])
    norms = matching.segment_norms(apart, targets.layout).sum(0).cpu()
    kinds = [segment.kind for segment in targets.layout.segments]
    return {kind: norms[:, [found == kind for found in kinds]].mean(1) for kind in KINDS if kind in kinds}


def moment_distances(
    recipe: Recipe, sets: dict[str, list[CondensedSet]], watching: Observers, known: Moments, session: Session
) -> dict[str, Any]:
    """Each observer's and kind's `class_distances`, for the condensed images and the controls that there are.

    Args: sets: by what they hold, several draws averaged; known: moments of `exactly(recipe)`.
    """
    found: dict[str, Any] = {}
    for entry in dict.fromkeys(selected(recipe, recipe.synthesize.observers)):
        network, own = watching.load(*entry), {}
        for row, draws in sets.items():
            distances = [_of_set(network, entry, drawn, known, recipe, session) for drawn in draws]
            for kind in distances[0]:
                each = torch.stack([drawn[kind] for drawn in distances]).mean(0)
                own.setdefault(kind, {})[row] = {
                    "mean": each.mean().item(),
                    "std": each.std().item(),
                    "classes": [float(f"{value:.4g}") for value in each.tolist()],
                }
        found[title(*entry)] = own
    return {"draws": {row: len(draws) for row, draws in sets.items()}, "observers": found}


def exactly(recipe: Recipe) -> Recipe:
    """The recipe with exact class variances as targets, of every kind of layer."""
    targets = recipe.moments.model_copy(update={"target": "exact"})
    layers = recipe.synthesize.model_copy(update={"layers": list(KINDS)})
    return recipe.model_copy(update={"moments": targets, "synthesize": layers})


def _of_set(
    network: Network,
    entry: tuple[str, int],
    condensed: CondensedSet,
    known: Moments,
    recipe: Recipe,
    session: Session,
) -> dict[str, Tensor]:
    """`class_distances` (C,) of all classes, a few at a time."""
    images, of = condensed.pictures, condensed.of_pictures(condensed.labels)
    counts, parts = torch.bincount(of, minlength=len(condensed.names)), []
    for some in torch.arange(len(counts)).split(max(1, TOGETHER // int(counts.max()))):
        rows = torch.isin(of, some)
        targets = known.targets(*entry, torch.where(torch.isin(torch.arange(len(counts)), some), counts, 0))
        parts.append(class_distances(network, targets, images[rows], of[rows], recipe, session))
    return {kind: torch.cat([part[kind] for part in parts]) for kind in parts[0]}


# Views


def views_seen(recipe: Recipe, condensed: CondensedSet, watching: Observers, session: Session) -> dict[str, Any]:
    """Share of stored views whose largest logit is the image's class, for each observer and for the stored label.

    `first`: the class of the view's first image; `either`: its or that of the image mixed in. At least VIEWS of them,
    whole label epochs that are evenly spread. BatchNorm as in the set's labels (`relabel.observer_mode`), without a
    last batch that is not full, as that was filled with views that are not stored. Of a set smaller than a batch these
    were further views of the same images, and those of other label epochs stand for them.
    """
    section, size = recipe.relabel, condensed.manifest["soft_labels"]["view_size"]
    images, classes = condensed.pictures.to(session.device), condensed.of_pictures(condensed.labels)
    stages = roles(recipe)
    networks = {entry: watching.load(*entry) for entry in stages}
    epochs = min(condensed.epochs, math.ceil(VIEWS / len(condensed.labels)))
    starts = [number * condensed.epochs // epochs for number in range(epochs)]
    parts = (condensed.labelled(start, start + 1) for start in starts)
    if len(condensed.labels) < section.batch:
        stored = list(zip(*parts, strict=True))
        parts = [(views.join(stored[0]), torch.cat(stored[1]))]
    rights: dict[Any, list[Tensor]] = {}
    for table, soft in parts:
        kept = len(soft) // section.batch * section.batch if section.observer_mode == "batch" else 0
        for rows in torch.arange(kept or len(soft)).split(section.batch):
            part = views.take(table, rows)
            x = views.apply(images, part, size)
            first, second = part["image_id"].long(), part["mix_image_id"].long()
            wanted = classes[torch.stack([first, second.where(second >= 0, first)])]
            logits = {e: labels.mean_logits([net], x, section, session) for e, net in networks.items()}
            for who, found in {**logits, None: soft[rows].float()}.items():
                rights.setdefault(who, []).append(found.argmax(1).cpu() == wanted)
    shares = {who: _shares(torch.cat(right, 1)) for who, right in rights.items()}
    seen = {title(*entry): {"roles": stages[entry], **shares[entry]} for entry in stages}
    count = sum(right.shape[1] for right in rights[None])
    return {"views": count, "label_epochs": epochs, "observers": seen, "mean_label": shares[None]}


def _shares(right: Tensor) -> dict[str, float]:
    """Of bool (2, V), right about the first image and about the other one."""
    return {"first": _share(right[0]), "either": _share(right.any(0))}


# Agreement


def agreement(
    bench: Bench, student: str, recipe: Recipe, condensed: CondensedSet, watching: Observers, session: Session
) -> dict[str, Any]:
    """Share of real images on which a student and each observer predict the same class, beside both accuracies.

    The student is the one that `evaluate` trains on the set with seed 0 under the protocol of `bench`, found again
    where it did. Of its live weights and of their average (`ema`), as fractions.
    """
    [done] = bench.run([Trial("set", student, 0, 0, 0, condensed)])
    images, classes = bench.test
    own = {weights: done.tensors[weights].long() for weights in ("live", "ema")}
    found = {}
    for entry, stages in roles(recipe).items():
        theirs = predictions(watching.load(*entry), images, session)
        same = {weights: _share(theirs == predicted) for weights, predicted in own.items()}
        found[title(*entry)] = {"roles": stages, "accuracy": _share(theirs == classes), "agreement": same}
    return {
        "student": student,
        "protocol": bench.sections[student].protocol,
        "epochs": bench.sections[student].epochs,
        "split": bench.comparison.split,
        "images": len(classes),
        "accuracy": {weights: _share(predicted == classes) for weights, predicted in own.items()},
        "observers": found,
    }


def _share(same: Tensor) -> float:
    return same.float().mean().item()
