"""The card of a condensed set and its picture: rendered from the manifest and the recipe, with no facts of its own."""

import functools
import re
from pathlib import Path
from typing import Any

import jinja2
import torch
import yaml
from huggingface_hub import DatasetCard, DatasetCardData
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.utils import make_grid

from . import codecs, disk, documents, recipes, report, results, snippets, terms
from . import manifest as manifests
from .errors import InputError
from .recipe import Evaluation
from .tables import Written
from .versions import OBSERVERS


TEMPLATE = terms.CARDS / "card.md.jinja"
_BLOCKS = ("configs", "dataset_info")
_LICENSE = ("license", "license_name", "license_link")


def render(
    manifest: dict[str, Any],
    evaluation: Evaluation,
    repo: str,
    *,
    data: dict[str, Written] | None = None,
    old: str | None = None,
    measured: dict[str, Any] | None = None,
    published: dict[str, Any] | None = None,
) -> str:
    """The text of README.md; what a person added to the card that it replaces is in it again.

    Args: repo: what a reader gives to `load_dataset`; data: the tables of each configuration, `old` names them where
    not given; measured: the content of results.json; published: that of OBSERVERS.
    """
    if data is None:
        blocks = {name: value for name, value in _read(old).data.to_dict().items() if name in _BLOCKS}
    else:
        blocks = _configurations(manifest, data)
    made = _rendered(_metadata(manifest, blocks), manifest, evaluation, repo, measured or {}, published or {})
    return made if old is None else kept(made, old)


def again(folder: Path) -> None:
    """Writes the card of a run's dataset folder, where it has one, with what its results.json says by now."""
    readme = folder / "README.md"
    if readme.is_file():
        evaluation = recipes.resolve(documents.load(folder / "recipe.yaml")).evaluation
        measured, published = (disk.json_of(folder / name) for name in ("results.json", OBSERVERS))
        given = {"old": readme.read_text("utf-8"), "measured": measured, "published": published}
        text = render(manifests.read(folder / "manifest.json"), evaluation, f"./{folder.name}", **given)
        disk.write_text(readme, text)


def _read(text: str) -> DatasetCard:
    """A card that a person may have changed. Raises InputError where its metadata cannot be read."""
    try:
        return DatasetCard(text, ignore_metadata_errors=True)
    except (yaml.YAMLError, ValueError) as error:
        raise InputError("README.md: its metadata is broken YAML; correct it, between the lines of ---") from error


def _rendered(
    metadata: DatasetCardData,
    manifest: dict[str, Any],
    evaluation: Evaluation,
    repo: str,
    measured: dict[str, Any],
    published: dict[str, Any],
) -> str:
    soft, source = manifest["soft_labels"], terms.UNKNOWN | manifest["source"]
    steps = {
        f"shuffle of {soft['shuffle']}x{soft['shuffle']} strips": soft["shuffle"],
        f"RandAugment ({soft['rand_augment']} operations of magnitude {soft['magnitude']})": soft["rand_augment"],
        f"RandomResizedCrop of {soft['crop_area'][0]:g} to {soft['crop_area'][1]:g} of the area": True,
        "flip": soft["flip"],
        {"none": "", "cutmix": "CutMix", "mixup": "MixUp"}[soft["mix"]]: soft["mix"] != "none",
    }
    control, name, citations = manifest["control"], source["id"], terms.citations(manifest["method"])
    condensed_by = f"condensed with the recipe `{manifest['method']}`"
    if "origin" in manifest:
        condensed_by = f"the images of {manifest['origin']['id']} labelled anew"
    origin = {None: condensed_by, "initial": "the initial images of a run", "random": "real images drawn at random"}
    grid = "Each pair: the image it started from, and the condensed image"
    grid = "Some of the images" if control or "origin" in manifest else grid
    made = _template().render(
        card_data=metadata.to_yaml(),
        manifest=manifest,
        title=_title(manifest),
        cited=_cited(manifest, source, citations),
        citations=citations,
        source=source,
        source_link=f"[{name}]({source['link']})" if source["link"] else name,
        origin=origin[control],
        grid_text=grid,
        bytes=results.amount,
        configs=_sizes(manifest),
        labelling=[observer["name"] for observer in manifest["observers"] if "relabel" in observer["roles"]],
        repo=repo,
        results=report.markdown(measured) if "students" in measured else "",
        prefixes=report.prefixes(measured, snippets.digest(manifest, evaluation)),
        example=snippets.example(manifest, evaluation, repo),
        label_columns=codecs.described(soft, len(manifest["classes"])),
        pinned=f" --source.revision {source['commit']}" if source["commit"] else "",
        published=published,
        steps=" → ".join(step for step, used in steps.items() if used),
    )
    return made.rstrip() + "\n"  # Jinja drops the last line's end


@functools.cache  # a run writes a card for each of its controls, and compiling takes longer than rendering
def _template() -> jinja2.Template:
    return jinja2.Template(TEMPLATE.read_text("utf-8"))


def _cited(manifest: dict[str, Any], source: dict[str, Any], citations: list[str]) -> str:
    """Who is to be cited, in words; the BibTeX that is known, `citations`, stands below them."""
    whole = ["the source" if source["citation"] else f"the source, {source['id']}, as its authors ask"]
    method = manifest["method"]
    if "origin" in manifest:
        whole.append(f"{manifest['origin']['id']}, whose images these are, as its authors ask")
    elif method.partition("-")[0] not in ("edc", "random"):
        whole.append("the method" if len(citations) > 1 else f"the method, {method}, as its authors ask")
    return f"{', '.join(whole)} and EDC, whose pipeline this is"


def kept(text: str, old: str) -> str:
    """The card `text` with the sections, metadata keys and tags that a person added to the card `old`.

    A section is a person's if its heading is none of the template's; it comes behind the section it stood behind. A
    tag is, if no card of ours would have it. A license in `old` stands where the source states none.
    """
    new, theirs = DatasetCard(text), _read(old)
    data, added = new.data.to_dict(), theirs.data.to_dict()
    license = {name: value for name in _LICENSE if (value := added.pop(name, None))}
    if data["license"] == "unknown":
        data |= license
    methods = {*recipes.methods(), "relabel"}  # a set of another method or size was here
    tags = added.get("tags") or []
    tags = map(str, tags if isinstance(tags, list) else [tags])  # as a person may write them
    tags = [tag for tag in tags if tag not in methods and not re.fullmatch(r"ipc-\d+", tag)]
    data["tags"] = list(dict.fromkeys([*data["tags"], *tags]))
    data |= {name: value for name, value in added.items() if name not in data}
    sections, known = _sections(new.text), set(_sections(TEMPLATE.read_text(encoding="utf-8")))
    names, last = list(sections), ""
    for name, content in _sections(theirs.text).items():
        if name not in known and name not in sections:
            sections[name] = content
            names.insert(names.index(last) + 1, name)
        last = name if name in sections else last
    new.data = DatasetCardData(**data)
    new.text = "\n".join(sections[name].strip("\n") + "\n" for name in names)
    return new.content


def _sections(text: str) -> dict[str, str]:
    """The parts of a Markdown text by their `## ` headings, heading included; what stands before the first by ''."""
    parts: dict[str, str] = {"": ""}
    name, fence = "", ""
    for line in text.splitlines(keepends=True):
        if fence:  # closed by at least as many of its characters
            fence = "" if re.fullmatch(rf" {{0,3}}{fence}{fence[0]}*\s*", line) else fence
        elif opened := re.match(r" {0,3}(`{3,}(?=[^`]*$)|~{3,})", line):
            fence = opened[1]
        elif line.startswith("## "):
            name = line.strip()
        parts[name] = parts.get(name, "") + line
    return parts


def _title(manifest: dict[str, Any]) -> str:
    kind = {None: "condensed", "initial": "initial images", "random": "random images"}[manifest["control"]]
    kind = "relabelled" if "origin" in manifest else kind
    images = "1 image" if manifest["ipc"] == 1 else f"{manifest['ipc']} images"
    return f"{manifest['name']}, {kind}, {images} per class"


def _configurations(manifest: dict[str, Any], data: dict[str, Written]) -> dict[str, Any]:
    """The blocks `configs` and `dataset_info` of the metadata."""
    configs, infos, sizes = [], [], _sizes(manifest)
    for config, written in data.items():
        configs.append(
            {
                "config_name": config,
                "data_files": [{"split": "train", "path": f"{config}/train-*.parquet"}],
                # datasets names its cache by the folder's basename and this block: the hash makes other data other
                "description": f"sha256:{manifest['configs'][config]}",
                **({"default": True} if config == "images" else {}),
            }
        )
        split = {"name": "train", "num_bytes": written.memory, "num_examples": sizes[config]["rows"]}
        infos.append(
            {
                "config_name": config,
                "features": written.features._to_yaml_list(),
                **({"splits": [split]} if config == "images" else {}),  # whoever filters label epochs has fewer rows
                "download_size": sizes[config]["bytes"],
                "dataset_size": written.memory,
            }
        )
    return dict(zip(_BLOCKS, (configs, infos), strict=True))


def _metadata(manifest: dict[str, Any], blocks: dict[str, Any]) -> DatasetCardData:
    count, source = manifest["images"]["count"], terms.UNKNOWN | manifest["source"]
    bounds = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M"}
    named = {name: source[name] for name in ("license_name", "license_link") if source[name]}
    return DatasetCardData(
        pretty_name=_title(manifest),
        license=source["license"],
        **named,
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
        **blocks,
    )


def _sizes(manifest: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Rows, files and bytes of each configuration."""
    found = {}
    for config in manifest["configs"]:
        files = [file for path, file in manifest["files"].items() if path.startswith(f"{config}/")]
        rows, size = (sum(file[key] for file in files) for key in ("rows", "bytes"))
        found[config] = {"rows": rows, "files": len(files), "bytes": size}
    return found


def grid_rows(classes: int, ipc: int, *, pairs: bool) -> tuple[Tensor, tuple[int, int]]:
    """Which images a grid shows, int64 of rows * columns, and (rows, columns): a row a class, up to ten of them."""
    rows, columns = min(classes, 10), min(ipc, 5 if pairs else 10)
    spread = torch.linspace(0, classes - 1, rows).round().long()
    return (spread[:, None] * ipc + torch.arange(columns)).view(-1), (rows, columns)


def grid(pictures: list[Tensor], shape: tuple[int, int], path: Path) -> None:
    """Writes a PNG of `shape` (rows, columns) tiles; in a tile the images of every entry of `pictures` side by side.

    Each entry is uint8 (rows * columns, 3, s, s), in the order of `grid_rows`.
    """
    size = pictures[0].shape[-1]
    if size < 64:
        pictures = [interpolate(x, scale_factor=-(-64 // size), mode="nearest") for x in pictures]
    elif size > 128:
        pictures = [interpolate(x.float(), size=(112, 112), mode="area").round().to(torch.uint8) for x in pictures]
    sheet = make_grid(torch.cat(pictures, 3), shape[1], padding=8, pad_value=255)[:, 4:-4, 4:-4]
    Image.fromarray(sheet.permute(1, 2, 0).numpy()).save(path, "PNG", optimize=True)
