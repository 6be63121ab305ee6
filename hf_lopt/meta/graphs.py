"""Steps as CUDA graphs: a function that works on tensors which stay where they are, recorded once and replayed.

The rules of capture are those of PyTorch's manual ("CUDA Graphs"): some calls on a side stream first, nothing that
waits for the device or depends on numbers of the host, inputs and state at fixed addresses, random numbers from the
CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor


WARMUP = 3


class Replayed:
    """Calls ``function``, from the fourth call on by replaying a CUDA graph of it.

    The calls before are as real as those after them. What it returns is overwritten by the next call. If it cannot be
    captured, a warning says so, and it is called as it is.

    Args:
        function: reads and writes the same tensors in every call, and depends on nothing else.
        device: the device of those tensors.
        enabled: whether to capture; without it, and on other devices than CUDA, ``function`` is called as it is.
    """

    def __init__(self, function: Callable[[], Tensor], device: torch.device, enabled: bool = True):
        self.function, self.device = function, device
        self.enabled = enabled and device.type == "cuda"
        self._replay: Callable[[], None] | None = None
        self._result: Tensor | None = None
        self._stream: torch.cuda.Stream | None = None
        self._calls = 0

    def __call__(self) -> Tensor:
        if not self.enabled:
            return self.function()
        if self._calls < WARMUP:
            self._calls += 1
            return self._aside()
        if self._replay is None:
            try:
                self._capture()
            except RuntimeError as error:
                self.enabled = False
                warnings.warn(f"steps go on without a CUDA graph, which failed with: {error}", stacklevel=2)
                return self.function()
        assert self._replay is not None and self._result is not None
        self._replay()
        return self._result

    def _aside(self) -> Tensor:
        """A call on another stream, where libraries set up what they need for it."""
        here = torch.cuda.current_stream(self.device)
        self._stream = aside = self._stream or torch.cuda.Stream(self.device)
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            result = self.function()
        here.wait_stream(aside)
        result.record_stream(here)
        return result

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as that of NCCL, may go on asking the device.
        with torch.cuda.device(self.device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = self.function()
        self._replay, self._result = graph.replay, result


def send(source: Tensor, target: Tensor) -> None:
    """Copy from the host into a tensor on a device, without waiting for it."""
    if target.device.type == "cuda":
        source = source.pin_memory()
    target.copy_(source, non_blocking=True)
