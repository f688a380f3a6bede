"""Where an observer's weights come from: a Hub id, a folder, a safetensors file, a foreign `.pth`, torchvision."""

import hashlib
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RemoteEntryNotFoundError
from huggingface_hub.utils import httpx
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from . import disk
from .errors import InputError, first_line
from .networks import Network, transformers


OURS = "edc_hub.json"  # in what `observer_repo` wrote: model.safetensors is the state of our module
FILES = ("model.safetensors", "pytorch_model.bin")
FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights")
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")


class Weights(NamedTuple):
    """Weights that have been found but not yet read."""

    identity: str  # changes when the content does: a commit, a sha256 or torchvision's file name
    source: str  # for people: no local path but its last part
    read: Callable[[], Any]  # the state dictionary, perhaps wrapped


def find(arch: str, weights: str) -> Weights:
    """Finds what the key `weights` of an observer names. Reads no tensors; asks the Hub for the commit at most.

    `torchvision/IMAGENET1K_V1` is a member of torchvision's enum for the architecture, `org/name` or
    `org/name@revision` a Hub id, `org/name/folder/x.safetensors@revision` a file of it, anything else a file or
    folder. Raises InputError where there is nothing.
    """
    if weights.startswith("torchvision/"):
        return _torchvision(arch, weights)
    path = disk.local(weights, "weights")
    if path.is_dir():
        return _folder(arch, path)
    if path.is_file():
        return Weights(disk.sha256(path), path.name, lambda: _read(path))
    repo, name, revision = _on_hub(weights)
    if repo is None:
        raise InputError(f"weights: no file {weights}; give a Hub id (org/name), a .safetensors or a .pth file")
    return _hub_file(repo, name, revision) if name else _hub(arch, repo, revision)


def known(arch: str, weights: str) -> str:
    """What `find` would read, for people; of a Hub id it only asks whether it is there and downloads nothing.

    Raises InputError where there is nothing.
    """
    repo, name, revision = _on_hub(weights)
    if weights.startswith("torchvision/") or disk.local(weights, "weights").exists() or repo is None:
        return find(arch, weights).source
    is_theirs = arch.startswith(("transformers/", "timm/"))
    _fetch(repo, revision, (name,) if name else (OURS, "config.json") if is_theirs else FILES, dry_run=True)
    return weights


def _on_hub(weights: str) -> tuple[str | None, str | None, str | None]:
    """Repository, file in it and revision that the key may name; None where it names none."""
    if single := re.fullmatch(r"(\w[\w.-]*/[\w.-]+)/([\w./-]+\.safetensors)(?:@([\w./-]+))?", weights):
        return single[1], single[2], single[3]
    if Path(weights).suffix in FILE_SUFFIXES or not re.fullmatch(r"\w[\w.-]*/[\w.-]+(@[\w./-]+)?", weights):
        return None, None, None
    repo, _, revision = weights.partition("@")
    return repo, None, revision or None


def _torchvision(arch: str, weights: str) -> Weights:
    if arch == "convnext_tiny":
        raise InputError(f"weights: {weights} is not for {arch}, which is timm's; write arch: torchvision/{arch}")
    member, name = weights.removeprefix("torchvision/"), arch.removeprefix("torchvision/")
    if arch == "shufflenet_v2":
        name = "shufflenet_v2_x0_5"
    try:
        known = torchvision.models.get_model_weights(name)
    except ValueError:
        raise InputError(f"weights: torchvision has no weights for {name}; give a Hub id or a file") from None
    if member not in known.__members__:
        there = ", ".join(f"torchvision/{m}" for m in known.__members__)
        raise InputError(f"weights: no {weights} for {name}; there are: {there}")
    chosen = known[member]

    def read() -> dict[str, Tensor]:
        try:
            return torchvision.models.get_model(name, weights=chosen, progress=False).state_dict()
        except OSError as error:
            raise InputError(f"weights: cannot download {chosen.url} ({error}); give a file") from error

    return Weights(chosen.url.rpartition("/")[2], f"torchvision/{chosen.name}", read)


def _folder(arch: str, folder: Path) -> Weights:
    parts = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".json") and p.is_file())
    identity = hashlib.sha256("".join(f"{p.name}:{disk.sha256(p)}\n" for p in parts).encode()).hexdigest()
    if (folder / OURS).is_file() and (folder / FILES[0]).is_file():
        return Weights(identity, folder.name, lambda: _read(folder / FILES[0]))
    if arch.startswith("transformers/"):
        return Weights(identity, folder.name, lambda: _transformers(str(folder)))
    if arch.startswith("timm/") and (folder / "config.json").exists():
        return Weights(identity, folder.name, lambda: _timm(f"local-dir:{folder}"))
    files = [folder / name for name in FILES if (folder / name).exists()]
    if files:
        return Weights(identity, folder.name, lambda: _read(files[0]))
    raise InputError(f"weights: {folder} holds neither {' nor '.join(FILES)}; name the file itself")


def _hub(arch: str, repo: str, revision: str | None) -> Weights:
    library = arch.partition("/")[0] if arch.startswith(("transformers/", "timm/")) else None
    file = _fetch(repo, revision, (OURS, "config.json") if library else FILES)
    commit = file.parent.name  # …/snapshots/<commit>/<file>
    if file.name == OURS:
        return _hub_file(repo, FILES[0], commit)
    read = {
        "transformers": lambda: _transformers(repo, revision=commit),
        "timm": lambda: _timm(f"hf-hub:{repo}@{commit}"),
        None: lambda: _read(file),
    }[library]
    return Weights(f"{repo}@{commit}", f"{repo}@{commit}", read)


def _hub_file(repo: str, name: str, revision: str | None) -> Weights:
    file = _fetch(repo, revision, (name,))
    commit = file.parents[name.count("/")].name
    return Weights(f"{repo}/{name}@{commit}", f"{repo}/{name}@{commit}", lambda: _read(file))


def _fetch(repo: str, revision: str | None, names: tuple[str, ...], *, dry_run: bool = False) -> Path:
    """The first of `names` that the repository holds, downloaded; with `dry_run` where it would be."""
    for name in names:
        try:
            found = hf_hub_download(repo, name, revision=revision, dry_run=dry_run)
            return Path(found.local_path if dry_run else found)
        except HFValidationError as error:
            raise InputError(f"weights: '{repo}' is no file and no Hub id (org/name)") from error
        except RemoteEntryNotFoundError:
            continue
        except (OSError, httpx.HTTPError) as error:
            if isinstance(error, LocalEntryNotFoundError) and name != names[-1]:
                continue  # without a network: what the cache has
            reason = first_line(error)
            raise InputError(f"weights: cannot get {repo} from the Hub ({reason}); check it or give a file") from error
    raise InputError(f"weights: {repo} has no {' or '.join(names)} on the Hub; download its weights and name the file")


def _transformers(name: str, **options: Any) -> dict[str, Tensor]:
    try:
        return transformers().AutoModelForImageClassification.from_pretrained(name, **options).state_dict()
    except (OSError, ValueError) as error:
        raise InputError(f"weights: {name}: {first_line(error)}; give an image classifier") from error


def _timm(name: str) -> dict[str, Tensor]:
    import timm

    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except (OSError, RuntimeError, KeyError) as error:
        raise InputError(f"weights: {name}: {first_line(error)}; give a repository that timm made") from error


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise InputError(f"weights: {path} is no whole safetensors file ({error}); fetch it again") from error
    except Exception as error:  # torch.load reports refused objects, truncation and other formats each in its own way
        raise InputError(
            f"weights: {path} holds more than tensors or is damaged ({type(error).__name__}); where you trust "
            "it, save its state_dict with safetensors.torch.save_file and give that file"
        ) from error


def load_into(network: Network, found: Weights, *, new_head: bool = False) -> None:
    """Reads the weights into `network.module`.

    Common wrappers ({"state_dict": …}, "module." before every key) are taken off. With `new_head` a classifier layer
    of another width keeps its random weights. Raises InputError naming the first keys that do not fit.
    """
    own = network.module.state_dict()
    state = _unwrap(found.read(), own, found.source)
    head = network.classifier
    for key in (f"{head}.weight", f"{head}.bias"):
        if key in own and key in state and len(own[key]) != len(state[key]):
            if not new_head:
                raise InputError(
                    f"weights: {found.source} has a classifier {key} of shape {list(state[key].shape)}, the source "
                    f"asks for {list(own[key].shape)}; a train section fine-tunes it with a new one"
                )
            state[key] = own[key]
    try:
        network.module.load_state_dict(state)
    except RuntimeError as error:  # a line for all keys that are missing, one for those too many, one for each shape
        said = "; ".join(textwrap.shorten(line, 120, placeholder=" …") for line in str(error).splitlines()[1:4])
        facts = network.facts
        raise InputError(
            f"weights: {found.source} does not fit {facts['arch']} with args {facts['args']} and the "
            f"{facts['stem']} stem ({said}); correct arch, args or stem"
        ) from error


def _unwrap(state: Any, own: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    while isinstance(state, dict) and (inner := [k for k in WRAPPERS if isinstance(state.get(k), dict)]):
        state = state[inner[0]]
    tensors = isinstance(state, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    if not tensors or not state:
        raise InputError(f"weights: {source} holds no state dictionary of tensors; save model.state_dict()")
    state = dict(state)
    while prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in state)), None):
        if any(key.startswith(prefix) for key in own):
            break
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def digest(state: dict[str, Tensor]) -> str:
    """sha256 of a state dictionary: of its names, types, shapes and bytes, in the order of the names."""
    total = hashlib.sha256()
    for key in sorted(state):
        tensor = state[key].detach().cpu().contiguous()
        total.update(f"{key}:{tensor.dtype}:{list(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
