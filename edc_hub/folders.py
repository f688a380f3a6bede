"""Local folders that `datasets` reads: a cache for each state of a folder, and a fingerprint of its bytes."""

import hashlib
import os
from pathlib import Path

import datasets


EXACT = 2**30  # bytes up to which every byte is hashed; beyond, samples of up to 1,024 files
SAMPLE = 2**16


def cache() -> Path:
    """Where this project keeps what it reads through `datasets`."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "edc_hub"


def files(folder: Path) -> list[Path]:
    """Every file below `folder`, sorted; linked folders too, as `datasets` reads them. A link to nothing is none."""
    found, seen = [], set()
    for root, inside, names in os.walk(folder, followlinks=True):
        here = os.stat(root)
        if (here.st_dev, here.st_ino) in seen:  # a link to a folder above
            inside.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        inside.sort()
        found += [Path(root) / name for name in names]
    return sorted(file for file in found if file.exists())


def cache_of(folder: Path) -> Path:
    """The `cache_dir` for a local folder, keyed by its path and the sizes and modification times of its files.

    `datasets` builds its own key from the folder's basename and the globs in its README: two folders of one name, or
    one rewritten in place, would give the first one's rows.
    """
    folder = folder.resolve()
    key = hashlib.sha256(str(folder).encode())
    for file in files(folder):
        stat = file.stat()
        key.update(f"\0{file.relative_to(folder)}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
    return cache() / f"{folder.name}-{key.hexdigest()[:16]}"


def content(named: dict[str, Path]) -> str:
    """SHA-256 over names, sizes and bytes of files; beyond EXACT bytes, over samples of evenly spaced files."""
    named = dict(sorted(named.items()))
    sizes = {name: file.stat().st_size for name, file in named.items()}
    key = hashlib.sha256(repr(sizes).encode())
    exact = sum(sizes.values()) <= EXACT
    for name in list(named)[:: 1 if exact else -(-len(named) // 1024)]:
        with open(named[name], "rb") as file:
            if exact:
                key.update(hashlib.file_digest(file, "sha256").digest())
                continue
            for place in (0, sizes[name] // 2, max(sizes[name] - SAMPLE, 0)):
                file.seek(place)
                key.update(file.read(SAMPLE))
    return key.hexdigest()
