"""The registry of what is fuzzed. To add a target, write a module with a function ``run`` and enter it here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from . import concurrent_files, operations, optim_args, state_dicts, weight_files
from .outcomes import Result


@dataclass(frozen=True)
class Target:
    """Something that takes inputs.

    Attributes:
        name: for the command line.
        run: (random numbers, an empty folder) -> what came of one input. All that it decides comes from the numbers,
            so that the seed of a case repeats it.
        isolated: whether it runs in a process of its own, because a failure of it could take the process along.
        seconds: of processor time that one input may take; beyond it the outcome is a timeout.
    """

    name: str
    run: Callable[[Random, Path], Result]
    isolated: bool = False
    seconds: float = 2.0


TARGETS = {
    target.name: target
    for target in (
        Target("weight_files", weight_files.run),
        Target("concurrent_files", concurrent_files.run, isolated=True, seconds=10.0),
        Target("optim_args", optim_args.run, seconds=5.0),
        Target("state_dicts", state_dicts.run, isolated=True, seconds=10.0),
        Target("operations", operations.run, isolated=True, seconds=20.0),
    )
}
