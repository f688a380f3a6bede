"""A step of fixed shapes as one CUDA graph: recorded once, then replayed by a single launch instead of hundreds.

Batches of this field are small: a GPU takes a millisecond or two for a step whose launches take Python ten.
"""

import gc
import warnings
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


PLAIN = 3  # calls before a recording, in which libraries and optimisers allocate what it must find there


Output = Tensor | tuple[Tensor, ...]


class _Recording(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor | None]
    output: Output


class Recorded:
    """`function` of tensors on a CUDA device, replayed for inputs of shapes that it was recorded with.

    It must do the same work at every call: what it reads besides its inputs (weights, a learning rate) are tensors
    that stay where they are. One whose values Python waits for cannot be replayed, and runs as it is. Results are the
    function's own: the same kernels run on the same numbers.
    """

    def __init__(
        self,
        function: Callable[..., Output],
        device: torch.device,
        *,
        enabled: bool = True,
        pool: tuple[int, int] | None = None,
    ):
        """Args: function: of tensors or None, returns a tensor or several. enabled: on a CUDA device; on others never.
        pool: memory of recordings that never run at the same time, for all of them as much as the largest takes; who
        shares it collects garbage before.
        """
        self._function, self.enabled, self._pool = function, enabled and device.type == "cuda", pool
        self._recordings: dict[tuple, _Recording] = {}
        self._plain: Counter[tuple] = Counter()

    def __call__(self, *inputs: Tensor | None) -> Output:
        """What `function` returns for these inputs."""
        if not self.enabled:
            return self._function(*inputs)
        shapes = tuple(x is not None and (x.shape, x.stride(), x.dtype) for x in inputs)
        if shapes not in self._recordings:
            self._plain[shapes] += 1
            if self._plain[shapes] < PLAIN:
                return self._function(*inputs)
            if self._plain[shapes] == PLAIN:
                return self._watched(inputs)
            self._recordings[shapes] = self._record(inputs)
        recording = self._recordings[shapes]
        for place, x in zip(recording.inputs, inputs, strict=True):
            if x is not None:
                place.copy_(x)
        recording.graph.replay()
        output = recording.output
        return tuple(one.clone() for one in output) if isinstance(output, tuple) else output.clone()

    def _watched(self, inputs: tuple[Tensor | None, ...]) -> Output:
        """A plain call that finds out whether Python waits for the device: a recording would break off there."""
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                output = self._function(*inputs)
            finally:
                torch.cuda.set_sync_debug_mode(before)
        self.enabled = not any("called a synchronizing CUDA operation" in str(one.message) for one in caught)
        return output

    def _record(self, inputs: tuple[Tensor | None, ...]) -> _Recording:
        """Records the function, which does not run it."""
        kept = [x if x is None else x.clone() for x in inputs]
        graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
        if self._pool is None:
            gc.collect()  # recordings of work that is over
        gc.disable()  # what it frees would be freed inside the recording
        try:
            # another thread decodes images meanwhile
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                output = self._function(*kept)
        finally:
            if collects:
                gc.enable()
        return _Recording(graph, kept, output)
