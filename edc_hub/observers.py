"""The observers: networks that see the real set, trained here with snapshots or loaded, checked, and kept as files."""

import functools
import hashlib
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import update_bn

from . import methods, networks, recipe, selection, weights
from .errors import InputError, naming
from .networks import Network
from .pixels import View
from .realset import RealSet
from .section import Network as Section
from .taps import Taps
from .training import Training, part
from .work import Progress, Session, Unit, fingerprint, generator, run


STAGE, VERSION = "observers", 1
CHECK_BATCH = 100  # images a forward pass where accuracy is measured
BN_STEPS = 100  # batches from which averaged weights take their BatchNorm statistics
State = dict[str, Tensor]


class Observers:
    """The finished observers of a recipe, each with its snapshots; epoch 0 stands for weights only loaded."""

    def __init__(self, given: recipe.Recipe, units: dict[str, Unit], classes: int, session: Session):
        self._source, self._units, self._classes, self._session = given.source, units, classes, session
        self._sections = {net.name: net for net in given.observers.networks}

    def load(self, name: str, epoch: int) -> Network:
        """The network after `epoch` epochs: frozen, eval mode, on the session's device. Reads that snapshot alone."""
        network = networks.described(self._sections[name], self._classes, seed=0, **self._source.face)
        with self._session.store.open(self._units[name]) as file:
            state = {key: file.get_tensor(f"{epoch}/{key}") for key in network.module.state_dict()}
        network.module.load_state_dict(state)
        return _ready(network, self._session)

    def facts(self, name: str, epoch: int) -> dict:
        """What a manifest says: arch, args, stem, mean, std, input_size, image_size, classes, source of the weights,
        epochs trained here, sha256 of the weights (`weights.digest`), accuracy on the check images (0 to 1)."""
        facts = self._session.store.facts(self._units[name])
        return {**facts.pop("snapshots")[str(epoch)], **facts, "epochs": epoch}

    def fingerprint(self, name: str, epoch: int) -> str:
        """Stands for the weights of one snapshot."""
        return f"{self._units[name].fingerprint}@{epoch}"


def obtain(given: recipe.Recipe, real: RealSet, session: Session) -> Observers:
    """Trains or loads every observer of the recipe that is not there yet; a unit of work is one observer.

    Networks and weights of all missing ones are built and read before the first is trained. Raises InputError for
    those that do not fit, and for an observer in use whose accuracy on training images is below `least_accuracy`.
    """
    classes, sections = len(real.names), {net.name: net for net in given.observers.networks}
    found: dict[str, weights.Weights] = {}
    units: dict[str, Unit] = {}
    for name, net in sections.items():
        with naming(f"observers.networks: {name}"):
            if net.weights:
                found[name] = weights.find(net.arch, net.weights)
            units[name] = Unit(STAGE, name, _fingerprint(given, net, real, found.get(name), session))

    def start(name: str, seed: int) -> Network:
        net = sections[name]
        with naming(f"observers.networks: {name}"):
            network = networks.described(net, classes, seed=seed, **given.source.face)
            if name in found:
                weights.load_into(network, found[name], new_head=net.train is not None)
        return network

    @functools.cache
    def check_images() -> tuple[Tensor, Tensor]:
        rows = real.rows()
        chosen = torch.randperm(len(rows), generator=generator(given.observers.seed, STAGE, "check"))
        rows = rows[chosen[: given.observers.check_images]].sort().values
        return real.images(rows), real.labels[rows]

    def make(unit: Unit, rng: torch.Generator, progress: Progress) -> tuple[State, dict]:
        net, seeds = sections[unit.name], torch.randint(2**48, (2,), generator=rng).tolist()
        network = start(unit.name, seeds[0])
        network.to(session.device, memory_format=torch.channels_last)
        if net.train is None:
            kept = {0: _copy(network)}
        else:
            kept = _train(network, net, real, session, seeds[1], progress)
        facts = dict(network.facts, source=found[unit.name].source if unit.name in found else "trained here")
        facts["arch"] = _published(net.arch)
        facts["snapshots"] = {}
        for epoch, state in kept.items():
            network.module.load_state_dict(state)
            images, labels = check_images()
            right = int((predictions(network, images, session) == labels).sum())
            accuracy = round(right / len(labels), 4)
            facts["snapshots"][str(epoch)] = {"sha256": weights.digest(state), "accuracy": accuracy}
        tensors = {f"{epoch}/{key}": value for epoch, state in kept.items() for key, value in state.items()}
        return tensors, facts

    matched = {} if methods.place(given.method) else dict(selection.users(given).get("synthesize", []))
    for unit in units.values():
        if not session.store.has(unit):
            network = start(unit.name, 0)
            if unit.name in matched:  # refused here if it has nothing to match
                Taps(network.eval(), patch=given.moments.patch, layers=given.synthesize.layers)
    observers = Observers(given, units, classes, session)
    for loaded in (True, False):  # first those that take no time: a wrong normalisation is found before long work
        if some := [unit for unit in units.values() if (sections[unit.name].train is None) == loaded]:
            run(some, make, session, seed=given.observers.seed, label="observers")
            _report(given, observers, session, {unit.name for unit in some})
    return observers


def least_accuracy(classes: int) -> float:
    """Below it a network sees next to nothing: twice chance, of two or three classes half way from chance to all."""
    return min(2 / classes, (1 + 1 / classes) / 2)


def untrained(given: recipe.Recipe, net: Section, classes: int, session: Session) -> Network:
    """An observer with random weights, otherwise as `Observers.load` gives it: for measuring time, not for results."""
    with naming(f"observers.networks: {net.name}"):
        if net.weights:
            weights.find(net.arch, net.weights)  # raises where there is nothing
        return _ready(networks.described(net, classes, seed=0, **given.source.face), session)


def _ready(network: Network, session: Session) -> Network:
    network = network.requires_grad_(False).eval().to(session.device)
    return network.to(memory_format=torch.channels_last) if session.device.type == "cuda" else network


def _published(arch: str) -> str:
    """The architecture without a local path: the configuration's folder by its last part."""
    library, _, name = arch.partition("/")
    return f"{library}/{Path(name).name}" if library == "transformers" and os.path.exists(name) else arch


def _fingerprint(
    given: recipe.Recipe, net: Section, real: RealSet, found: weights.Weights | None, session: Session
) -> str:
    spec = net.model_dump(mode="json", exclude={"name", "weights"})
    if net.train and net.train.ema:
        spec["train"]["bn"] = "taken anew"  # it was averaged
    elif net.train:
        del spec["train"]["ema"]  # without an average they are the observers of earlier releases
    mean, std = net.mean or given.source.mean, net.std or given.source.std
    return fingerprint(
        STAGE,
        VERSION,
        seed=given.observers.seed,
        check_images=given.observers.check_images,
        network=spec | {"mean": mean, "std": std, "arch": networks.identity(net.arch)},
        weights=found and found.identity,
        source=real.fingerprint,
        labels=hashlib.sha256(real.labels.numpy().tobytes()).hexdigest(),
        classes=len(real.names),
        size=given.source.size,
        resize=given.source.resize,
        precision=str(session.arithmetic),
    )


def _train(
    network: Network, net: Section, real: RealSet, session: Session, seed: int, progress: Progress
) -> dict[int, State]:
    """SGD with cross-entropy on `network` in place; returns the state after each epoch of `snapshots`.

    Order, crops and dropout of a step follow from (seed, epoch, step), so that work taken up in the middle of an epoch
    goes on to the same bits.
    """
    section = net.train
    rows = real.rows()
    # BatchNorm has no statistics for one value a channel: a last batch of one image is left out
    last = int(len(rows) > 1 and len(rows) % section.batch == 1)
    steps = math.ceil((len(rows) - last) / section.batch)
    training = trainer(network, section, session)
    kept: dict[int, State] = {}
    first = 0
    if (state := progress.load()) is not None:
        first = int(state["step"])
        training.restore(state)
        kept = {epoch: part(state, f"kept/{epoch}/") for epoch in selection.snapshots(net) if epoch * steps <= first}
    bar = session.bar(total=section.epochs * steps, initial=first, desc=net.name, unit="step", leave=False)
    with bar, session.own_draws():  # of dropout
        for epoch in range(first // steps, section.epochs):
            rng = generator(seed, STAGE, f"epoch {epoch}")
            order = rows[torch.randperm(len(rows), generator=rng)][: len(rows) - last]
            view_seed, step_seed = torch.randint(2**48, (2,), generator=rng).tolist()
            done = max(first - epoch * steps, 0)
            network.train()
            batches = real.batches(order[done * section.batch :], section.batch, view=_view(section, view_seed))
            for step, (images, labels, _) in enumerate(batches, epoch * steps + done):
                torch.manual_seed(step_seed + step)
                if section.schedule == "cosine":
                    share = step / (section.epochs * steps)
                    training.rate(section.lr * (1 + math.cos(math.pi * share)) / 2)
                x = _pixels(images, session)
                before = training.descend(x, labels.to(session.device))
                bar.update()
                if step % 50 == 0:
                    bar.set_postfix(epoch=epoch + 1, loss=f"{before.item():.3f}", refresh=False)
                if step + 1 == (epoch + 1) * steps and epoch + 1 in selection.snapshots(net):
                    if training.average:
                        seen = real.batches(
                            order[: BN_STEPS * section.batch], section.batch, view=_view(section, view_seed)
                        )
                        with session.autocast():  # the live weights' BatchNorm statistics are not the average's
                            update_bn((_pixels(images, session) for images, *_ in seen), training.average.module)
                    kept[epoch + 1] = _copy(training.average.module if training.average else network)
                progress.save(functools.partial(_state, step + 1, training, kept))
    return kept


def trainer(network: Network, section: recipe.Train, session: Session) -> Training:
    """Steps of SGD with cross-entropy on `network`, in place, of images (B, 3, s, s) in [0, 1] and labels int64."""
    optimizer = torch.optim.SGD(
        network.module.parameters(), section.lr, section.momentum, weight_decay=section.weight_decay, fused=True
    )

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        with session.autocast():
            return F.cross_entropy(network(x), labels)

    dtype = session.arithmetic
    return Training(network, optimizer, session.device, dtype, loss, decay=section.ema, average_buffers=False)


def _state(step: int, training: Training, kept: dict[int, State]) -> State:
    """What the rest of a training depends on after `step` steps, and the snapshots that it has left."""
    state = training.state() | {"step": torch.tensor(step)}
    return state | {f"kept/{epoch}/{key}": value for epoch, held in kept.items() for key, value in held.items()}


def _view(section: recipe.Train, seed: int) -> View | None:
    area = (section.crop_area[0], section.crop_area[1])
    if section.augment == "none":
        return View("pad_crop", seed, pad=0, flip=True) if section.flip else None
    return View(section.augment, seed, pad=section.pad, area=area, flip=section.flip)


def _pixels(images: Tensor, session: Session) -> Tensor:
    """uint8 to [0, 1] on the device."""
    return images.to(session.device, torch.float32, memory_format=torch.channels_last).div_(255)


def _copy(network: Network) -> State:
    return {key: value.detach().cpu().clone().contiguous() for key, value in network.module.state_dict().items()}


@torch.no_grad()
def predictions(network: Network, images: Tensor, session: Session) -> Tensor:
    """The class int64 (n,) that a network sees in each of images uint8 (n, 3, s, s), on the CPU."""
    network.eval()
    with session.autocast():
        found = [network(_pixels(batch, session)).argmax(1) for batch in images.split(CHECK_BATCH)]
    return torch.cat(found).cpu()


def _report(given: recipe.Recipe, observers: Observers, session: Session, names: set[str]) -> None:
    """Prints the accuracy of those of `names` that are in use and refuses those that see next to nothing."""
    in_use = [entry for entries in selection.users(given).values() for entry in entries if entry[0] in names]
    for name, epoch in dict.fromkeys(in_use):
        facts = observers.facts(name, epoch)
        accuracy, classes = facts["accuracy"], facts["classes"]
        label = selection.title(name, epoch)
        session.report(f"  {label:<24}{accuracy:>8.1%} of the training images  {facts['arch']}, {facts['stem']} stem")
        if accuracy < (least := least_accuracy(classes)):
            trained = ", or its lr and epochs (and ema)" if epoch else ""
            raise InputError(
                f"observers.networks: {label} is right on {accuracy:.1%} of the training images, below {least:.1%} "
                f"({classes} classes); check mean {facts['mean']}, std {facts['std']}, input_size and stem "
                f"({facts['stem']}) against those it was trained with{trained}"
            )
