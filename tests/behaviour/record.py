"""Rewrites what the tests of this folder compare with, from the package as it is. README.md says when that is right.

    python tests/behaviour/record.py [numbers] [ranks] [interface] [checkpoints]

Without arguments everything is recorded. Checkpoints are made only for rules that have none, see
frozen_checkpoints.py.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


# No network, and one thread: before torch is imported.
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import torch  # noqa: E402

import frozen_checkpoints  # noqa: E402
import frozen_interface  # noqa: E402
import frozen_kernels  # noqa: E402
import frozen_ranks  # noqa: E402
import frozen_runs as runs  # noqa: E402
import hf_lopt  # noqa: E402


def text_of(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """JSON with a line for each entry of a section, so that a difference shows where it is."""
    blocks = []
    for name, section in sections.items():
        lines = [f"  {json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in section.items()]
        blocks.append(f" {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def numbers(folder: Path) -> None:
    """Every run with all kernels that this processor has.

    Raises:
        RuntimeError: if it lacks an instruction set. A record is made on a machine that has them all.
    """
    found = {"machine": runs.machine()}
    for name in frozen_kernels.INSTRUCTION_SETS:
        with frozen_kernels.use(name):
            found[name] = {runs.name_of(each): runs.run(*each) for each in runs.every_run()}
    frozen_kernels.run_plain(Path(runs.__file__), folder / "plain.json")
    found[frozen_kernels.PLAIN] = json.loads((folder / "plain.json").read_text())
    (runs.FOLDER / "numbers.json").write_text(text_of(found))


def ranks(folder: Path) -> None:
    machine = runs.machine() | {"kernels": frozen_kernels.current()}
    found = {"machine": machine, "two ranks": frozen_ranks.measure(folder / "ranks.json")}
    (runs.FOLDER / "ranks.json").write_text(text_of(found))


def interface(folder: Path) -> None:
    (runs.FOLDER / "interface.json").write_text(text_of(frozen_interface.measure(folder)))


def checkpoints(folder: Path) -> None:
    frozen_checkpoints.FOLDER.mkdir(exist_ok=True)
    for rule in hf_lopt.available():
        file = frozen_checkpoints.FOLDER / f"{rule}.pt"
        if not file.exists():
            frozen_checkpoints.write(rule, file)


def main(wanted: list[str]) -> None:
    steps = {step.__name__: step for step in (numbers, ranks, interface, checkpoints)}
    torch.set_num_threads(1)
    for name in wanted or steps:
        if name not in steps:
            sys.exit(f"{name!r} is none of {', '.join(steps)}")
        with tempfile.TemporaryDirectory() as folder:
            steps[name](Path(folder))
        print(f"recorded {name}")


if __name__ == "__main__":
    main(sys.argv[1:])
