"""Students: the training loop, its losses, schedules and weight average. The last epoch counts, nothing is chosen."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from .errors import InputError
from .feed import Batch, Drawn, Stored
from .networks import Network
from .protocol import Evaluation
from .training import Training
from .work import Progress, Session, generator


STAGE, VERSION = "students", 1
ALRS_CHANGE = 0.02  # up to here, relative and absolute, a loss stands still
TEST_BATCH, TEST_PIXELS = 500, 500 * 64 * 64  # images a forward pass, fewer where they are large


class Trained(NamedTuple):
    """One trained student."""

    live: Tensor  # int16 (T,) top-1 prediction of every test image after the last epoch
    ema: Tensor  # int16 (T,) the same with averaged weights; `live` where there is no average
    loss: Tensor  # float32 (epochs,) mean training loss
    lr: Tensor  # float32 (epochs,)
    curve: Tensor  # float32 (points, 3): epochs done, accuracy live and averaged; for pictures, never for a choice


def mse_ce(section: Evaluation, logits: Tensor, batch: Batch) -> Tensor:
    """(1/BC) Σ (f(x) - z̄)² + ce_weight CE(f(x), y), y the class of the first image."""
    return F.mse_loss(logits, batch.soft) + section.ce_weight * F.cross_entropy(logits, batch.label)


def kl(section: Evaluation, logits: Tensor, batch: Batch) -> Tensor:
    """(1/B) Σ KL(softmax(z̄/T) ‖ softmax(f(x)/T)), without the factor T²."""
    own, wanted = ((z / section.temperature).log_softmax(1) for z in (logits, batch.soft))
    return F.kl_div(own, wanted, reduction="batchmean", log_target=True)


def cosine(section: Evaluation, logits: Tensor, batch: Batch) -> Tensor:
    """(1/B) Σ 1 - cos(f(x), z̄)."""
    return (1 - F.cosine_similarity(logits, batch.soft)).mean()


def ce(section: Evaluation, logits: Tensor, batch: Batch) -> Tensor:
    """(1/B) Σ λ CE(f(x), y) + (1 - λ) CE(f(x), y'), y' the class of the image mixed in."""
    first, second = (F.cross_entropy(logits, label, reduction="none") for label in (batch.label, batch.mixed))
    return (batch.share * first + (1 - batch.share) * second).mean()


LOSSES = {loss.__name__: loss for loss in (mse_ce, kl, cosine, ce)}


def loss_of(section: Evaluation, logits: Tensor, batch: Batch) -> Tensor:
    """The protocol's loss of logits (B, C). Raises InputError for a soft loss without soft labels."""
    if batch.soft is None and section.loss != "ce":
        raise InputError(f"evaluation.loss: {section.loss} needs soft labels and labels here are hard; use ce")
    return LOSSES[section.loss](section, logits.float(), batch)


def rate(section: Evaluation, epoch: int, epochs: int) -> float:
    """What the learning rate is multiplied by in `epoch` (from 0) of `epochs`; for alrs see `alrs`."""
    part = min(1.0, epoch / (section.zeta * epochs))
    if section.schedule == "linear":
        return 1 - part
    if section.schedule == "multistep":
        return section.gamma ** sum(epoch >= milestone * epochs for milestone in section.milestones)
    if section.schedule == "ssrs" and 6 * epoch > 5 * epochs:  # drops to a sixth at once, then falls to zero
        half = (1 + math.cos(math.pi * min(1.0, 5 / (6 * section.zeta)))) / 2
        return half * (6 * epochs - 6 * epoch) / (6 * epochs)
    if section.schedule in ("smooth", "ssrs"):
        return (1 + math.cos(math.pi * part)) / 2
    return 1.0


def alrs(section: Evaluation, losses: Tensor) -> float:
    """What the learning rate is multiplied by after epochs of these mean losses: gamma for each that stands still."""
    change = losses.diff().abs()
    stands = (change <= ALRS_CHANGE) & (change <= ALRS_CHANGE * losses[:-1].abs())
    return section.gamma ** int(stands.sum())


def optimizer_of(section: Evaluation, module: nn.Module) -> torch.optim.Optimizer:
    """The protocol's optimiser; parameters of one dimension, biases and norms, do not decay."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": section.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if section.optimizer == "sgd":
        return torch.optim.SGD(groups, section.lr, section.momentum, fused=True)
    kind = torch.optim.AdamW if section.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, section.lr, fused=True)


def first_weights(student: str, seed: int) -> int:
    """The seed of the weights that a student begins with."""
    return int(torch.randint(2**48, (), generator=generator(seed, STAGE, student)))


def train(
    network: Network,
    feed: Stored | Drawn,
    test: tuple[Tensor, Tensor],
    section: Evaluation,
    session: Session,
    *,
    seed: int,
    curve_points: int,
    progress: Progress,
    label: str = "",
) -> Trained:
    """Trains `network` in place and predicts the test images with its weights and their average.

    Args: test: uint8 (T, 3, s, s), on any device, and int64 (T,), which serves the curve alone. All that is
    random in an epoch follows from (seed, epoch); the state is saved at ends of epochs, and work taken up there goes
    on to the same bits.
    """
    learner = Learner(network, section, session)
    history, curve = torch.zeros(section.epochs, 2), torch.zeros(0, 3)
    first = 0
    if (state := progress.load()) is not None:
        first, history, curve = int(state["epoch"]), state["history"], state["curve"]
        learner.restore(state)
    points = {round(i * section.epochs / curve_points) for i in range(1, curve_points + 1)}
    bar = session.bar(
        total=section.epochs * feed.steps,
        initial=first * feed.steps,
        desc=label,
        unit="step",
        leave=False,
        mininterval=1,
    )
    with bar, session.own_draws():  # of dropout
        for epoch in range(first, section.epochs):
            rng = generator(seed, STAGE, f"epoch {epoch}")
            torch.manual_seed(int(torch.randint(2**48, (), generator=rng)))
            if section.schedule == "alrs":
                lr = section.lr * alrs(section, history[:epoch, 0])
            else:
                lr = section.lr * rate(section, epoch, section.epochs)
            learner.begin(lr)
            total = torch.zeros((), device=session.device)
            for batch in feed.epoch(epoch, rng):
                total += learner.step(batch)
                bar.update()
            history[epoch] = torch.tensor([total.item() / feed.steps, lr])
            loss = history[epoch, 0].item()
            if not math.isfinite(loss):  # its predictions would be the first class
                raise InputError(f"evaluation.lr: the loss of {label} is no number in epoch {epoch + 1}; lower it")
            bar.set_postfix(loss=f"{loss:.3f}", lr=f"{lr:.2g}", refresh=False)
            if epoch + 1 in points and epoch + 1 < section.epochs:
                live, averaged = learner.predict(test[0], feed, generator(seed, STAGE, f"clean {epoch}"))
                curve = torch.cat([curve, _point(epoch + 1, live, averaged, test[1])])
            about = {"epoch": torch.tensor(epoch + 1), "history": history, "curve": curve}
            progress.save(lambda about=about: learner.state() | about)
        live, averaged = learner.predict(test[0], feed, generator(seed, STAGE, "clean"))
        if points:
            curve = torch.cat([curve, _point(section.epochs, live, averaged, test[1])])
    return Trained(live, averaged, history[:, 0].clone(), history[:, 1].clone(), curve)


def _point(epochs: int, live: Tensor, averaged: Tensor, labels: Tensor) -> Tensor:
    right = ((found == labels.cpu()).float().mean().item() for found in (live, averaged))
    return torch.tensor([[float(epochs), *right]])


class Learner(Training):
    """A student in training under a protocol."""

    def __init__(self, network: Network, section: Evaluation, session: Session):
        self.section = section
        grouped = any(isinstance(part, nn.GroupNorm) for part in network.modules())
        self.layout = torch.contiguous_format if grouped else torch.channels_last  # GroupNorm is slow in the other
        network.to(session.device, memory_format=self.layout)
        super().__init__(
            network,
            optimizer_of(section, network.module),
            session.device,
            getattr(torch, section.precision),  # on a CPU too
            self._loss,
            decay=section.ema.decay,
            average_buffers=section.ema.bn == "averaged",
        )

    def begin(self, lr: float) -> None:
        """An epoch with this learning rate."""
        self.network.train()
        self.rate(lr)

    def step(self, batch: Batch) -> Tensor:
        """One step; returns the loss before it, on the device."""
        return self.descend(*batch)

    def _loss(self, *batch: Tensor | None) -> Tensor:
        batch = Batch(*batch)
        with self.autocast():
            logits = self.network(batch.x.to(memory_format=self.layout))
        return loss_of(self.section, logits, batch)

    def predict(self, images: Tensor, feed: Stored | Drawn, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Top-1 predictions int16 (T,) of uint8 images by the live weights and by their average, on the CPU."""
        live = self._predict(self.network, images)
        if self.average is None:
            return live, live.clone()  # two tensors of one file share no memory
        if self.section.ema.bn == "reestimated":
            torch.manual_seed(rng.initial_seed())  # of dropout, also where a resumed training has no epoch left
            with self.autocast():  # the next step copies the live network's buffers again
                update_bn((x.to(memory_format=self.layout) for x in feed.clean(rng)), self.average.module)
        return live, self._predict(self.average.module, images)

    @torch.no_grad()
    def _predict(self, network: nn.Module, images: Tensor) -> Tensor:
        network.eval()
        count = max(1, min(TEST_BATCH, TEST_PIXELS // images.shape[-1] ** 2))
        found = []
        for part in images.split(count):
            x = part.to(self.device).to(torch.float32, memory_format=self.layout).div_(255)
            with self.autocast():
                found.append(network(x).argmax(1))
        return torch.cat(found).to("cpu", torch.int16)
