"""Steps replayed as CUDA graphs give what the same steps give without one."""

from dataclasses import replace

import pytest
import torch
from test_synthesize import MEAN, STD, Interrupted, images, network, recipe, target
from torch import nn

from edc_hub import networks, objective, students, synthesize, work
from edc_hub.feed import Batch
from edc_hub.protocol import Evaluation
from edc_hub.recorded import PLAIN, Recorded
from edc_hub.work import Progress


CPU = torch.device("cpu")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")


def test_without_a_gpu_a_function_runs_at_every_call():
    calls = []

    def double(x, other):
        calls.append(other)
        return 2 * x

    step = Recorded(double, CPU)
    for number in range(PLAIN + 3):
        assert step(torch.tensor(float(number)), None).item() == 2 * number
    assert len(calls) == PLAIN + 3


@gpu
def test_a_replay_sees_new_numbers_and_weights_that_changed_in_place():
    device, calls = torch.device("cuda"), []
    weight = torch.ones(3, device=device)

    def product(x, scale):
        calls.append(1)
        return x * weight if scale is None else x * weight * scale

    step = Recorded(product, device)
    for number in range(PLAIN + 5):
        weight.fill_(number)
        x = torch.rand(4, 3, device=device)
        assert torch.equal(step(x, None), x * number)
    assert len(calls) == PLAIN + 1  # the recording is the last call
    scale = torch.tensor(2.0, device=device)
    for number in range(PLAIN + 2):  # other shapes, in turn: each has a recording of its own
        assert torch.equal(step(torch.full((2, 3), float(number), device=device), None)[0], number * weight)
        assert torch.equal(step(torch.ones(4, 3, device=device), scale)[0], 2 * weight)
    assert len(calls) == 3 * (PLAIN + 1)


@gpu
def test_a_result_stays_when_the_next_one_is_made():
    step = Recorded(lambda x: x + 1, torch.device("cuda"))
    found = [step(torch.full((2,), float(number), device="cuda")) for number in range(PLAIN + 4)]
    assert [x[0].item() for x in found] == [number + 1 for number in range(PLAIN + 4)]


@gpu
def test_what_python_waits_for_runs_as_it_is():
    step = Recorded(lambda x: x * x.sum().item(), torch.device("cuda"))
    x = torch.ones(3, device="cuda")
    for _ in range(PLAIN):
        step(x)
    assert step(x).tolist() == [3.0, 3.0, 3.0]
    assert step(2 * x).tolist() == [12.0, 12.0, 12.0]


@gpu
@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("bn", ["live", "averaged"])
def test_a_student_learns_alike_with_and_without_graphs(session, optimizer, bn):
    """Ten steps, the learning rate changed on the way: weights, average, BatchNorm buffers."""
    section = Evaluation(optimizer=optimizer, lr=0.01, ema={"decay": 0.9, "bn": bn}, loss="mse_ce")
    batches = [batch_of(8, seed) for seed in range(10)]
    states = []
    for enabled in (False, True):
        learner = students.Learner(toy(), section, replace(session, device=torch.device("cuda")))
        learner.descend.enabled = enabled
        for number, batch in enumerate(batches):
            learner.begin(0.01 / (1 + number // 5))
            learner.step(batch)
        assert bool(learner.descend._recordings) == enabled
        states.append({name: value.cpu() for name, value in learner.state().items()})
    plain, replayed = states
    assert plain.keys() == replayed.keys()
    for name, value in plain.items():
        torch.testing.assert_close(replayed[name], value, rtol=1e-4, atol=1e-5, msg=name)


STEPS = [
    {"flatness": {"kind": "logits"}, "drop_rate": 0.5},
    {"flatness": {"kind": "statistics"}, "class_scope": "per_class"},
    {"flatness": {"kind": "sam"}, "pick": "random", "together": 2, "tv": 1e-3},
    {"sizes": [8, 6], "layers": ["bn"], "residual": {"every": 40}},  # by ResNet-18
]


LABELS = torch.tensor([0, 0, 1, 1])


def options(keys):
    return recipe(iterations=60, crop_area=[0.3, 1.0], flip=True, jitter=1, **keys)


def watching(session, made):
    """Observers of four images; of a recipe that matches BatchNorm layers alone, two ResNets."""
    nets, kinds = [network("batch"), network("instance"), network("group")], made.synthesize.layers
    if kinds == ["bn"]:
        face = {"image_size": 8, "mean": MEAN, "std": STD}
        nets = [networks.build("resnet18", 10, seed=seed, **face).eval().requires_grad_(False) for seed in range(2)]
    wanted = [on(only(target(net), kinds), session.device) for net in nets]
    layout = torch.channels_last if session.device.type == "cuda" else torch.contiguous_format
    nets = [net.to(session.device, memory_format=layout) for net in nets]
    return [objective.Observed(*both, LABELS, made, session) for both in zip(nets, wanted, strict=True)]


def block(session, tmp_path, keys, monkeypatch=None, stop=None):
    """A block of four images: the last iterate and the losses."""
    made = options(keys)
    observed = watching(session, made)
    if stop is not None:
        draw = objective.Objective.draw

        def stopping(self, step, generator):
            if step == stop:
                raise Interrupted
            return draw(self, step, generator)

        monkeypatch.setattr(objective.Objective, "draw", stopping)
    saving = stop or (tmp_path / "p").exists()
    progress = Progress(tmp_path / "p", 0.0 if saving else 1e9)
    generator = work.generator(0, "blocks", "b")
    return synthesize.optimise(images(), LABELS, observed, made, session, generator, progress)


def on(targets, device):
    return targets._replace(
        **{name: value.to(device) for name, value in targets._asdict().items() if isinstance(value, torch.Tensor)}
    )


def only(targets, kinds):
    layout, kept = targets.layout.keep(kinds)
    cut = {
        name: value[..., kept]
        for name, value in targets._asdict().items()
        if isinstance(value, torch.Tensor) and name != "class_ids"
    }
    return targets._replace(layout=layout, **cut)


@pytest.mark.parametrize("keys", STEPS)
def test_a_step_of_tensors_alone_is_the_step(session, keys):
    """What a recording is made of, on a CPU: the view by matrices, dropped layers and averages as inputs."""
    made, drawing = options(keys), work.generator(0, "blocks", "b")
    plain, placed = (
        objective.Slope(objective.Objective(watching(session, made), LABELS, made, session.device), session)
        for _ in range(2)
    )
    placed.recorded, placed.pool = {}, None
    z = plain.objective.space.to_z(images())
    average = plain.objective.space.to_z(images(seed=5))
    for step in range(12):
        drawn = plain.objective.draw(step, drawing)
        (loss, gradient), (found, other) = plain(drawn, z, average), placed(drawn, z, average)
        torch.testing.assert_close(found, loss, rtol=1e-4, atol=0)
        assert (other - gradient).norm() < 1e-3 * gradient.norm()
        z = z - 0.05 * gradient.sign()
    assert len(placed.recorded) > 1 and plain.recorded is None


@pytest.fixture
def deterministic():
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        yield


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keys", STEPS)
@pytest.mark.usefixtures("deterministic")
def test_a_block_is_alike_with_and_without_graphs_and_after_a_kill(session, tmp_path, monkeypatch, keys, dtype):
    session = replace(session, device=torch.device("cuda"), dtype=dtype)
    replayed = block(session, tmp_path, keys)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        block(session, tmp_path / "killed", keys, patch, stop=37)
    resumed = block(session, tmp_path / "killed", keys)
    assert torch.equal(resumed[0], replayed[0]) and torch.equal(resumed[1], replayed[1])
    recorded, seen = Recorded.__call__, []

    def plain(self, *inputs):
        seen.append(self.enabled)
        self.enabled = False
        return recorded(self, *inputs)

    monkeypatch.setattr(Recorded, "__call__", plain)
    z, losses = block(session, tmp_path, keys)
    assert any(seen)
    assert torch.equal(replayed[1], losses) and torch.equal(replayed[0], z)  # the same kernels on the same numbers


def toy() -> networks.Network:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        module = nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)
        )
    return networks.Network(module, {"mean": [0.5] * 3, "std": [0.25] * 3, "input_size": None})


def batch_of(count: int, seed: int) -> Batch:
    draws = torch.Generator().manual_seed(seed)
    x, soft = torch.rand(count, 3, 8, 8, generator=draws), torch.randn(count, 5, generator=draws)
    label = torch.randint(5, (count,), generator=draws)
    return Batch(*(part.to("cuda") for part in (x, soft, label, label, torch.ones(count))))
