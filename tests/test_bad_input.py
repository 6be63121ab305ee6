"""Every wrong input has its message, and a step that cannot be taken changes nothing."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from hf_lopt import LearnedOptimizer, VeLO
from test_optimizer import THETA, equal, make, make_params, train


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr.*-1.0"),
        ({"lr": float("nan")}, "lr"),
        ({"lr": "fast"}, "lr.*fast"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"min_param_scale": -1e-3}, "min_param_scale"),
        ({"num_training_steps": 0}, "num_training_steps.*0"),
        ({"num_training_steps": -5}, "num_training_steps.*-5"),
        ({"num_training_steps": 2.5}, "num_training_steps.*2.5"),
        ({"num_training_steps": True}, "num_training_steps.*True"),
        ({"axis_order": "tf"}, "axis_order.*torch, jax.*'tf'"),
        ({"max_nonfinite_steps": 0}, "max_nonfinite_steps.*0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        make(make_params(), **settings)


def test_bad_settings_of_a_group():
    params = make_params()
    with pytest.raises(ValueError, match="axis_order"):
        make([{"params": params, "axis_order": "HWIO"}])
    optimizer = make(params[:1])
    with pytest.raises(ValueError, match="lr"):
        optimizer.add_param_group({"params": params[1:], "lr": -2.0})
    assert len(optimizer.param_groups) == 1


def test_empty_parameter_list():
    with pytest.raises(ValueError, match="empty parameter list"):
        make([])


def test_unknown_argument_and_rule():
    with pytest.raises(TypeError, match="beta1"):
        VeLO(make_params(), beta1=0.9)
    with pytest.raises(ValueError, match="beta1.*num_training_steps"):
        LearnedOptimizer(make_params(), "velo", beta1=0.9)
    with pytest.raises(ValueError, match="'veloo'.*small_fc_lopt"):
        LearnedOptimizer(make_params(), "veloo")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float64])
def test_refused_dtypes(dtype):
    with pytest.raises(ValueError, match=f"{dtype}"):
        make([nn.Parameter(torch.ones(3, dtype=dtype))])


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = make(embedding.parameters())
    before = embedding.weight.detach().clone()
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step(1.0)
    assert torch.equal(before, embedding.weight)


def test_step_without_loss_or_horizon():
    params = make_params()
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="observe_loss"):
        make(params).step()
    with pytest.raises(RuntimeError, match="num_training_steps"):
        make(params, num_training_steps=None).step(1.0)


def test_loss_of_several_numbers():
    with pytest.raises(ValueError, match=r"\(2,\)"):
        make(make_params()).observe_loss(torch.ones(2))


def snapshot(optimizer, params):
    counters = ("nonfinite_steps", "nonfinite_in_a_row")
    groups = [
        {k: v for k, v in g.items() if k not in ("params", *counters)} for g in optimizer.state_dict()["param_groups"]
    ]
    return copy.deepcopy(([p.detach() for p in params], list(optimizer.state.values()), groups))


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["loss", "gradient", "parameter"])
def test_a_non_finite_step_is_skipped_with_state_untouched(where, bad):
    params = make_params()
    optimizer = make(params)
    train(optimizer, params, range(3))
    healthy_params, healthy = copy.deepcopy((params, optimizer))
    if where == "parameter":
        params[2].data[1, 1] = bad
    before = snapshot(optimizer, params)
    for p in params:
        p.grad = torch.ones_like(p)
    if where == "gradient":
        params[3].grad[1, 2, 3] = bad
    with pytest.warns(RuntimeWarning, match="1 so far, 1 in a row"):
        optimizer.step(bad if where == "loss" else 1.0)
    after = snapshot(optimizer, params)
    assert same(after[1:], before[1:])
    assert where == "parameter" or same(after[0], before[0])
    assert optimizer.metrics()["nonfinite_steps"] == 1 and optimizer.steps_done == 3
    if where != "parameter":
        train(optimizer, params, range(3, 5))
        train(healthy, healthy_params, range(3, 5))
        assert equal(params, healthy_params), "training goes on as if the step had not been"


def test_too_many_in_a_row_is_an_error():
    params = make_params()
    optimizer = make(params, max_nonfinite_steps=3)
    for p in params:
        p.grad = torch.ones_like(p)
    for loss in ("nan", "nan", "1", "nan", "nan"):  # a good step starts the count again
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            optimizer.step(float(loss))
    with pytest.raises(RuntimeError, match="max_nonfinite_steps=3"):
        optimizer.step(float("nan"))


def test_the_count_survives_a_checkpoint():
    params = make_params()
    optimizer = make(params, max_nonfinite_steps=2)
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.warns(RuntimeWarning):
        optimizer.step(float("nan"))
    fresh = make(params, max_nonfinite_steps=2)
    fresh.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match="max_nonfinite_steps=2"):
        fresh.step(float("nan"))


def test_checkpoint_of_another_optimizer_rule_or_weights():
    params = make_params()
    optimizer = make(params)
    train(optimizer, params, range(2))
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match="no rule"):
        optimizer.load_state_dict(torch.optim.AdamW(make_params()).state_dict())
    other = copy.deepcopy(optimizer.state_dict())
    other["param_groups"][0]["rule"] = "celo"
    with pytest.raises(ValueError, match="'celo'.*'velo'"):
        optimizer.load_state_dict(other)
    changed = {k: v + 0.5 if k.endswith("step_size/b") else v for k, v in THETA.items()}
    with pytest.raises(ValueError, match="'mapping'.*weights="):
        optimizer.load_state_dict(make(make_params(), weights=changed).state_dict())
    assert same(snapshot(optimizer, params), before)
