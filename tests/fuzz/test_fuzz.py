"""A short run of all targets, always with the same inputs."""

from __future__ import annotations

import itertools
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_lopt.hf.arguments import parse_optim_args

from . import runner
from .outcomes import BAD, SAME


# Inputs of each target, and seconds after which a slow machine has done enough of them.
COUNTS = {"weight_files": 400, "concurrent_files": 5, "optim_args": 150, "state_dicts": 60, "operations": 20}
_ENOUGH_S = 4.0


@pytest.mark.parametrize("name", COUNTS)
def test_inputs_are_read_right_or_refused(name):
    outcomes: Counter[str] = Counter()
    end = time.monotonic() + _ENOUGH_S
    for case, result in itertools.islice(runner.cases(name, seed=1), COUNTS[name]):
        assert result.outcome not in BAD, f"python -m tests.fuzz --case {name}:{case}: {result}"
        outcomes[result.outcome] += 1
        if time.monotonic() > end:
            break
    assert outcomes.total() > 0 and outcomes.keys() - {SAME} or name in ("concurrent_files", "operations")


WORDS = st.text(st.characters(exclude_characters="=,"), min_size=1).filter(lambda text: text.strip() == text)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.dictionaries(WORDS, st.text(st.characters(exclude_characters=",="), min_size=1).filter(str.isprintable)))
def test_optim_args_come_back(items):
    items = {key: value.strip() for key, value in items.items() if value.strip()}
    assert parse_optim_args(", ".join(f"{key} = {value}" for key, value in items.items())) == items
