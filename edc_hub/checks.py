"""The checks of `edc-hub doctor`. None raises, none shows anything of the token, none downloads a set or weights."""

import importlib.metadata
import os
import platform
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import get_session

from . import __version__, launch
from .errors import InputError
from .hub_errors import writable
from .recipe import Recipe


ROOM = 2 * 10**9  # bytes below which none but the smallest runs end


class Finding(NamedTuple):
    """The outcome of one check. `remedy` says what to do; it is empty where all is well."""

    name: str
    text: str
    remedy: str = ""


def versions() -> Iterator[Finding]:
    """What is installed of what pyproject.toml asks for."""
    yield Finding("edc_hub", f"{__version__}, python {platform.python_version()}, {platform.platform(terse=True)}")
    try:
        asked = importlib.metadata.requires("edc-hub") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("versions", "not known: edc_hub is not installed", "run `pip install -e .` in its folder")
        return
    found, wrong = [], []
    for name, oldest in re.findall(r"^([\w-]+)>=([\d.]+)$", "\n".join(asked), re.MULTILINE):
        try:
            there = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            there = "missing"
        found.append(f"{name} {there}")
        if there == "missing" or _numbers(there) < _numbers(oldest):
            wrong.append(f"'{name}>={oldest}'")
    yield Finding("versions", ", ".join(found), f"pip install --upgrade {' '.join(wrong)}" if wrong else "")


def _numbers(text: str) -> list[int]:
    """The release of a version: [2, 15, 0] of 2.15.0+cu132 and of 2.15.0rc1."""
    return [int(part) for part in re.match(r"[\d.]*\d|", text).group().split(".") if part]


def devices(recipe: Recipe | None) -> Iterator[Finding]:
    """Processors and accelerators, and whether the recipe's device is among them."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("cpu", f"{platform.processor() or platform.machine()}, {cores} cores")
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        named = ", ".join(f"{card.name} {card.total_memory / 2**30:.0f} GiB" for card in cards)
        yield Finding("gpu", f"{named} (torch {torch.__version__})")
    elif shutil.which("nvidia-smi"):
        text = f"torch {torch.__version__} sees none, though NVIDIA's tools are here"
        yield Finding("gpu", text, "install the torch for this driver's CUDA (pytorch.org), or update the driver")
    elif recipe and recipe.device == "cuda":
        yield Finding("gpu", "none, and the recipe asks for cuda", "write --device auto or --device cpu")
    else:
        yield Finding("gpu", "none; networks run on the CPU")


def hub() -> Iterator[Finding]:
    """Whether the Hub answers, how files would go there, and whether the token may write."""
    offline = constants.HF_HUB_OFFLINE
    yield _offline() if offline else _endpoint()
    yield _xet()
    try:
        token = get_token()
    except OSError as error:
        yield Finding("token", f"{constants.HF_TOKEN_PATH}: {error.strerror}", "make it readable, or set HF_TOKEN")
        return
    if token is None:
        yield Finding("token", "none", "publishing and private sets need one: run `hf auth login` or set HF_TOKEN")
    elif offline:
        yield Finding("token", "there, not checked", "unset HF_HUB_OFFLINE to check it")
    else:
        yield _token()


def _offline() -> Finding:
    remedy = "unset it to download or publish; without, what is in the cache works"
    return Finding("endpoint", f"{constants.ENDPOINT}, and HF_HUB_OFFLINE is set", remedy)


def _endpoint() -> Finding:
    remedy = "check the network, HTTPS_PROXY and HF_ENDPOINT; with HF_HUB_OFFLINE=1 what is in the cache works"
    try:
        status = get_session().get(f"{constants.ENDPOINT}/api/datasets?limit=1", timeout=20).status_code
    except Exception as error:  # of whichever HTTP library
        return Finding("endpoint", f"{constants.ENDPOINT} does not answer ({type(error).__name__})", remedy)
    if status >= 500:
        return Finding("endpoint", f"{constants.ENDPOINT} answers HTTP {status}", "try again later")
    return Finding("endpoint", f"{constants.ENDPOINT} answers")


def _xet() -> Finding:
    try:
        text = f"hf_xet {importlib.metadata.version('hf_xet')}"
    except importlib.metadata.PackageNotFoundError:
        return Finding("xet", "not installed; files go over plain HTTP")
    if constants.HF_HUB_DISABLE_XET:
        return Finding("xet", f"{text}, off: HF_HUB_DISABLE_XET is set")
    if constants.ENDPOINT == constants._HF_DEFAULT_ENDPOINT:
        return Finding("xet", f"{text}, on")
    remedy = "set HF_HUB_DISABLE_XET=1, unless that Hub is known to speak xet: uploads to one that does not fail"
    return Finding("xet", f"{text}, on, and HF_ENDPOINT is not {constants._HF_DEFAULT_ENDPOINT}", remedy)


def _token() -> Finding:
    try:
        known = HfApi().whoami()
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            return Finding("token", "refused", "it is wrong or has expired: run `hf auth login`, or mend HF_TOKEN")
        return Finding("token", f"cannot be checked (HTTP {status})", "try again later")
    except Exception as error:  # of whichever HTTP library
        return Finding("token", f"cannot be checked ({type(error).__name__})", "see the endpoint's line")
    access = known.get("auth", {}).get("accessToken", {})
    role, text = access.get("role", "unknown"), f"of {known.get('name')}, role {access.get('role', 'unknown')}"
    if role == "fineGrained":
        names = writable(access)
        text, role = f"{text}, writes to: {', '.join(names) or 'nothing'}", "write" if names else role
    place = f"{constants.ENDPOINT}/settings/tokens"
    remedy = f"publishing needs one that may write: make it at {place}, then run `hf auth login`"
    return Finding("token", text, "" if role == "write" else remedy)


def disk(recipe: Recipe | None) -> Iterator[Finding]:
    """Room where runs, downloads and prepared sets go, and whether one may write there."""
    import datasets

    runs = launch.artifacts(recipe).parent if recipe else Path("runs")
    caches = Path(constants.HF_HUB_CACHE), Path(datasets.config.HF_DATASETS_CACHE)
    for name, place in zip(("runs", "hub cache", "data cache"), (runs, *caches), strict=True):
        elsewhere = "write --output_dir on another disk" if name == "runs" else "set HF_HOME to another disk"
        there = Path(os.path.expanduser(place)).absolute()
        there = next(folder for folder in (there, *there.parents) if os.path.exists(folder))
        free = shutil.disk_usage(there).free
        if not (there.is_dir() and os.access(there, os.W_OK)):
            yield Finding(name, f"{place} cannot be written", elsewhere)
        else:
            little = free < ROOM
            yield Finding(name, f"{place}: {free / 1e9:.1f} GB free", f"free some, or {elsewhere}" if little else "")


def inputs(recipe: Recipe) -> Iterator[Finding]:
    """Whether the recipe's source has its splits, and its observers their weights."""
    from . import source, weights

    section = recipe.source
    try:
        opened = source.Opened(section)
        at = f" at commit {opened.commit[:12]}" if opened.commit else ""
        text, remedy = f"{opened.id}{at}: splits {', '.join(opened.splits)}", ""
        for key, split in (("train_split", section.train_split), ("test_split", section.test_split)):
            if split not in opened.splits:
                text, remedy = f"{text}, but no '{split}'", f"write another source.{key}"
        yield Finding("source", text, remedy)
    except InputError as error:
        yield _refused("source", error)
    for net in recipe.observers.networks:
        try:
            if net.weights:
                yield Finding("weights", f"{net.name}: {weights.known(net.arch, net.weights)}")
        except InputError as error:
            yield _refused("weights", error)


def _refused(name: str, error: InputError) -> Finding:
    """An InputError says what is wrong, a semicolon, and what to do."""
    text, found, remedy = str(error).rpartition("; ")
    return Finding(name, text, remedy) if found else Finding(name, remedy, "change this key of the recipe")
