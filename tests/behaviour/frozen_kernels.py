"""Which kernels a process computes with. The only place in this folder that knows how they are chosen.

``plain`` are the kernels in PyTorch, which a process takes from its start on when ``HF_LOPT_KERNELS=torch`` is in its
environment. The others are the instruction sets of the compiled kernels, which an operator switches at any time.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

import hf_lopt  # noqa: F401  it loads the operators


ROOT = Path(__file__).resolve().parents[2]
PLAIN = "plain"
INSTRUCTION_SETS = ("avx512", "avx2", "portable")
KERNELS = (*INSTRUCTION_SETS, PLAIN)


def current() -> str:
    """The kernels that this process uses now: an instruction set, or ``plain``."""
    if os.environ.get("HF_LOPT_KERNELS") == "torch" or not hasattr(torch.ops.hf_lopt, "cpu_kernels"):
        return PLAIN
    return torch.ops.hf_lopt.cpu_kernels("")


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """A context in which ``name`` of :data:`KERNELS` computes.

    Raises:
        RuntimeError: if the processor or the build lacks this instruction set, and for a change to or from ``plain``,
            which takes another process (:func:`run_plain`).
    """
    before = current()
    if PLAIN in (name, before):
        if name != before:
            raise RuntimeError(f"this process uses the kernels {before!r} and cannot use {name!r}")
        yield
        return
    torch.ops.hf_lopt.cpu_kernels(name)
    try:
        yield
    finally:
        torch.ops.hf_lopt.cpu_kernels(before)


def missing(name: str) -> str:
    """Why this process cannot use the kernels ``name``; "" if it can."""
    try:
        with use(name):
            return ""
    except RuntimeError as error:
        return str(error)


def run_plain(script: Path, *arguments: object) -> None:
    """Run a script of this folder in a process whose kernels are the plain ones."""
    run_script(script, *arguments, environment={"HF_LOPT_KERNELS": "torch"})


def run_script(script: Path, *arguments: object, environment: dict[str, str] | None = None) -> None:
    """Run a script in its own process, on one thread and without a hub; a failure shows its last output."""
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(script), *map(str, arguments)]
    result = subprocess.run(
        command, env=os.environ | settings | (environment or {}), capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
