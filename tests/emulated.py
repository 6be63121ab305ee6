"""The CUDA kernels on the host: builds them with the emulator of csrc/cuda/host and sends the operators there.

The sources of the kernels, of the tables and of the operators are those of ``hf_lopt._C_cuda``; what is missing is the
device. See docs/kernels.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from hf_lopt.kernels import dispatch, ops
from hf_lopt.kernels.arguments import Arguments
from hf_lopt.kernels.dispatch import Operator
from hf_lopt.rules import celo2


ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "csrc"
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wno-unused-function"]
FLAGS += ["-Wno-unknown-pragmas", "-DHF_LOPT_EMULATED", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
FLAGS += ["-DPy_LIMITED_API=0x030A0000"]


def compiler() -> str | None:
    """A C++ compiler, unless kernels are switched off."""
    return None if os.environ.get("HF_LOPT_KERNELS") else shutil.which(os.environ.get("CXX", "g++"))


def build() -> Path:
    """The library, compiled once for each state of the sources."""
    found = sorted(p for p in SOURCES.rglob("*") if p.is_file() and "cpu" not in p.parts)
    state = hashlib.sha256(" ".join([torch.__version__, *FLAGS]).encode())
    for path in found:
        state.update(path.read_bytes())
    folder = ROOT / "build" / "emulated" / state.hexdigest()[:16]
    library = folder / "hf_lopt_emulated.so"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "building.lock"):  # of the other process that runs tests
        if not library.exists():
            _compile(found, folder, library)
    return library


def _compile(found: list[Path], folder: Path, library: Path) -> None:
    torch_folder = Path(torch.__file__).parent
    includes = [f"-I{torch_folder / 'include'}", f"-I{sysconfig.get_path('include')}"]
    sources = [p for p in found if p.suffix in (".cu", ".cpp")]
    sources = [p for p in sources if p.name != "runtime.cpp" or p.parent.name == "host"]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.parent.name}_{source.name}.o"
        command = [compiler(), *FLAGS, *includes, "-x", "c++", "-c", str(source), "-o", str(target)]
        subprocess.run(command, check=True, timeout=1800)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    unfinished = folder / "unfinished.so"
    link = ["-shared", *map(str, objects), "-o", str(unfinished), f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    subprocess.run([compiler(), *link], check=True, timeout=600)
    unfinished.replace(library)


class Emulator:
    """The loaded library, and what a test may ask of it."""

    def __init__(self, path: Path):
        self.definitions = torch.library.Library("hf_lopt_emulated", "DEF")
        for operator in ops.OPERATORS:
            self.definitions.define(operator.name + operator.arguments.schema())
        spec = importlib.util.spec_from_file_location("hf_lopt_emulated", path)
        importlib.util.module_from_spec(spec)  # loads it, which registers the kernels
        self._library = ctypes.CDLL(str(path))
        for name in ("hf_lopt_launches", "hf_lopt_table_copies", "hf_lopt_allocations", "hf_lopt_queries"):
            getattr(self._library, name).restype = ctypes.c_int64

    @property
    def launches(self) -> int:
        return self._library.hf_lopt_launches()

    @property
    def table_copies(self) -> int:
        """How often a table was sent to the device."""
        return self._library.hf_lopt_table_copies()

    @property
    def allocations(self) -> int:
        """How often memory was taken that stays."""
        return self._library.hf_lopt_allocations()

    @property
    def queries(self) -> int:
        """How often the device was asked whether it has come past a mark."""
        return self._library.hf_lopt_queries()

    def let_copies_fail(self, fail: bool) -> None:
        self._library.hf_lopt_let_copies_fail(ctypes.c_bool(fail))

    def let_marks_pass(self, passed: bool) -> None:
        """Whether the device has come past the marks that it is asked about."""
        self._library.hf_lopt_let_marks_pass(ctypes.c_bool(passed))

    def shuffle(self, seed: int) -> None:
        """The order in which blocks and threads run from now on; 0: ascending."""
        self._library.hf_lopt_shuffle(ctypes.c_uint(seed))

    @contextlib.contextmanager
    def capture(self, graph: int) -> Iterator[None]:
        """A context in which the stream pretends to be captured into a graph."""
        self._library.hf_lopt_capture(ctypes.c_uint64(graph))
        try:
            yield
        finally:
            self._library.hf_lopt_capture(ctypes.c_uint64(0))

    @contextlib.contextmanager
    def everywhere(self) -> Iterator[None]:
        """A context in which the operators of hf_lopt take CPU tensors to these kernels, where they support a call."""
        original, apart = Operator.__call__, celo2._STACKS_APART
        Operator.__call__ = _call
        celo2._STACKS_APART = frozenset()
        try:
            yield
        finally:
            celo2._STACKS_APART = apart
            Operator.__call__ = original


def _call(operator: Operator, arguments: Arguments) -> Any:
    """What an operator does on a GPU."""
    if not (dispatch.enabled() and dispatch.supports(arguments, "cuda")):
        return operator.reference(arguments)
    if operator._written:
        operator.count_changes(arguments)
    return getattr(torch.ops.hf_lopt_emulated, operator.name).default(**vars(arguments))


@functools.cache
def emulator() -> Emulator:
    return Emulator(build())
