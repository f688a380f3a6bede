"""The code that a card shows and `showcase` measures, as text: a student in ten lines."""

import hashlib
from typing import Any

from . import manifest as manifests
from .recipe import Evaluation


_EXAMPLE = """\
import timm, torch
from datasets import load_dataset
from torch.nn.functional import {functions}

ds = load_dataset("{repo}", "images", split="train").with_format("torch", ["image", "label", "soft_label"])
mean, std = torch.tensor({mean}).view(3, 1, 1), torch.tensor({std}).view(3, 1, 1)
net = timm.create_model("resnet18", num_classes={classes})
{stem}optimizer = torch.optim.{optimizer}
for epoch in range({epochs}):
    for batch in torch.utils.data.DataLoader(ds, {batch}, shuffle=True):
{decode}        logits = net((batch["image"] / 255 - mean) / std)
        {loss}
        optimizer.zero_grad(), loss.backward(), optimizer.step()"""
_SMALL_STEM = "net.conv1, net.maxpool = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False), torch.nn.Identity()\n"
_OPTIMIZERS = {
    "adamw": "AdamW(net.parameters(), lr={lr}, weight_decay={weight_decay})",
    "adam": "Adam(net.parameters(), lr={lr}, weight_decay={weight_decay})",
    "sgd": "SGD(net.parameters(), lr={lr}, momentum={momentum}, weight_decay={weight_decay})",
}
_LOSSES = {  # the functions it takes, and its lines
    "mse_ce": (
        "cross_entropy, mse_loss",
        'loss = mse_loss(logits, batch["soft_label"]) + {ce_weight} * cross_entropy(logits, batch["label"])',
    ),
    "kl": (
        "kl_div, log_softmax",
        'own, wanted = (log_softmax(z / {temperature}, 1) for z in (logits, batch["soft_label"]))\n'
        '        loss = kl_div(own, wanted, reduction="batchmean", log_target=True)',
    ),
    "cosine": ("cosine_similarity", 'loss = (1 - cosine_similarity(logits, batch["soft_label"])).mean()'),
    "ce": ("cross_entropy", 'loss = cross_entropy(logits, batch["label"])'),
}
# tiles row by row, as edc_hub.canvas.decode has them; the labels of a canvas are those of each of its pictures
_DECODE = """\
        tiles = batch["image"].float().unfold(2, {side}, {side}).unfold(3, {side}, {side}).permute(0, 2, 3, 1, 4, 5)
        batch = {{key: column.repeat_interleave({tiles}, 0) for key, column in batch.items() if key != "image"}}
        batch["image"] = torch.nn.functional.interpolate(tiles.flatten(0, 2), {size}, mode="bilinear").round()
"""


def example(manifest: dict[str, Any], evaluation: Evaluation, repo: str) -> str:
    """A student of the `images` configuration in ten lines of torch.

    Loss, optimiser, batch and epochs are those of the recipe's protocol; the learning rate stays as it begins. The
    batch is a larger one where a prefix would leave a single image over, for which BatchNorm has no statistics.
    Three more lines decode canvases; a batch then has as many pictures as the protocol says.
    """
    grid, size, classes = manifests.grid(manifest), manifest["images"]["size"], len(manifest["classes"])
    counts = [classes * k for k in range(1, manifest["ipc"] + 1)]
    values = evaluation.model_dump()
    functions, loss = _LOSSES[evaluation.loss]
    batch = max(1, evaluation.batch // grid**2)
    while grid == 1 and any(count % batch == 1 for count in counts):
        batch += 1
    return _EXAMPLE.format(
        decode=_DECODE.format(side=size // grid, tiles=grid**2, size=size) if grid > 1 else "",
        repo=repo,
        mean=manifest["images"]["mean"],
        std=manifest["images"]["std"],
        classes=classes,
        stem=_SMALL_STEM if size <= 64 else "",
        functions=functions,
        optimizer=_OPTIMIZERS[evaluation.optimizer].format(**values),
        loss=loss.format(**values),
        epochs=values["epochs"],
        batch=batch,
    )


def digest(manifest: dict[str, Any], evaluation: Evaluation) -> str:
    """sha256 of the example, whatever the set is called: what its accuracy is of."""
    return hashlib.sha256(example(manifest, evaluation, "dataset").encode()).hexdigest()
