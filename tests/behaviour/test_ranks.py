"""DTensors that are sharded over two gloo ranks end up as in ranks.json: every bit on the machine of the record,
elsewhere 1e-6 of a tensor's norm."""

from __future__ import annotations

import json

import pytest

import frozen_kernels
import frozen_ranks
import frozen_runs as runs
import hf_lopt


RECORD = json.loads((runs.FOLDER / "ranks.json").read_text())


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return frozen_ranks.measure(tmp_path_factory.mktemp("ranks") / "ranks.json")


@pytest.mark.parametrize("rule", hf_lopt.available())
def test_sharded(rule, outcomes):
    recorded_on = dict(RECORD["machine"])
    bitwise = recorded_on.pop("kernels") == frozen_kernels.current() and runs.exact(recorded_on)
    expected = RECORD["two ranks"][rule]
    assert not runs.differences(outcomes[rule], expected, bitwise, frozen_ranks.TOLERANCE)
