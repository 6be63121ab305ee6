"""The backends that the tests of the operators run on: each sends the operators to compiled kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from emulated import compiler, emulator
from hf_lopt.kernels import dispatch
from hf_lopt.kernels.arguments import Arguments


NO_GPU = "no GPU on this machine: not run"


@dataclass(frozen=True)
class Backend:
    """Where compiled kernels run.

    Attributes:
        name: an instruction set of the CPU, "emulated" for the CUDA kernels on the host, or "cuda".
        kind: whose calls it takes, "cpu" or "cuda".
        device: where its tensors are.
        large: shapes beside `SHAPES` that fill several tiles; the emulator takes smaller ones.
        examples: how many examples a property is tested with.
    """

    name: str
    kind: str
    device: str
    large: tuple[tuple[int, ...], ...]
    examples: int = 25

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """A context in which the operators run on this backend, where it supports a call."""
        if self.name == "emulated":
            with emulator().everywhere():
                yield
        elif self.kind == "cpu":
            before = torch.ops.hf_lopt.cpu_kernels("")
            torch.ops.hf_lopt.cpu_kernels(self.name)
            try:
                yield
            finally:
                torch.ops.hf_lopt.cpu_kernels(before)
        else:
            yield

    def supports(self, arguments: Arguments) -> bool:
        return dispatch.supports(arguments, self.kind)

    def overload(self, name: str):
        """The compiled operator itself, without the choice that precedes it."""
        emulated = self.name == "emulated" and emulator()
        return getattr(torch.ops.hf_lopt_emulated if emulated else torch.ops.hf_lopt, name).default


def instruction_sets() -> list[str]:
    """Those that this build has and this processor runs."""
    if not dispatch.loaded():
        return []
    best, found = torch.ops.hf_lopt.cpu_kernels(""), []
    for name in ("avx512", "avx2", "portable"):
        with contextlib.suppress(RuntimeError):
            found.append(torch.ops.hf_lopt.cpu_kernels(name))
    torch.ops.hf_lopt.cpu_kernels(best)
    return found


_CPU_LARGE = ((130,), (33, 70), (70, 33), (2, 9000), (9000, 2), (4100,))
_EMULATED_LARGE = ((130,), (33, 70), (70, 33), (2, 900), (600, 2), (300, 140), (2, 3, 200))
_GPU_LARGE = (*_CPU_LARGE, (700, 300), (300, 700))
_NO_EMULATOR = pytest.mark.skipif(compiler() is None, reason="no C++ compiler, or HF_LOPT_KERNELS=torch")
_NO_CUDA = pytest.mark.skipif(not (torch.cuda.is_available() and dispatch.loaded("cuda")), reason=NO_GPU)
CPU_BACKENDS = [
    *(pytest.param(Backend(name, "cpu", "cpu", _CPU_LARGE), id=name) for name in instruction_sets()),
]
CUDA_BACKENDS = [
    pytest.param(Backend("emulated", "cuda", "cpu", _EMULATED_LARGE), id="emulated", marks=_NO_EMULATOR),
    pytest.param(Backend("cuda", "cuda", "cuda", _GPU_LARGE), id="cuda", marks=_NO_CUDA),
]
BACKENDS = [*CPU_BACKENDS, *CUDA_BACKENDS]


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
