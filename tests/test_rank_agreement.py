"""A rank that alone loses or gains a gradient after the first step: an error on all ranks, and no wait for others."""

from __future__ import annotations

import json
import re

import pytest

from ranks import run_on_ranks


NAMES = ("velo", "celo_adam", "small_fc_lopt", "celo2", "elo_celo2", "rnn_mlp")
# What differs, the first of it.
DIFFERENT = {
    "one lost": r"parameter 1: \(7,\) float32 with a gradient on rank 0, .* without a gradient on rank 1",
    "one gained": r"parameter 1: \(7,\) float32 with a gradient on rank 0, .* without a gradient on rank 1",
    "others": r"parameter 0: \(6, 5\) float32 with a gradient on rank 0, .* without a gradient on rank 1",
    "all lost": r"parameter 0: \(6, 5\) float32 with a gradient on rank 0, .* without a gradient on rank 1",
}
STEPS = {"lost together": 4, "all lost together": 3}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    path = tmp_path_factory.mktemp("selections") / "found"
    run_on_ranks(2, "selections.py", path, *NAMES)
    return [json.loads(path.with_suffix(f".{rank}").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("case", DIFFERENT)
@pytest.mark.parametrize("name", NAMES)
def test_different_gradients_are_an_error_on_all_ranks(ranks, name: str, case: str):
    for rank in ranks:
        found = rank[name][case]
        assert re.search(f"ValueError: .*{DIFFERENT[case]}", found["message"]), found["message"]
        assert found["unchanged"] and found["steps"] == 2


@pytest.mark.parametrize("case", STEPS)
@pytest.mark.parametrize("name", NAMES)
def test_what_all_ranks_lose_together_is_left_out_of_a_step(ranks, name: str, case: str):
    for rank in ranks:
        assert rank[name][case]["message"] == "" and rank[name][case]["steps"] == STEPS[case]
