"""The terms of a source: its license and how to cite it, from a table of well-known sets or from its own card."""

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import _CACHED_NO_EXIST, DatasetCard, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import RemoteEntryNotFoundError

from . import disk, documents, hub_errors, recipes
from .errors import InputError, first_line


CARDS = recipes.ROOT.parent / "cards"

UNKNOWN = {"license": "unknown", "license_name": None, "license_link": None, "link": None, "citation": None}


def of(source: str, path: str, commit: str | None) -> dict[str, Any]:
    """What a manifest says of a source's terms: the keys of UNKNOWN.

    Args: source: its id; path: `source.path`, perhaps a local folder; commit: of a Hub set, whose card is read there.
    A source that states no license gives `unknown`, and nothing is assumed in its place. Errors: InputError where
    there may be a card that cannot be reached.
    """
    known = documents.load(CARDS / "sources.yaml")
    pattern = next((key for key in known if key[0] == "*" and key[1:] in source.lower()), None)
    found = dict(UNKNOWN)
    if commit:
        found["link"] = f"https://huggingface.co/datasets/{source}"
    if source in known or pattern:
        return found | known.get(source, known.get(pattern))
    card = _card(source, path, commit)
    data = card.data.to_dict() if card else {}
    found |= {key: data[key] for key in UNKNOWN if key.startswith("license") and isinstance(data.get(key), str)}
    if isinstance(data.get("license"), list):
        found["license"] = data["license"][0] if len(data["license"]) == 1 else "other"
    if card and (cited := re.search(r"^```\w*\n(@\w+\{.*?)^```", card.text, re.DOTALL | re.MULTILINE)):
        found["citation"] = cited[1]
    return found


def citations(method: str) -> list[str]:
    """BibTeX of a method, where it is known, and of EDC."""
    known = documents.load(CARDS / "methods.yaml")
    return [known[name] for name in dict.fromkeys([method, "edc"]) if name in known]


def _card(source: str, path: str, commit: str | None) -> DatasetCard | None:
    """The source's own card; None where it has none, or one whose metadata nobody can read."""
    try:
        file = _download(source, commit) if commit else disk.local(path, "source.path") / "README.md"
        return DatasetCard.load(file) if file and file.is_file() else None
    except (ValueError, yaml.YAMLError):
        return None
    except OSError as error:
        raise InputError(
            f"source.path: the card of {source}, which states its license, cannot be read ({first_line(error)}); "
            "give the same command again once it can"
        ) from error


def _download(source: str, commit: str) -> Path | None:
    if try_to_load_from_cache(source, "README.md", revision=commit, repo_type="dataset") is _CACHED_NO_EXIST:
        return None  # known without a network
    try:
        options = {"repo_type": "dataset", "revision": commit}
        return Path(hub_errors.steady(lambda: hf_hub_download(source, "README.md", **options)))
    except RemoteEntryNotFoundError:
        return None
