"""A run's observers as model repositories: a folder each, that timm, transformers or our recipes load."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import documents, networks, recipes, terms, weights
from . import manifest as manifests
from .errors import InputError
from .networks import Network
from .recipe import Recipe
from .section import Network as Section


STAGE = "observers"
TEMPLATE = terms.CARDS / "observers.md.jinja"
FACTS, WEIGHTS = weights.OURS, weights.FILES[0]


def write(made: Path, folder: Path, repo: str, *, dataset: str | None = None) -> dict[str, Path]:
    """Writes a new `folder/<observer>` for each observer of the set in the run or dataset folder `made`; returns the
    folders by their ids.

    The id of an observer is `<repo>-<observer>`. `model.safetensors` are the weights after the last epoch, the other
    snapshots are `snapshots/epoch-<n>.safetensors`. Equal runs give equal files.
    Args: dataset: id of the condensed set, for the cards.
    Errors: InputError where the set does not lie in the run that made it, or the weights are no longer beside that.
    """
    made = manifests.folder_of(made)
    manifest = manifests.read(made / "manifest.json")
    run = manifests.run_of(made, manifest["control"])
    own = manifests.there(run / "dataset").get("observers", []) if run else []
    hashes = {entry["name"]: entry["sha256"] for entry in own}
    if run is None or any(hashes.get(entry["name"]) != entry["sha256"] for entry in manifest["observers"]):
        raise InputError(
            f"observers: {made} does not lie in the run whose observers made it; publish it from there, or leave "
            "--observers out (hub.observers in a recipe)"
        )
    recipe = recipes.resolve(documents.load(run / "recipe.yaml"))
    sections = {net.name: net for net in recipe.observers.networks}
    written = {}
    snapshots: dict[str, list[dict[str, Any]]] = {}
    for entry in manifest["observers"]:
        snapshots.setdefault(entry["name"].partition("@")[0], []).append(entry)
    for name, used in snapshots.items():
        place, own = folder / name, f"{repo}-{name}"
        facts, states = _found(run, name, used)
        _write_one(place, own, recipe, sections[name], facts, states, manifest, dataset)
        shutil.copyfile(made / "recipe.yaml", place / "recipe.yaml")
        written[own] = place
    return written


def _found(run: Path, name: str, used: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[int, dict[str, Tensor]]]:
    """Facts and the states by epoch of the observer whose snapshots have the hashes that the manifest names."""
    wanted = {str(entry["epochs"]): entry["sha256"] for entry in used}
    for path in sorted((run.parent / "artifacts" / STAGE).glob("*.safetensors")):
        if path.stem.rpartition("-")[0] != name:
            continue
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["facts"])
            hashes = {epoch: snapshot["sha256"] for epoch, snapshot in facts["snapshots"].items()}
            if any(hashes.get(epoch) != sha for epoch, sha in wanted.items()):
                continue
            states: dict[int, dict[str, Tensor]] = {int(epoch): {} for epoch in hashes}
            for key in file.keys():
                epoch, _, tensor = key.partition("/")
                states[int(epoch)][tensor] = file.get_tensor(key)
        facts["roles"] = sorted({role for entry in used for role in entry["roles"]})
        return facts, dict(sorted(states.items()))
    raise InputError(
        f"{run}: the weights of observer '{name}' are not in {run.parent / 'artifacts' / STAGE}; run condense again"
    )


def _write_one(
    place: Path,
    repo: str,
    recipe: Recipe,
    section: Section,
    facts: dict[str, Any],
    states: dict[int, dict[str, Tensor]],
    manifest: dict[str, Any],
    dataset: str | None,
) -> None:
    place.mkdir(parents=True)
    last, snapshots = max(states), []
    for epoch, state in states.items():
        file = WEIGHTS if epoch == last else f"snapshots/epoch-{epoch}.safetensors"
        (place / file).parent.mkdir(exist_ok=True)
        save_file(state, place / file, metadata={"format": "pt"})  # transformers asks for the format
        snapshots.append({"file": file, "epochs": epoch, **facts["snapshots"][str(epoch)]})
    source = terms.UNKNOWN | manifest["source"]
    shown = {key: value for key, value in facts.items() if key not in ("classes", "snapshots")}
    shown |= {"classes": manifest["classes"], "snapshots": snapshots, "data": {"id": source["id"]}}
    shown["data"] |= {key: source[key] for key in ("name", "split", "commit", "fingerprint")}
    shown["train"] = section.train.model_dump() if section.train else None
    text = json.dumps({"format_version": "1.0", **shown}, indent=2, ensure_ascii=False) + "\n"
    (place / FACTS).write_text(text, encoding="utf-8")
    library = _configure(place, recipe, section, manifest["classes"])
    data = ModelCardData(
        license=source["license"],
        **{name: source[name] for name in ("license_name", "license_link") if source[name]},
        library_name=library or "edc_hub",
        pipeline_tag="image-classification",
        tags=["dataset-distillation", "observer", "image-classification"],
        datasets=[source["id"]] if source["commit"] else None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=f"{section.name}, observer of {manifest['name']}",
        arch=facts["arch"],
        facts=shown,
        source=source,
        source_link=f"[{source['id']}]({source['link']})" if source["link"] else source["id"],
        repo=repo,
        dataset=dataset,
        library=library,
        entry=_entry(section, facts, repo),
    )
    (place / "README.md").write_text(card.content, encoding="utf-8")


def _configure(place: Path, recipe: Recipe, section: Section, names: list[str]) -> str | None:
    """Writes the config.json of the library whose network this is, and returns its name; None where it is no one's."""
    library = section.arch.partition("/")[0]
    if library not in ("timm", "transformers"):
        return None
    network = networks.described(section, len(names), seed=0, **recipe.source.face)
    if network.facts["stem"] != "standard":  # another network than the one that its configuration would build
        return None
    {"timm": _timm, "transformers": _transformers}[library](place, network, names)
    return library


def _timm(place: Path, network: Network, names: list[str]) -> None:
    from timm.models import save_for_hf

    facts = network.facts
    size = facts["input_size"] or facts["image_size"]
    data = {"input_size": (3, size, size), "mean": facts["mean"], "std": facts["std"], "crop_pct": 1.0}
    kept = {key: value for key, value in network.module.pretrained_cfg.items() if not key.startswith("test_")}
    network.module.pretrained_cfg = kept | data
    with tempfile.TemporaryDirectory() as beside:  # it writes weights too
        save_for_hf(network.module, beside, {"label_names": names}, safe_serialization=True)
        shutil.copyfile(Path(beside) / "config.json", place / "config.json")


def _transformers(place: Path, network: Network, names: list[str]) -> None:
    config = network.module.config
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    config.architectures = [type(network.module).__name__]
    config.save_pretrained(place)


def _entry(section: Section, facts: dict[str, Any], repo: str) -> str:
    """The lines of a recipe that load it."""
    entry = {"name": section.name, "arch": facts["arch"], "args": facts["args"], "stem": facts["stem"]}
    entry |= {"input_size": facts["input_size"], "mean": facts["mean"], "std": facts["std"], "weights": repo}
    entry = {key: value for key, value in entry.items() if value not in (None, {})}
    return documents.write({"observers": {"networks": [entry]}}).strip()
