"""A state dict that does not fit is one ValueError, before anything of the optimizer is changed."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import hf_lopt
from hf_lopt import rules


NAMES = rules.names()
SHAPES = [(16, 12), (12, 16), (33,)]
State = dict[str, Any]
Change = Callable[[State], None]


def make(name: str = "velo", dtype: torch.dtype = torch.float32, **settings: Any) -> hf_lopt.LearnedOptimizer:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    if rules.get(name).needs_horizon:
        settings["num_training_steps"] = 20
    return hf_lopt.LearnedOptimizer(params, name, weights="bundled", **settings)


def step(optimizer: hf_lopt.LearnedOptimizer) -> None:
    generator = torch.Generator().manual_seed(optimizer.steps_done)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    optimizer.step(1.0)


def stepped(name: str = "velo", **settings: Any) -> hf_lopt.LearnedOptimizer:
    optimizer = make(name, **settings)
    step(optimizer)
    return optimizer


def everything(optimizer: hf_lopt.LearnedOptimizer) -> bytes:
    """Parameters and state dict, bit by bit."""
    buffer = io.BytesIO()
    params = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    torch.save((params, optimizer.state_dict()), buffer)
    return buffer.getvalue()


def put(key: str, value: Any, parameter: int = 0) -> Change:
    def change(saved: State) -> None:
        saved["state"][parameter][key] = value

    return change


def element(key: str, value: float, parameter: int = 0) -> Change:
    def change(saved: State) -> None:
        saved["state"][parameter][key].view(-1)[1] = value

    return change


def setting(key: str, value: Any) -> Change:
    def change(saved: State) -> None:
        for group in saved["param_groups"]:
            group[key] = value

    return change


def without(key: str) -> Change:
    return lambda saved: saved["state"][0].pop(key)


def transpose(key: str) -> Change:
    def change(saved: State) -> None:
        saved["state"][0][key] = saved["state"][0][key].mT.contiguous()

    return change


def exchange(saved: State) -> None:
    """The state of two parameters of as many elements."""
    saved["state"][0], saved["state"][1] = saved["state"][1], saved["state"][0]


def drop_parameter(saved: State) -> None:
    saved["param_groups"][0]["params"].pop()


def add_group(saved: State) -> None:
    saved["param_groups"].append({**saved["param_groups"][0], "params": []})


# What was done, and what the message has to say about it.
CHANGES: dict[str, tuple[Change, str]] = {
    "shape": (
        put("momentum", torch.zeros(3, 2, 2)),
        r"parameter 0 .*momentum: got float32 \(3, 2, 2\), wanted .*16, 12",
    ),
    "smaller": (put("second_moment", torch.zeros(1)), r"second_moment: got float32 \(1,\)"),
    "transposed": (transpose("momentum"), r"momentum: got float32 \(3, 12, 16\), wanted float32 \(3, 16, 12\)"),
    "exchanged": (exchange, r"parameter 0 .*parameter 1 "),
    "dtype": (put("momentum", torch.zeros(3, 16, 12, dtype=torch.float64)), r"momentum: got float64"),
    "integers": (put("momentum", torch.zeros(3, 16, 12, dtype=torch.int64)), r"momentum: got int64"),
    "a list": (put("momentum", [0.0]), r"momentum: got list"),
    "none": (put("momentum", None), r"momentum: got NoneType"),
    "missing key": (without("momentum"), r"parameter 0 .*lacks momentum"),
    "extra key": (put("exp_avg", torch.zeros(16, 12)), r"has exp_avg, which VeLO does not keep"),
    "missing state": (lambda saved: saved["state"].pop(2), r"parameter 2 .*no state"),
    "foreign state": (lambda saved: saved["state"].update({7: saved["state"][0]}), r"state of parameter 7"),
    "missing parameter": (drop_parameter, r"group 0: got 2 parameters, this optimizer has 3"),
    "extra group": (add_group, r"parameter groups: got 2, this optimizer has 1"),
    "nan": (element("momentum", float("nan")), r"momentum: has values that are NaN or infinite"),
    "inf": (element("factored_row", float("inf")), r"factored_row: has values that are NaN"),
    "nan of the lstm": (element("lstm_hidden", float("nan")), r"lstm_hidden: has values that are NaN"),
    "negative second moment": (element("second_moment", -1.0), r"second_moment: .*cannot be negative"),
    "negative row": (element("factored_row", -1.0), r"factored_row: .*cannot be negative"),
    "negative diagonal": (element("factored_diag", -1e-3, 2), r"parameter 2 .*factored_diag: .*cannot be negative"),
    "lr nan": (setting("lr", float("nan")), r"lr must be a finite number >= 0, got nan"),
    "lr tensor": (setting("lr", torch.tensor(float("nan"))), r"lr must be a finite number >= 0"),
    "lr negative": (setting("lr", -1.0), r"lr must be"),
    "lr text": (setting("lr", "1"), r"lr must be"),
    "weight decay": (setting("weight_decay", float("inf")), r"weight_decay must be"),
    "horizon": (setting("num_training_steps", -7), r"num_training_steps must be"),
    "step": (setting("step", torch.tensor(-5)), r"step: got -5"),
    "step of floats": (setting("step", torch.tensor(1.0)), r"step: got float32"),
    "max_nonfinite_steps": (setting("max_nonfinite_steps", 0), r"max_nonfinite_steps must be"),
    "axis order": (setting("axis_order", "HWIO"), r"axis_order must be one of"),
    "bank scale": (setting("bank_scale", float("nan")), r"bank_scale must be"),
    "losses": (setting("loss_means", torch.zeros(9)), r"loss_means: got float32 \(9,\), wanted float32 \(10,\)"),
    "losses nan": (setting("loss_means", torch.full((10,), float("nan"))), r"loss_means: has values"),
    "accumulated": (setting("accumulated", -1), r"accumulated: got -1"),
    "no memory": (put("momentum", torch.zeros(3, 16, 12, device="meta")), r"momentum: got a tensor that is sparse"),
    "sparse": (put("momentum", torch.zeros(3, 16, 12).to_sparse()), r"momentum: got a tensor that is sparse"),
    "lr that no float holds": (setting("lr", 10**400), r"lr must be a finite number >= 0"),
    "horizon that no count holds": (setting("num_training_steps", 2**60), r"num_training_steps must be"),
    "lr that no tensor holds": (setting("lr", 10**30), r"lr: a whole number must be at most"),
    "limit that no count holds": (setting("max_training_steps", 2**60), r"max_training_steps must be"),
    "missing setting": (lambda saved: saved["param_groups"][0].pop("min_param_scale"), r"lacks min_param_scale"),
    "lr of two numbers": (setting("lr", torch.ones(2)), r"lr must be"),
    "axis order, a list": (setting("axis_order", ["torch"]), r"axis_order must be one of"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_does_not_fit_is_named_and_nothing_is_changed(change: str):
    optimizer = stepped()
    before, saved = everything(optimizer), copy.deepcopy(optimizer.state_dict())
    mutate, message = CHANGES[change]
    mutate(saved)
    with pytest.raises(ValueError, match=message) as error:
        optimizer.load_state_dict(saved)
    assert "Nothing was loaded" in str(error.value)
    assert everything(optimizer) == before


def test_up_to_ten_differences_are_listed():
    optimizer = stepped()
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        for key in state:
            state[key] = torch.zeros(1, 1)
    with pytest.raises(ValueError, match=r"and \d+ more\.") as error:
        optimizer.load_state_dict(saved)
    assert str(error.value).count("wanted") == 10


@pytest.mark.parametrize("key, name", [("momentum", "celo2"), ("from_mlp", "rnn_mlp"), ("momentum", "celo_adam")])
def test_other_rules_refuse_nan_as_well(key: str, name: str):
    optimizer = stepped(name)
    before, saved = everything(optimizer), copy.deepcopy(optimizer.state_dict())
    saved["state"][2][key].view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match=f"{key}: has values that are NaN"):
        optimizer.load_state_dict(saved)
    assert everything(optimizer) == before


def test_another_branch_has_other_state():
    optimizer = stepped("celo2")
    saved = copy.deepcopy(optimizer.state_dict())
    for branch, message in (("adam", "has factored_"), ("sgd", "branch must be one of")):
        saved["param_groups"][0]["branch"] = branch
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(saved)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_fits_is_loaded(name: str, dtype: torch.dtype):
    """Through a file, into an optimizer that has no state and into one that has; half precision keeps float32."""
    optimizer = stepped(name, dtype=dtype)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    for other in (make(name, dtype), stepped(name, dtype=dtype)):
        buffer.seek(0)
        other.load_state_dict(torch.load(buffer, weights_only=True))
        mine, theirs = (list(x.state.values()) for x in (optimizer, other))
        for a, b in zip(mine, theirs, strict=True):
            assert a.keys() == b.keys()
            assert all(torch.equal(a[key], b[key]) and b[key].dtype == torch.float32 for key in a)
        step(other)
        assert other.steps_done == 2


def test_the_state_of_a_run_that_has_not_begun():
    make().load_state_dict(make().state_dict())


def test_a_frozen_parameter_has_no_state():
    optimizer, fresh = make(), make()
    for each in (optimizer, fresh):
        each.param_groups[0]["params"][1].requires_grad_(False)
    trained = [p for p in optimizer.param_groups[0]["params"] if p.requires_grad]
    for p in trained:
        p.grad = torch.ones_like(p)
    optimizer.step(1.0)
    fresh.load_state_dict(optimizer.state_dict())
    assert len(fresh.state) == 2


def test_accumulated_gradients_are_loaded_and_checked():
    optimizer = stepped(max_training_steps=10)
    saved = copy.deepcopy(optimizer.state_dict())
    make(max_training_steps=10).load_state_dict(saved)
    before = everything(optimizer)
    for key, value, message in (
        ("gradient_sum", torch.zeros(12, 16), r"gradient_sum: got float32 \(12, 16\)"),
        ("gradients_summed", -1, "gradients_summed: got -1"),
    ):
        bad = copy.deepcopy(saved)
        bad["state"][0][key] = value
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(bad)
    assert everything(optimizer) == before


def test_a_checkpoint_within_an_update_that_will_be_skipped_goes_on():
    """A NaN in the first of two calls skips the update; between them the sum has it, and a checkpoint is taken."""
    optimizer = make(max_training_steps=10)
    params = optimizer.param_groups[0]["params"]
    for p in params:
        p.grad = torch.full_like(p, float("nan"))
    optimizer.step(1.0)
    fresh = make(max_training_steps=10)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = [p.detach().clone() for p in fresh.param_groups[0]["params"]]
    with pytest.warns(RuntimeWarning, match="skipped a step"):
        step(fresh)
    assert fresh.steps_done == 0
    assert all(torch.equal(p, q) for p, q in zip(fresh.param_groups[0]["params"], before, strict=True))
    step(fresh)
    step(fresh)
    assert fresh.steps_done == 1


# What is no state dict, and what the message has to say about it.
FORMS: dict[str, tuple[Callable[[State], Any], str]] = {
    "none": (lambda saved: None, "got NoneType None"),
    "list": (lambda saved: [], r"got list \[\]"),
    "no groups": (lambda saved: {"state": saved["state"]}, "got dict"),
    "state": (lambda saved: saved | {"state": torch.zeros(1)}, "its state is float32"),
    "groups": (lambda saved: saved | {"param_groups": 1}, "its param_groups are int 1"),
    "group": (lambda saved: saved | {"param_groups": [1]}, "group 0 has no list of parameters"),
    "ids": (lambda saved: saved | {"param_groups": [{"params": 1}]}, "group 0 has no list of parameters"),
    "lists as ids": (lambda saved: saved | {"param_groups": [{"params": [[0]]}]}, "group 0 has no list"),
    "twice": (lambda saved: saved | {"param_groups": [{"params": [0, 1, 0]}]}, "the parameter 0 twice"),
    "state of one": (lambda saved: saved | {"state": {0: torch.zeros(2)}}, "state of the parameter 0 is float32"),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_is_no_state_dict_is_a_value_error(form: str):
    optimizer = stepped()
    before, saved = everything(optimizer), copy.deepcopy(optimizer.state_dict())
    change, message = FORMS[form]
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(change(saved))
    assert everything(optimizer) == before


def test_tensors_that_share_memory_get_their_own():
    """Of one parameter with itself, where it was expanded, and of two: steps write in place."""
    optimizer, twin = make(), make()
    saved = copy.deepcopy(stepped().state_dict())
    state = saved["state"]
    state[0]["momentum"] = torch.full((1, 1, 1), 0.25).expand(state[0]["momentum"].shape)
    state[0]["lstm_hidden"] = state[1]["lstm_hidden"] = state[2]["lstm_hidden"]
    twin.load_state_dict(copy.deepcopy(saved))
    for values in twin.state.values():
        for key, value in values.items():
            values[key] = value.clone(memory_format=torch.contiguous_format)
    optimizer.load_state_dict(saved)
    step(optimizer)
    step(twin)
    assert everything(optimizer) == everything(twin)


def test_a_state_dict_from_before_a_setting_leaves_it_as_it_is():
    saved = stepped("small_fc_lopt").state_dict()
    for group in saved["param_groups"]:
        del group["precision"]
    optimizer = make("small_fc_lopt", precision="tf32")
    optimizer.load_state_dict(saved)
    assert [group["precision"] for group in optimizer.param_groups] == ["tf32"] and optimizer.steps_done == 1
    step(optimizer)


def test_parameters_that_joined_since_the_last_step_are_saved_with_state():
    """Added or unfrozen: what is saved then is whole and loads."""
    optimizer = make()
    frozen = optimizer.param_groups[0]["params"][1].requires_grad_(False)
    step(optimizer)
    frozen.requires_grad_(True)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert len(optimizer.state) == 4
    step(optimizer)
    assert optimizer.steps_done == 2
    assert not make().state_dict()["state"]  # a run that has not begun has none
