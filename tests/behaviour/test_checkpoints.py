"""A checkpoint of 0.1.0 loads, and goes on as it did then. The files in checkpoints/ are never rewritten."""

from __future__ import annotations

import pytest
import torch

import frozen_checkpoints as checkpoints
import frozen_kernels
import frozen_runs as runs
import hf_lopt


# Settings that rules have got since; a checkpoint without them leaves them as they are.
LATER = {"precision", "state_dtype", "stochastic_rounding"}


@pytest.mark.parametrize("rule", hf_lopt.available())
def test_goes_on(rule, one_thread):
    saved = torch.load(checkpoints.FOLDER / f"{rule}.pt", weights_only=True)
    params = checkpoints.resume(saved, rule)
    bitwise = saved["kernels"] == frozen_kernels.current() and runs.exact(saved["machine"])
    for p, expected, before in zip(params, saved["after"], saved["before"], strict=True):
        assert p.dtype == expected.dtype and not torch.equal(p, before)
        if bitwise:
            assert torch.equal(p, expected)
        else:
            off = (p.double() - expected.double()).norm() / expected.double().norm()
            assert off <= max(checkpoints.TOLERANCE, runs.TOLERANCE[p.dtype])


@pytest.mark.parametrize("rule", hf_lopt.available())
def test_what_is_loaded_is_what_was_saved(rule):
    saved = torch.load(checkpoints.FOLDER / f"{rule}.pt", weights_only=True)
    optimizer = runs.make(rule, [torch.nn.Parameter(p.clone()) for p in saved["before"]], weights="bundled")
    optimizer.load_state_dict(saved["optimizer"])
    loaded = optimizer.state_dict()
    for i, state in saved["optimizer"]["state"].items():
        assert loaded["state"][i].keys() == state.keys()
        for key, x in state.items():
            assert loaded["state"][i][key].dtype == x.dtype and torch.equal(loaded["state"][i][key], x), key
    assert optimizer.steps_done == len(checkpoints.BEFORE)
    for got, group in zip(loaded["param_groups"], saved["optimizer"]["param_groups"], strict=True):
        assert got.keys() - LATER == group.keys()
        assert all(torch.equal(torch.as_tensor(got[k]), torch.as_tensor(group[k])) for k in group if _number(group[k]))


def _number(value: object) -> bool:
    return isinstance(value, (bool, int, float, torch.Tensor))


def test_they_are_small_and_not_rewritten():
    files = sorted(checkpoints.FOLDER.glob("*.pt"))
    assert sum(file.stat().st_size for file in files) < 400_000
    with pytest.raises(FileExistsError):
        checkpoints.write("velo", checkpoints.FOLDER / "velo.pt")
