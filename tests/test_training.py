"""A training saved and taken up again: the state of optimisers, of mixed precision and of the average."""

from functools import partial

import pytest
import torch

from edc_hub import networks
from edc_hub.training import Training


SGD = partial(torch.optim.SGD, lr=0.1, fused=True)
ADAMW = partial(torch.optim.AdamW, lr=0.1, fused=True)


@pytest.mark.parametrize("optimizer", [SGD, partial(SGD, momentum=0.9), ADAMW])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_saved_training_goes_on_to_the_same_bits(optimizer, decay):
    def fresh(seed):
        face = {"image_size": 4, "mean": [0.0] * 3, "std": [1.0] * 3}
        network = networks.build("convnet", 2, seed=seed, args={"depth": 1}, **face)

        def loss(x):
            return network(x).square().sum()

        chosen, cpu = optimizer(network.module.parameters()), torch.device("cpu")
        made = Training(network, chosen, cpu, torch.float16, loss, decay=decay, average_buffers=True)
        made.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
        return made

    def step(training):
        training.descend(torch.ones(2, 3, 4, 4))

    first, second = fresh(0), fresh(1)
    for _ in range(2):
        step(first)
    second.restore({key: value.clone() for key, value in first.state().items()} | {"step": torch.tensor(2)})
    for _ in range(2):
        step(first)
        step(second)
    assert first.scaler.get_scale() == second.scaler.get_scale() == 16.0
    ours, theirs = first.state(), second.state()
    assert ours.keys() == theirs.keys() and any(key.startswith("ema/") for key in ours) == bool(decay)
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
