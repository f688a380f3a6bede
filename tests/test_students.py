"""Students: losses, schedules, decay, weight average and predictions against slow references; resume to the bit."""

import math
from functools import partial

import pytest
import timm
import torch
from helpers_labels import noise, seeded
from torch import nn

from edc_hub import networks, students
from edc_hub.errors import InputError
from edc_hub.feed import Batch, Drawn
from edc_hub.networks import Network
from edc_hub.protocol import Evaluation
from edc_hub.section import ViewSettings
from edc_hub.students import Learner
from edc_hub.work import Progress


CPU = torch.device("cpu")
TEST = noise(23, 8, seed=4), torch.arange(23) % 3
FACTS = {"mean": [0.5] * 3, "std": [0.25] * 3, "input_size": None, "image_size": 8, "classes": 3, "arch": "toy"}


def toy(seed: int = 0, dropout: float = 0.5) -> Network:
    """Two convolutions with BatchNorm, dropout, a linear layer."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        layers = [
            nn.Conv2d(3, 6, 3),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, 2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
        ]
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(8, 3)]
        return Network(nn.Sequential(*layers), FACTS)


def batch_of(count: int, seed: int = 0, soft: bool = True) -> Batch:
    rng = seeded(seed)
    x = torch.rand(count, 3, 8, 8, generator=rng)
    label, mixed = torch.randint(3, (2, count), generator=rng)
    return Batch(x, 2 * torch.randn(count, 3, generator=rng) if soft else None, label, mixed, torch.rand(count))


def drawn(**options) -> Drawn:
    """A feed of eleven images; as teacher, what three pixels say."""
    given = {"seed": 0, "teach": lambda x, table: 4 * x[:, :, 3, 3] - 2} | options
    return Drawn(noise(11, 8), torch.arange(11) % 3, ViewSettings(), 4, CPU, **given)


def section(**values) -> Evaluation:
    return Evaluation(**{"epochs": 4, "batch": 4, "lr": 0.01, **values})


def trained(session, tmp_path, network=None, feed=None, **values) -> students.Trained:
    options = {key: values.pop(key) for key in ("curve_points", "seed", "label") if key in values}
    given = section(**values)
    progress = Progress(tmp_path / "student.progress", 0.0)
    options = {"seed": 1, "curve_points": 0, "progress": progress} | options
    found = students.train(network or toy(), feed or drawn(), TEST, given, session, **options)
    progress.path.unlink(missing_ok=True)
    return found


def log_softmax(logits: list[float]) -> list[float]:
    total = math.log(sum(math.exp(z) for z in logits))
    return [z - total for z in logits]


@pytest.mark.parametrize("loss", ["mse_ce", "kl", "cosine", "ce"])
def test_each_loss_is_its_equation(loss):
    given, batch = section(loss=loss, ce_weight=0.3, temperature=5.0), batch_of(7)
    logits = torch.randn(7, 3, generator=seeded(9))
    total = 0.0
    for f, z, y, other, share in zip(logits.tolist(), *(column.tolist() for column in batch[1:]), strict=True):
        if loss == "mse_ce":
            total += sum((a - b) ** 2 for a, b in zip(f, z, strict=True)) / 3 - 0.3 * log_softmax(f)[y]
        if loss == "kl":
            p, q = (log_softmax([v / 5 for v in values]) for values in (z, f))
            total += sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
        if loss == "cosine":
            total += 1 - sum(a * b for a, b in zip(f, z, strict=True)) / (math.hypot(*f) * math.hypot(*z))
        if loss == "ce":
            total -= share * log_softmax(f)[y] + (1 - share) * log_softmax(f)[other]
    assert students.loss_of(given, logits, batch).item() == pytest.approx(total / 7, rel=1e-5)


def test_a_soft_loss_without_soft_labels_is_refused_in_one_line():
    hard = batch_of(4, soft=False)
    for loss in ("mse_ce", "kl", "cosine"):
        with pytest.raises(InputError, match=rf"evaluation.loss: {loss} needs soft labels.*use ce"):
            students.loss_of(section(loss=loss), hard.x[:, :, 0, 0], hard)
    assert students.loss_of(section(loss="ce"), hard.x[:, :, 0, 0], hard) > 0


@pytest.mark.parametrize("epochs", [1, 7, 12, 1000])
@pytest.mark.parametrize("zeta", [1.0, 2.0, 3.0])
def test_each_schedule_is_its_equation_in_every_epoch(epochs, zeta):
    for i in range(epochs):
        smooth = 0.5 * (1 + math.cos(i * math.pi / (zeta * epochs)))
        tail = 0.5 * (1 + math.cos(5 * math.pi / (6 * zeta))) * (6 * epochs - 6 * i) / (6 * epochs)
        steps = 1.0
        for milestone in (0.5, 0.8):
            if i >= milestone * epochs:
                steps *= 0.3
        wanted = {
            "smooth": smooth,
            "ssrs": smooth if i <= 5 * epochs / 6 else tail,
            "linear": 1 - i / (zeta * epochs),
            "multistep": steps,
        }
        for schedule, value in wanted.items():
            given = section(schedule=schedule, zeta=zeta, gamma=0.3, milestones=[0.5, 0.8])
            assert students.rate(given, i, epochs) == pytest.approx(value, abs=1e-12), schedule


def test_a_schedule_that_is_through_before_the_last_epoch_stays_at_zero():
    for schedule in ("smooth", "linear"):
        assert [students.rate(section(schedule=schedule, zeta=0.5), i, 10) for i in range(5, 10)] == [0.0] * 5


def test_alrs_lowers_the_rate_when_the_loss_stands_still_relatively_and_absolutely():
    losses = [3.0, 2.99, 2.9, 2.89, 2.95, 0.5, 0.495, 0.51, 0.505, 100.0, 100.01, 101.0, 0.001, 0.0015, 0.00151]
    given, want = section(schedule="alrs", gamma=0.9), 1.0
    for count in range(1, len(losses) + 1):
        if count > 1:
            change = abs(losses[count - 1] - losses[count - 2])
            if change <= 0.02 and change / losses[count - 2] <= 0.02:
                want *= 0.9
        assert students.alrs(given, torch.tensor(losses[:count])) == pytest.approx(want)
    assert students.alrs(given, torch.zeros(0)) == 1 and 0 < want < 1


def test_alrs_in_training_follows_the_losses_of_the_epochs(session, tmp_path):
    found = trained(session, tmp_path, schedule="alrs", gamma=0.7, epochs=12, loss="ce", lr=1e-3)
    want = [1e-3]
    for before, loss in zip(found.loss[:-1].tolist(), found.loss[1:].tolist(), strict=True):
        stands = abs(loss - before) <= 0.02 and abs(loss - before) <= 0.02 * before
        want.append(want[-1] * (0.7 if stands else 1.0))
    assert found.lr[1:].tolist() == pytest.approx(want[:-1])
    assert found.lr.unique().numel() > 1


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_parameters_of_one_dimension_never_decay(optimizer):
    network = toy()
    given = section(optimizer=optimizer, weight_decay=0.5, lr=0.1)
    made = students.optimizer_of(given, network.module)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    made.step()
    for old, new in zip(before, network.parameters(), strict=True):
        assert torch.equal(old, new) == (old.ndim == 1)
        if optimizer != "adam" and old.ndim > 1:
            torch.testing.assert_close(new.detach(), old * (1 - 0.1 * 0.5))


@pytest.mark.parametrize("bn", ["live", "averaged", "reestimated"])
def test_the_average_and_its_buffers_agree_with_a_slow_reference(session, bn):
    network, decay, feed = toy(dropout=0.0), 0.8, drawn()
    learner = Learner(network, section(ema={"decay": decay, "bn": bn}), session)
    names = {name for name, _ in network.module.named_parameters()}
    average = {name: value.double().clone() for name, value in network.module.state_dict().items()}
    learner.begin(0.02)
    for step in range(9):
        learner.step(batch_of(6, seed=step))
        for name, value in network.module.state_dict().items():
            if name in names or (bn == "averaged" and value.is_floating_point()):
                average[name] = decay * average[name] + (1 - decay) * value.double()
            else:
                average[name] = value.double().clone()
    live, averaged = learner.predict(TEST[0], feed, seeded(3))
    found = learner.average.module.module.state_dict()
    if bn == "reestimated":
        means, variances = [], []
        first = nn.Conv2d(3, 6, 3).double()
        first.load_state_dict({"weight": average["0.weight"], "bias": average["0.bias"]})
        for x in feed.clean(seeded(3)):
            values = first((x.double() - 0.5) / 0.25).detach().transpose(0, 1).reshape(6, -1)
            means.append(torch.stack([channel.mean() for channel in values]))
            variances.append(torch.stack([channel.var() for channel in values]))
        average["1.running_mean"], average["1.running_var"] = sum(means) / len(means), sum(variances) / len(variances)
        assert (found["4.running_mean"] - average["4.running_mean"]).abs().max() > 1e-4  # no longer the live ones
        average |= {name: value.double() for name, value in found.items() if name[:2] == "4." and name not in names}
        average["1.num_batches_tracked"] = torch.tensor(len(means)).double()
    for name, value in found.items():
        torch.testing.assert_close(value.double(), average[name], atol=2e-5, rtol=1e-5, msg=name)
    slow = toy(dropout=0.0).double().eval()
    slow.module.load_state_dict(average)
    assert torch.equal(averaged.long(), slow(TEST[0].double() / 255).argmax(1))
    assert torch.equal(live.long(), network.eval()(TEST[0] / 255).argmax(1)) and live.dtype == torch.int16


def test_without_a_decay_there_is_no_average(session, tmp_path):
    found = trained(session, tmp_path, ema={"decay": 0.0})
    assert torch.equal(found.live, found.ema)


@pytest.mark.parametrize(
    "values",
    [
        {"optimizer": "adamw", "schedule": "alrs"},
        {"optimizer": "sgd", "ema": {"bn": "averaged"}, "loss": "kl"},
        {"optimizer": "adam", "ema": {"bn": "reestimated"}, "schedule": "ssrs"},
        {"optimizer": "sgd", "momentum": 0.0, "ema": {"decay": 0.0}, "loss": "cosine"},
    ],
    ids=["adamw", "sgd", "adam", "plain"],
)
def test_a_resumed_training_is_an_undisturbed_one_to_the_bit(session, tmp_path, values):
    class Failing:
        def __init__(self, at: int):
            self.feed, self.at, self.steps = drawn(), at, drawn().steps
            self.clean = self.feed.clean

        def epoch(self, number, generator):
            for step, batch in enumerate(self.feed.epoch(number, generator)):
                if number == self.at and step == 1:
                    raise KeyboardInterrupt
                yield batch

    progress = Progress(tmp_path / "x.progress", 0.0)
    run = partial(students.train, test=TEST, section=section(epochs=6, **values), session=session, seed=1)
    whole = toy()
    want = run(whole, drawn(), curve_points=3, progress=Progress(tmp_path / "y.progress", 0.0))
    for at in (2, 4):
        torch.manual_seed(at)
        with pytest.raises(KeyboardInterrupt):
            run(toy(), Failing(at), curve_points=3, progress=progress)
        assert int(progress.load()["epoch"]) == at
    last = toy(seed=5)  # everything comes from the file
    found = run(last, drawn(), curve_points=3, progress=progress)
    assert all(torch.equal(*pair) for pair in zip(found, want, strict=True))
    state = whole.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in last.state_dict().items())
    again = run(toy(seed=6), drawn(), curve_points=3, progress=progress)  # killed after the last epoch
    assert torch.equal(again.live, want.live) and torch.equal(again.ema, want.ema)


def test_an_average_with_statistics_of_its_own_is_the_same_after_a_kill_in_the_last_prediction(session, tmp_path):
    def noisy(seed):
        """Dropout before BatchNorm, which statistics depend on."""
        network = toy(seed)
        network.module.insert(0, nn.Dropout(0.5))
        return network

    progress = Progress(tmp_path / "x.progress", 0.0)
    values = section(ema={"decay": 0.5, "bn": "reestimated"})
    run = partial(
        students.train, test=TEST, section=values, session=session, seed=1, curve_points=0, progress=progress
    )
    want = run(noisy(0), drawn())
    torch.manual_seed(7)
    found = run(noisy(1), drawn())  # no epoch is left
    assert torch.equal(found.live, want.live) and torch.equal(found.ema, want.ema)


def test_a_student_whose_loss_is_no_number_is_no_result(session, tmp_path):
    with pytest.raises(InputError, match="evaluation.lr: the loss of toy set is no number in epoch 1; lower it"):
        trained(session, tmp_path, lr=1e30, label="toy set")


def test_a_training_depends_on_its_seed_and_leaves_the_global_generator_alone(session, tmp_path):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = trained(session, tmp_path)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first.loss, trained(session, tmp_path).loss)
    assert not torch.equal(first.loss, trained(session, tmp_path, seed=7).loss)


def test_the_loss_of_an_epoch_is_the_mean_of_its_steps(session, tmp_path, monkeypatch):
    steps, plain = [], Learner.step

    def step(self, batch):
        steps.append(plain(self, batch).item())
        return torch.tensor(steps[-1])

    monkeypatch.setattr(Learner, "step", step)
    found = trained(session, tmp_path, epochs=3)
    assert found.loss.tolist() == pytest.approx([sum(steps[i : i + 3]) / 3 for i in (0, 3, 6)])
    assert found.lr.tolist() == pytest.approx([0.01 * students.rate(section(), i, 3) for i in range(3)])


def test_the_curve_has_evenly_spaced_points_and_ends_with_the_result(session, tmp_path):
    found = trained(session, tmp_path, epochs=10, curve_points=4)
    assert found.curve[:, 0].tolist() == [2, 5, 8, 10]
    assert found.curve[-1, 1].item() == pytest.approx((found.live == TEST[1]).float().mean().item())
    assert found.curve[-1, 2].item() == pytest.approx((found.ema == TEST[1]).float().mean().item())
    plain = trained(session, tmp_path, epochs=10)
    assert plain.curve.shape == (0, 3) and torch.equal(plain.loss, found.loss)  # looking changes nothing
    assert trained(session, tmp_path, epochs=2, curve_points=9).curve[:, 0].tolist() == [1, 2]


def test_predictions_do_not_depend_on_how_test_images_are_batched(session, monkeypatch):
    learner = Learner(toy(), section(ema={"decay": 0.0}), session)
    whole, _ = learner.predict(TEST[0], drawn(), seeded())
    monkeypatch.setattr(students, "TEST_PIXELS", 5 * 8 * 8)
    assert torch.equal(whole, learner.predict(TEST[0], drawn(), seeded())[0])


def test_precision_is_the_protocols_and_weights_stay_float32(session):
    steps = {}
    for precision in ("float32", "bfloat16"):
        network = toy(dropout=0.0)
        learner = Learner(network, section(precision=precision), session)
        learner.begin(0.01)
        steps[precision] = learner.step(batch_of(6)).item()
        assert all(parameter.dtype == torch.float32 for parameter in network.parameters())
    assert steps["float32"] != steps["bfloat16"] == pytest.approx(steps["float32"], rel=0.02)


def test_networks_with_group_norm_keep_their_memory_in_order(session):
    plain = {"seed": 0, "image_size": 8, "mean": [0.5] * 3, "std": [0.25] * 3}
    convnet = networks.build("convnet", 3, args={"width": 8, "depth": 1}, **plain)
    assert Learner(convnet, section(), session).layout == torch.contiguous_format
    assert Learner(toy(), section(), session).layout == torch.channels_last


def test_a_student_of_timm_and_its_wrapper_in_transformers_learn_alike(session, tmp_path):
    name = "test_resnet"
    folder = tmp_path / "timm_wrapper"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "timm_wrapper"}')
    plain = {"seed": 0, "image_size": 32, "mean": [0.5] * 3, "std": [0.25] * 3}
    direct = networks.build(f"timm/{name}", 3, **plain)
    wrapped = networks.build(f"transformers/{folder}", 3, args={"architecture": name}, **plain)
    assert isinstance(direct.module, type(timm.create_model(name)))
    assert type(wrapped.module).__name__ == "TimmWrapperForImageClassification"
    wrapped.module.timm_model.load_state_dict(direct.module.state_dict())
    feed = partial(
        Drawn, noise(8, 32), torch.arange(8) % 3, ViewSettings(), 8, CPU, seed=0, teach=lambda x, _: x[:, :, 9, 9]
    )
    test = noise(9, 32), torch.arange(9) % 3
    losses = []
    for index, network in enumerate((direct, wrapped)):
        progress = Progress(tmp_path / f"{index}.progress", 1e9)
        found = students.train(
            network, feed(), test, section(epochs=20, lr=1e-3), session, seed=0, curve_points=0, progress=progress
        )
        losses.append(found.loss)
    assert feed().steps == 1 and losses[0][-1] < losses[0][0]
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=0)
