"""A step of fixed shapes as one CUDA graph: recorded once, then replayed by a single launch instead of hundreds.

Batches of this field are small: a GPU takes a millisecond or two for a step whose launches take Python ten.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor


PLAIN = 3  # calls before the recording, in which libraries and optimisers allocate what a recording must find there


class Recorded:
    """`function` of tensors on a CUDA device, replayed for inputs of the shapes that it was recorded with.

    It must do the same work at every call: what it reads besides its inputs (weights, a learning rate) are tensors
    that stay where they are, and Python sees none of their values. Inputs of other shapes, and functions that cannot
    be recorded, run as they are. Results are the function's own: the same kernels run on the same numbers.
    """

    def __init__(self, function: Callable[..., Tensor], device: torch.device, *, enabled: bool = True):
        """Args: function: of tensors or None, returns one tensor. enabled: on a CUDA device; on others never."""
        self._function, self._enabled = function, enabled and device.type == "cuda"
        self._graph: torch.cuda.CUDAGraph | None = None
        self._signature: tuple | None = None
        self._plain = 0

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        """What `function` returns for these inputs."""
        if not self._enabled:
            return self._function(*inputs)
        signature = tuple(x is not None and (x.shape, x.stride(), x.dtype) for x in inputs)
        if signature != self._signature and self._graph is None:
            self._signature, self._plain = signature, 0
        if signature != self._signature:
            return self._function(*inputs)
        if self._graph is None and self._plain < PLAIN:
            self._plain += 1
            return self._function(*inputs)
        if self._graph is None and not self._record(inputs):
            return self._function(*inputs)
        for place, x in zip(self._inputs, inputs, strict=True):
            if x is not None:
                place.copy_(x)
        self._graph.replay()
        return self._output.clone()

    def _record(self, inputs: tuple[Tensor | None, ...]) -> bool:
        """Records the function, which does not run it; False where it cannot be recorded."""
        self._inputs = [x if x is None else x.clone() for x in inputs]
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # another thread decodes images meanwhile
                self._output = self._function(*self._inputs)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            warnings.warn(f"a step runs without a CUDA graph, as it cannot be recorded: {reason}", stacklevel=3)
            self._enabled = False
            return False
        self._graph = graph
        return True
