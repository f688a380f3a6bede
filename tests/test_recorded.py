"""Steps replayed as CUDA graphs give what the same steps give without one."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from edc_hub import networks, students
from edc_hub.feed import Batch
from edc_hub.protocol import Evaluation
from edc_hub.recorded import PLAIN, Recorded


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
