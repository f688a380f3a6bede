"""The card of a condensed set and its picture: rendered from the manifest and the recipe, with no facts of its own."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import DatasetCard, DatasetCardData
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from .recipe import Evaluation
from .tables import Written


_HERE = Path(__file__).parent
# in a wheel the template lies in the package, in a checkout beside it
TEMPLATE = (_HERE / "_shipped" if (_HERE / "_shipped").is_dir() else _HERE.parent) / "cards/card.md.jinja"

MARKS = ("<!-- results -->", "<!-- /results -->")

_EXAMPLE = """\
import timm, torch
from datasets import load_dataset
from torch.nn.functional import cross_entropy, mse_loss

ds = load_dataset("{repo}", "images", split="train").with_format("torch", ["image", "label", "soft_label"])
mean, std = torch.tensor({mean}).view(3, 1, 1), torch.tensor({std}).view(3, 1, 1)
net = timm.create_model("resnet18", num_classes={classes})
{stem}optimizer = torch.optim.AdamW(net.parameters(), lr={lr}, weight_decay={weight_decay})
for epoch in range({epochs}):
    for batch in torch.utils.data.DataLoader(ds, {batch}, shuffle=True):
        logits = net((batch["image"] / 255 - mean) / std)
        loss = mse_loss(logits, batch["soft_label"]) + {ce_weight} * cross_entropy(logits, batch["label"])
        optimizer.zero_grad(), loss.backward(), optimizer.step()"""
_SMALL_STEM = "net.conv1, net.maxpool = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False), torch.nn.Identity()\n"
_REPLAY = """\
from edc_hub import CondensedSet

condensed = CondensedSet.load("{repo}")
views, logits = condensed.views(epoch=0)  # the columns above, and float32 logits
x = condensed.replay(epoch=0)  # the pixels the observers saw, float32 in [0, 1]"""


def example(manifest: dict[str, Any], evaluation: Evaluation, repo: str) -> str:
    """A student of the `images` configuration in ten lines of torch, by the protocol of the recipe."""
    return _EXAMPLE.format(
        repo=repo,
        mean=manifest["images"]["mean"],
        std=manifest["images"]["std"],
        classes=len(manifest["classes"]),
        stem=_SMALL_STEM if manifest["images"]["size"] <= 64 else "",
        **evaluation.model_dump(include={"lr", "weight_decay", "epochs", "batch", "ce_weight"}),
    )


def render(manifest: dict[str, Any], evaluation: Evaluation, data: dict[str, Written], repo: str) -> str:
    """The text of README.md.

    Args: data: the tables of each configuration; repo: what a reader gives to `load_dataset`.
    """
    images, soft, source = manifest["images"], manifest["soft_labels"], manifest["source"]
    count = images["count"]
    steps = {
        f"shuffle of {soft['shuffle']}x{soft['shuffle']} strips": soft["shuffle"],
        f"RandAugment ({soft['rand_augment']} operations of magnitude {soft['magnitude']})": soft["rand_augment"],
        f"RandomResizedCrop of {soft['crop_area'][0]:g} to {soft['crop_area'][1]:g} of the area": True,
        "flip": soft["flip"],
        {"none": "", "cutmix": "CutMix", "mixup": "MixUp"}[soft["mix"]]: soft["mix"] != "none",
    }
    control, name = manifest["control"], source["id"]
    condensed_by = f"condensed with the recipe `{manifest['method']}`"
    origin = {None: condensed_by, "initial": "the initial images of a run", "random": "real images drawn at random"}
    grid = "Each pair: the image it started from, and the condensed image" if control is None else "Some of the images"
    return DatasetCard.from_template(
        _metadata(manifest, data),
        template_path=str(TEMPLATE),
        manifest=manifest,
        title=_title(manifest),
        count=count,
        size=images["size"],
        soft=soft,
        source_link=f"[{name}](https://huggingface.co/datasets/{name})" if source["commit"] else name,
        origin=origin[control],
        grid_text=grid,
        bytes=amount,
        image_bytes=_total(manifest, "images"),
        label_bytes=_total(manifest, "soft_labels"),
        labelling=[observer["name"] for observer in manifest["observers"] if "relabel" in observer["roles"]],
        example=example(manifest, evaluation, repo),
        replay=_REPLAY.format(repo=repo),
        steps=" → ".join(step for step, used in steps.items() if used),
    ).content


def with_results(text: str, markdown: str) -> str:
    """The card `text` with `markdown` between the marks of its results; at its end where it has no marks."""
    begin, end = MARKS
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        before, after = f"{text.rstrip()}\n\n## Results\n\n", "\n"
    return f"{before}{begin}\n{markdown.strip()}\n{end}{after}"


def _title(manifest: dict[str, Any]) -> str:
    kind = {None: "condensed", "initial": "initial images", "random": "random images"}[manifest["control"]]
    return f"{manifest['name']}, {kind}, {manifest['ipc']} images per class"


def _metadata(manifest: dict[str, Any], data: dict[str, Written]) -> DatasetCardData:
    count, source = manifest["images"]["count"], manifest["source"]
    bounds = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M"}
    configs, infos = [], []
    for config, written in data.items():
        files = {path: file for path, file in manifest["files"].items() if path.startswith(f"{config}/")}
        configs.append(
            {
                "config_name": config,
                "data_files": [{"split": "train", "path": f"{config}/train-*.parquet"}],
                # datasets names its cache by the folder's basename and this block: the hash makes other data other
                "description": f"sha256:{manifest['configs'][config]}",
                **({"default": True} if config == "images" else {}),
            }
        )
        rows = sum(file["rows"] for file in files.values())
        infos.append(
            {
                "config_name": config,
                "features": written.features._to_yaml_list(),
                "splits": [{"name": "train", "num_bytes": written.memory, "num_examples": rows}],
                "download_size": sum(file["bytes"] for file in files.values()),
                "dataset_size": written.memory,
            }
        )
    return DatasetCardData(
        pretty_name=_title(manifest),
        license="other",
        task_categories=["image-classification"],
        tags=[
            "dataset-distillation",
            "dataset-condensation",
            "dataset-compression",
            "soft-labels",
            "synthetic",
            manifest["method"],
            f"ipc-{manifest['ipc']}",
        ],
        size_categories=[next((name for bound, name in bounds.items() if count < bound), "1M<n<10M")],
        source_datasets=[f"extended|{source['id']}" if source["commit"] else "extended"],
        annotations_creators=["machine-generated"],
        configs=configs,
        dataset_info=infos,
    )


def _total(manifest: dict[str, Any], config: str) -> int:
    return sum(file["bytes"] for path, file in manifest["files"].items() if path.startswith(f"{config}/"))


def amount(count: int) -> str:
    """A number of bytes for readers, `1.36 MB`."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def grid_rows(classes: int, ipc: int, *, pairs: bool) -> tuple[Tensor, tuple[int, int]]:
    """Which images a grid shows, int64 of rows * columns, and (rows, columns): a row a class, up to ten of them."""
    rows, columns = min(classes, 10), min(ipc, 5 if pairs else 10)
    spread = torch.linspace(0, classes - 1, rows).round().long()
    return (spread[:, None] * ipc + torch.arange(columns)).view(-1), (rows, columns)


def grid(pictures: list[Tensor], shape: tuple[int, int], path: Path) -> None:
    """Writes a PNG of `shape` (rows, columns) tiles; in a tile the images of every entry of `pictures` side by side.

    Each entry is uint8 (rows * columns, 3, s, s), in the order of `grid_rows`.
    """
    (rows, columns), size = shape, pictures[0].shape[-1]
    if size < 64:
        pictures = [interpolate(x, scale_factor=-(-64 // size), mode="nearest") for x in pictures]
    elif size > 128:
        pictures = [interpolate(x.float(), size=(112, 112), mode="area").round().to(torch.uint8) for x in pictures]
    tile = torch.nn.functional.pad(torch.cat(pictures, 3), (4, 4, 4, 4), value=255)
    tile = tile.view(rows, columns, *tile.shape[1:])
    sheet = tile.permute(0, 3, 1, 4, 2).reshape(rows * tile.shape[3], columns * tile.shape[4], 3)
    Image.fromarray(sheet.numpy()).save(path, "PNG", optimize=True)
