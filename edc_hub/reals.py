"""Real images as rivals of a condensed set: all of them, or as many as fill its bytes."""

import psutil
import torch
from torch import Tensor

from . import encoding, launch, work
from .errors import InputError
from .realset import RealSet
from .recipe import Images


FEW = 256  # images whose files tell how large the others are


def equal_bytes(real: RealSet, budget: int, section: Images, seed: int) -> tuple[Tensor, int]:
    """Random real images, of each class as many or one more, whose files fill `budget` bytes; one a class at least.

    Returns their rows and the bytes of their files.
    """
    generator = work.generator(seed, "students", "real images of equal bytes")
    orders = [real.rows(label) for label in range(len(real.names))]
    orders = [rows[torch.randperm(len(rows), generator=generator)] for rows in orders]
    turn = torch.cat([torch.arange(len(rows)) for rows in orders])
    turns = torch.cat(orders)[turn.argsort(stable=True)]  # one of each class, then the next of each
    sizes: list[int] = []
    ahead = FEW
    while len(sizes) < len(turns) and (sum(sizes) <= budget or len(sizes) < len(orders)):
        real.keep(turns[:ahead])  # a stream is read once for all of them
        for rows in turns[len(sizes) : ahead].split(FEW):
            sizes += map(len, encoding.encode(real.images(rows), section))
        ahead = max(len(orders), int(1.05 * len(sizes) * budget / sum(sizes))) + FEW  # by what they took so far
    fit = int((torch.tensor(sizes).cumsum(0) <= budget).sum())
    count = max(fit, len(orders))
    return turns[:count], sum(sizes[:count])


def check_memory(
    real: RealSet, *, whole: bool, budget: int, section: Images, trainings: int, device: torch.device
) -> None:
    """Raises InputError where images do not fit in memory, once in each process that trains on them.

    Args: whole: all of them are wanted, and not those of `budget` bytes alone; trainings: of students on real images.
    """
    rows = real.rows()
    refused = _beyond(len(rows), real.size, trainings, device)
    if refused and whole:
        raise InputError(f"upper_bound: the real set {refused}; leave it out, or use a machine with more")
    if refused:  # the files of a few images tell how many there will be
        files = encoding.encode(real.images(rows[:FEW]), section)
        count = min(len(rows), budget * len(files) // sum(map(len, files)))
        if refused := _beyond(count, real.size, trainings, device):
            what = "as much of the real set as fits in the set's bytes"
            raise InputError(f"controls: {what} {refused}; leave out real, or use a machine with more")


def _beyond(count: int, side: int, trainings: int, device: torch.device) -> str | None:
    size = count * 3 * side**2
    needed, free = size * min(launch.local_processes(), trainings), psutil.virtual_memory().available
    if device.type == "cuda" and (on_device := torch.cuda.mem_get_info(device)[0]) < size:
        needed, free = size, on_device
    if needed <= free:
        return None
    return f"takes {needed / 1e9:.1f} GB of memory at {side} px and {free / 1e9:.1f} GB are free"
