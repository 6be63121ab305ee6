"""Parameters and state after eight steps of every rule, dtype, layout and kernel are those of numbers.json.

On the machine of the record every bit counts, elsewhere 1e-7 of a tensor's norm (see frozen_runs.TOLERANCE).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import frozen_kernels
import frozen_runs as runs
import hf_lopt


RECORD = json.loads((runs.FOLDER / "numbers.json").read_text())


def tolerance_of(name: str) -> float:
    rule, _, layout = name.split()
    lower = layout == "options" and "ns_dtype" in runs.settings_of(rule)
    return runs.BFLOAT16_STEPS if lower else runs.TOLERANCE[torch.float32]


def all_differences(kernels: str, got: dict[str, dict]) -> list[str]:
    bitwise = runs.exact(RECORD["machine"])
    return [
        f"{name}: {line}"
        for name, outcome in got.items()
        for line in runs.differences(outcome, RECORD[kernels][name], bitwise, tolerance_of(name))
    ]


def test_every_run_is_recorded():
    names = {runs.name_of(each) for each in runs.every_run()}
    assert all(RECORD[kernels].keys() == names for kernels in frozen_kernels.KERNELS)


@pytest.mark.parametrize("rule", hf_lopt.available())
@pytest.mark.parametrize("kernels", frozen_kernels.INSTRUCTION_SETS)
def test_compiled(kernels, rule, one_thread):
    if reason := frozen_kernels.missing(kernels):
        pytest.skip(reason)
    with frozen_kernels.use(kernels):
        got = {runs.name_of(each): runs.run(*each) for each in runs.every_run() if each[0] == rule}
    assert not all_differences(kernels, got)


def test_plain(tmp_path):
    frozen_kernels.run_plain(Path(runs.__file__), tmp_path / "plain.json")
    assert not all_differences(frozen_kernels.PLAIN, json.loads((tmp_path / "plain.json").read_text()))
