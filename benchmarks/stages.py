"""What the stages cost beside the bare network, for each observer of CIFAR-100.

    python benchmarks/stages.py [--json FILE] [--networks resnet18 …] [--stages moments synthesis …] [--rounds 15]

Both sides work on the same batch in the same process, turn by turn, so that a busy machine slows both; reported are
the median of the rounds' ratios and their quartiles. Peak memory is that of a fresh process for each side.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from edc_hub import matching, moments, networks, synthesize
from edc_hub.moments import Targets
from edc_hub.networks import Network
from edc_hub.recipe import Recipe
from edc_hub.taps import Taps
from edc_hub.work import generator


CLASSES, SIZE = 100, 32
MEAN, STD = [0.5071, 0.4867, 0.4408], [0.2675, 0.2565, 0.2761]
NETWORKS = {
    "resnet18": {},
    "convnet": {"depth": 3, "width": 128, "norm": "instance"},
    "mobilenet_v2": {},
    "wrn_16_2": {},
    "shufflenet_v2_x0_5": {},
}
STAGES = ("moments", "synthesis", "synthesis_flatness", "relabel")
TOGETHER = "all five together"

Step = Callable[[], None]


def build(name: str) -> Network:
    """An observer with random weights whose BatchNorm buffers fit: cost does not depend on training, NaNs might."""
    network = networks.build(name, CLASSES, args=NETWORKS[name], image_size=SIZE, mean=MEAN, std=STD, seed=0)
    network.train()
    with torch.no_grad():
        for _ in range(10):
            network(images(64) / 255)
    return network.eval().requires_grad_(False)


def images(count: int) -> torch.Tensor:
    """uint8 (count, 3, 32, 32), smooth noise."""
    coarse = torch.rand(count, 3, 8, 8, generator=generator(0, "benchmark", "images"))
    return (255 * F.interpolate(coarse, SIZE, mode="bicubic").clamp(0, 1)).to(torch.uint8)


def moments_step(names: list[str]) -> tuple[Step, Step]:
    """The pass over the real set, batch 64, and no-grad forwards."""
    batch, labels = images(64), torch.full((64,), 3)
    tapped = {}
    for name in names:
        network = build(name)
        taps = Taps(network, patch=4)
        taps.shift = moments.forward(network, taps, batch, SESSION)[0].mean(0)
        tapped[name] = network, taps
    sums = {name: torch.zeros(3, 8, taps.layout.size, dtype=torch.float64) for name, (_, taps) in tapped.items()}

    @torch.no_grad()
    def bare() -> None:
        x = batch.float() / 255
        for network, _ in tapped.values():
            network(x)

    def ours() -> None:
        moments.add_batch(batch, labels, tapped, sums, torch.arange(8), SESSION)

    return bare, ours


def synthesis_step(names: list[str], flat: bool) -> tuple[Step, Step]:
    """One iteration a network, batch 100 of ten classes, and forward, cross-entropy, backward to the images."""
    section = {"class_scope": "mixture", "flatness": {"kind": "logits" if flat else "none"}}
    recipe = Recipe.model_validate({"source": {"size": SIZE, "mean": MEAN, "std": STD}, "synthesize": section})
    section, labels, start = recipe.synthesize, torch.arange(10).repeat_interleave(10), images(100)
    made = [build(name) for name in names]
    observed = [synthesize.Observed(network, targets(network, labels), labels, recipe, SESSION) for network in made]
    space = synthesize.Space(recipe.source, SESSION.device)
    z = space.to_z(start).requires_grad_()
    average = z.detach().clone()
    adam = torch.optim.Adam([z], lr=section.lr, betas=tuple(section.betas), eps=section.eps)
    draws = generator(0, "benchmark", "views")

    def bare() -> None:
        for network in made:
            leaf = (start.float() / 255).requires_grad_()
            loss = F.cross_entropy(network(leaf), labels)
            torch.autograd.grad(loss, leaf)

    def ours() -> None:
        for one in observed:
            crop = synthesize.Crop(SIZE, section, draws)
            if flat:
                average.lerp_(z.detach(), 1 - section.flatness.beta)
            averaged = crop(space.to_x(average)) if flat else None
            loss = one.loss(crop(space.to_x(z)), averaged, labels, section, draws)
            (z.grad,) = torch.autograd.grad(loss, z)
            adam.step()
            space.clamp(z)

    return bare, ours


def targets(network: Network, labels: torch.Tensor) -> Targets:
    """Targets near what the images have, so that the loss is of a usual size."""
    taps = Taps(network, patch=4)
    first, second = moments.forward(network, taps, images(100), SESSION)
    mean, var = matching.group(first, second, taps.shift, torch.full((1, 100), 0.01))
    ids = labels.unique()
    mean, var = 1.1 * mean, 0.9 * var
    return Targets(
        taps.layout, mean[0], var[0], ids, mean.expand(len(ids), -1), var.expand(len(ids), -1), mean[0], var[0]
    )
