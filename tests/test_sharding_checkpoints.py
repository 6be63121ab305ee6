"""Checkpoints through torch.distributed.checkpoint: written at one number of processes, continued at another.

A run of nine steps is interrupted after five (for velo between the two halves of an update) and has to end where the
run without interruption ends. One process holds ordinary tensors, several are sharded by ``fully_shard``.
"""

from __future__ import annotations

import json
import sys

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from ranks import SCRIPTS, run_on_ranks


sys.path.append(str(SCRIPTS))

import sharded_checkpoints as script  # noqa: E402


pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:skipped a step:RuntimeWarning")]

# A chain in which every number of processes reads what others wrote.
MOVES = [(1, 2), (2, 3), (3, 4), (4, 2), (2, 1), (3, 1), (4, 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def moves(folder):
    """(from, to) -> what go_on found."""
    script.alone(folder)
    run_on_ranks(2, "sharded_checkpoints.py", folder, 1, "--save")
    run_on_ranks(3, "sharded_checkpoints.py", folder, 2, "--save")
    run_on_ranks(4, "sharded_checkpoints.py", folder, 3, "--save")
    run_on_ranks(2, "sharded_checkpoints.py", folder, 4)
    found = {
        (source, target): json.loads((folder / f"errors_{target}_{source}.json").read_text())
        for source, target in MOVES
        if target != 1
    }
    return found | {(source, 1): script.go_on(folder, str(source)) for source in (2, 3, 4)}


@pytest.mark.parametrize("form", ["sharded", "full"])
@pytest.mark.parametrize("name", list(script.RULES))
@pytest.mark.parametrize(("source", "target"), MOVES)
def test_go_on_elsewhere(moves, source, target, name, form):
    """Everything is back after loading, to the rounding of sums over ranks, and the run ends as it would have."""
    found = moves[source, target]
    assert found[f"{name} {form} middle"]["params"] <= 2e-6
    assert found[f"{name} {form} middle"]["state"] <= 2e-5
    assert found[f"{name} {form} end"]["params"] <= 2e-6
    assert found[f"{name} {form} end"]["state"] <= 2e-5


@pytest.mark.parametrize("form", ["sharded", "full"])
@pytest.mark.parametrize("name", list(script.RULES))
def test_one_process_is_exact(moves, folder, name, form):
    """What one process wrote it gets back bit for bit."""
    model, optimizer = script.build(name, seed=1)
    script.load(folder, f"1.{name}", form, model, optimizer)
    expected = script.torch.load(folder / "whole.pt", weights_only=True)[name]["middle"]
    assert script.error(script.snapshot(model, optimizer), expected) == {"params": 0.0, "state": 0.0}


def test_a_save_before_the_first_step_counts_no_step(folder):
    """DCP takes a step with an lr of 0 and gradients of zero to make the state; it is not one of the run."""
    for name in script.RULES:
        model, optimizer = script.build(name)
        script.get_optimizer_state_dict(model, optimizer)
        assert optimizer.steps_done == 0 and optimizer.param_groups[0].get("accumulated", 0) == 0
        twin_model, twin = script.build(name)
        script.train(model, optimizer, range(3))
        script.train(twin_model, twin, range(3))
        assert script.error(script.snapshot(model, optimizer), script.snapshot(twin_model, twin))["params"] == 0.0


def test_killed_while_saving(moves, folder):
    """The unfinished checkpoint cannot be taken for a whole one, and the one before it loads."""
    result = run_on_ranks(2, "sharded_checkpoints.py", folder, 3, "--killed", check=False)
    assert result.returncode != 0 and (folder / "killed.sharded").is_dir()
    model, optimizer = script.build("velo", seed=1)
    with pytest.raises(CheckpointException, match="metadata"):
        script.load(folder, "killed", "sharded", model, optimizer)
    assert script.go_on(folder, "2")["velo sharded end"]["params"] <= 2e-6


@pytest.mark.parametrize("name", list(script.RULES))
def test_what_has_no_gradient_stays(moves, folder, name):
    """Also where gradients are accumulated, and at all numbers of processes: their ends are compared with this one."""
    start = script.build(name)[0].state_dict()
    end = script.torch.load(folder / "whole.pt", weights_only=True)[name]["end"]["params"]
    assert all(script.torch.equal(start[key], end[key]) for key in ("unused.weight", "unused.bias", "frozen"))
    assert not script.torch.equal(start["hidden.0.weight"], end["hidden.0.weight"])
