"""Runs inputs of a target, here or in a process of its own, and says what came of each."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

from .outcomes import CRASH, TIMEOUT, WRONG_ERROR, Result
from .targets import TARGETS


# Wall-clock seconds after which a process that says nothing is ended; it may have little of the machine.
_SILENT_S = 600.0


def run_case(name: str, seed: int) -> Result:
    """One input in this process."""
    target = TARGETS[name]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = time.process_time()
        try:
            result = target.run(Random(seed), Path(folder))
        except Exception as error:  # whatever it is, it is the outcome of this input
            result = Result(WRONG_ERROR, "outside", f"{type(error).__name__}: {error}")
        seconds = time.process_time() - start
    if seconds > target.seconds:
        return Result(TIMEOUT, result.what, f"{seconds:.1f} s of processor time, then: {result.outcome}")
    return result


def cases(name: str, seed: int) -> Iterator[tuple[int, Result]]:
    """Inputs without end: (the seed that repeats one, what came of it)."""
    seeds = Random(seed)
    process = _Process() if TARGETS[name].isolated else None
    try:
        while True:
            case = seeds.randrange(1 << 32)
            yield case, process.run_case(name, case) if process is not None else run_case(name, case)
    finally:
        if process is not None:
            process.close()


class _Process:
    """A process that runs inputs, started again after a crash."""

    def __init__(self) -> None:
        self._process: Any = None
        self._pipe: Any = None

    def run_case(self, name: str, seed: int) -> Result:
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
        try:
            self._pipe.send((name, seed))
            if not self._pipe.poll(_SILENT_S):
                self.close()
                return Result(TIMEOUT, "silent", f"no answer within {_SILENT_S:.0f} s")
            result: Result = self._pipe.recv()
            return result
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            self.close()
            return Result(CRASH, "process", f"ended with {code}")

    def close(self) -> None:
        if self._process is not None:
            self._pipe.close()
            self._process.kill()
            self._process.join()
        self._process = None


def _serve(pipe: Connection) -> None:
    while True:
        try:
            name, seed = pipe.recv()
        except EOFError:
            return
        pipe.send(run_case(name, seed))
