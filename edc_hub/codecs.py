"""How soft labels are stored: the label columns of one row of `soft_labels`, and the one reader of them all.

Labels are made as float16 logits. `dense` keeps them; `int8` and `top_k` are smaller and lose some of each. What is
stored are logits, which students learn by MSE, so the error that counts is the squared one.
"""

from typing import Any

import torch
from torch import Tensor

from .recipe import Relabel


COLUMNS = ("soft_label", "scale", "indices", "values", "fill")
"""All label columns, in the order of the schema; the other columns of a row are those of its view."""

KEYS = {"codec", "top_k", "budget", "full"}
"""Keys of `relabel` that decide what is stored, not what the labels are."""

_LEVELS = 127  # of int8 on either side of zero


def encode(soft: Tensor, section: Relabel) -> dict[str, Tensor]:
    """The label columns of logits float16 (B, C), by `relabel.codec`. Equal rows give equal columns."""
    if section.codec == "int8":
        return _int8(soft)
    return _top_k(soft, section.top_k) if section.codec == "top_k" else {"soft_label": soft}


def _int8(soft: Tensor) -> dict[str, Tensor]:
    """`soft_label` int8 (B, C) and `scale` float16 (B,): the largest logit of a row is 127 steps of it."""
    scale = (soft.float().abs().amax(1) / _LEVELS).half()
    steps = soft.float() / scale.float().where(scale > 0, 1)[:, None]  # as rounded, so that it is what is read
    return {"soft_label": steps.round().clamp(-_LEVELS, _LEVELS).to(torch.int8), "scale": scale}


def _top_k(soft: Tensor, k: int) -> dict[str, Tensor]:
    """The k largest logits as `indices` int16 and `values` float16 (B, k), largest first, and `fill` float16 (B,).

    All other logits are read as `fill`, their mean: of all constants the one with the least squared error.
    """
    values, indices = soft.sort(dim=1, descending=True, stable=True)  # of equal logits the first class
    # float64 sums of float16 numbers are exact, whatever their order
    fill = values[:, k:].double().mean(1) if k < soft.shape[1] else torch.zeros(len(soft))
    return {"indices": indices[:, :k].short(), "values": values[:, :k].contiguous(), "fill": fill.half()}


def decode(columns: dict[str, Tensor], classes: int) -> Tensor:
    """Logits float16 (B, classes) of a batch of rows, whatever their codec.

    Args: columns: of any codec and in any numeric type, as parquet has them or as `load_dataset` formats them; those
    of the view may be among them.
    """
    if "fill" in columns:
        soft = columns["fill"].half()[:, None].repeat(1, classes)
        return soft.scatter_(1, columns["indices"].long(), columns["values"].half())
    soft = columns["soft_label"].half()  # exact for int8
    return soft * columns["scale"].half()[:, None] if "scale" in columns else soft


def row_bytes(section: Relabel, classes: int) -> int:
    """Bytes of one row's label columns, uncompressed."""
    sizes = {"dense": 2 * classes, "int8": classes + 2, "top_k": 4 * section.top_k + 2, "observers": 0}
    return sizes[section.codec]


def facts(section: Relabel) -> dict[str, Any]:
    """The codec as manifests name it."""
    return {"codec": section.codec, **({"top_k": section.top_k} if section.codec == "top_k" else {})}


def described(soft: dict[str, Any], classes: int) -> list[tuple[str, str]]:
    """The label columns of a set for readers, each with its meaning; `soft` is `soft_labels` of its manifest."""
    return {
        "dense": [("soft_label", f"mean logits, {classes} values, float16")],
        "int8": [
            ("soft_label", f"mean logits in steps of `scale`, {classes} values, int8"),
            ("scale", "one step, float16: logits are `soft_label * scale`"),
        ],
        "top_k": [
            ("indices", f"classes of the {soft.get('top_k')} largest mean logits, largest first, int16"),
            ("values", "those logits, float16"),
            ("fill", "mean of all other logits, float16: what to read in their place where logits are learnt by MSE"),
        ],
        "observers": [],
    }[soft["codec"]]
