"""Lists are kept from step to step; what a caller exchanges in between counts all the same."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

import hf_lopt
from hf_lopt import rules
from hf_lopt.kernels import held


SHAPES = [(6, 5), (7,), (4, 3, 2, 2), (5, 6)]


@pytest.fixture(autouse=True, params=[1, 10**9], ids=["in the library", "one by one"])
def compared(request, monkeypatch):
    """Where parameters and gradients are compared with those of the step before."""
    monkeypatch.setattr(held, "FEW", request.param)


def make(name, shapes=SHAPES, groups=1, **settings):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    if rules.get(name).needs_horizon:
        settings["num_training_steps"] = 20
    split = [{"params": params[g::groups]} for g in range(groups)]
    return params, hf_lopt.LearnedOptimizer(split, name, weights="bundled", **settings)


def step(params, optimizer, t):
    generator = torch.Generator().manual_seed(t)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step(1.0)


def other_data(params, optimizer):
    for p in params:
        p.data = p.data.clone()


def other_state(params, optimizer):
    for state in optimizer.state.values():
        for key, x in state.items():
            state[key] = x.clone()


def other_memory_of_state(params, optimizer):
    for state in optimizer.state.values():
        for x in state.values():
            x.data = x.data.clone()


def other_dicts(params, optimizer):
    for p, state in list(optimizer.state.items()):
        optimizer.state[p] = {key: x.clone() for key, x in state.items()}


def loaded(params, optimizer):
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("change", [other_data, other_state, other_memory_of_state, other_dicts, loaded])
@pytest.mark.parametrize("name", ["celo", "celo2", "celo_adam", "small_fc_lopt", "velo"])
def test_what_was_exchanged_is_trained(name, change):
    """The same numbers in other memory make the same run, and the old memory is left alone."""
    runs = []
    for changes in (False, True):
        params, optimizer = make(name)
        for t in range(4):
            if changes and t > 1:
                old = [p.data for p in params]
                before = [x.clone() for x in old]
                change(params, optimizer)
            step(params, optimizer, t)
            if changes and t > 1 and change is other_data:
                assert all(torch.equal(x, y) for x, y in zip(old, before, strict=True))
        runs.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))


@pytest.mark.parametrize("name", ["celo2", "velo"])
def test_who_takes_part_is_decided_anew(name):
    params, optimizer = make(name, groups=2)
    for t in range(2):
        step(params, optimizer, t)
    frozen = params[0].detach().clone()
    params[0].requires_grad_(False)
    step(params[1:], optimizer, 2)
    assert torch.equal(params[0], frozen)
    params[0].requires_grad_(True)
    step(params, optimizer, 3)
    assert not torch.equal(params[0], frozen)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = None
    params[3].grad = torch.ones_like(params[3])
    optimizer.step(1.0)
    assert [torch.equal(p, q) for p, q in zip(params, before, strict=True)] == [True, True, True, False]
    new = nn.Parameter(torch.ones(3, 2))
    optimizer.add_param_group({"params": [new], "lr": 0.5})
    step([*params, new], optimizer, 4)
    assert not torch.equal(new, torch.ones(3, 2)) and optimizer.state[new]


def test_settings_follow_their_groups():
    """Also where parameters move between groups whose numbers stay."""
    params, optimizer = make("small_fc_lopt", [(3, 2)] * 4, groups=2)
    optimizer.param_groups[1]["lr"] = 0.0
    step(params, optimizer, 0)
    before = [p.detach().clone() for p in params]
    first, second = (group["params"] for group in optimizer.param_groups)
    first[0], second[0] = second[0], first[0]
    step(params, optimizer, 1)
    assert [torch.equal(p, q) for p, q in zip(params, before, strict=True)] == [True, False, False, True]


def test_no_gradient_outlives_its_step():
    params, optimizer = make("velo")
    for t in range(2):
        step(params, optimizer, t)
        gone = [weakref.ref(p.grad) for p in params]
        optimizer.zero_grad()
        assert not any(x() is not None for x in gone)


def test_a_step_that_is_not_taken_lets_go_too():
    """Of gradients, and of parameters: one that somebody else holds cannot be exchanged by its owner."""
    params, optimizer = make("velo")
    for t in range(2):
        step(params, optimizer, t)
    for group in optimizer.param_groups:
        group["lr"] = -1.0
    refused = [lambda: optimizer.step(1.0), optimizer.step]  # for the lr, then for the loss
    for take in refused:
        with pytest.raises((RuntimeError, ValueError)):
            take()
        for group in optimizer.param_groups:
            group["lr"] = 1.0
        gone = [weakref.ref(p.grad) for p in params]
        optimizer.zero_grad()
        assert not any(x() is not None for x in gone)
        other = nn.Parameter(params[0].detach().clone())
        torch.utils.swap_tensors(params[0], other)
        for p in params:
            p.grad = torch.ones_like(p)


def test_a_gradient_of_another_kind_is_found():
    params, optimizer = make("velo")
    for t in range(2):
        step(params, optimizer, t)
    params[0].grad = torch.ones(6, 5).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step(1.0)
    params[0].grad = torch.ones(5, 6).T  # strides of another order
    optimizer.step(1.0)
    params[0].grad = torch.ones(()).expand(6, 5)  # one number for all, which a clip would write to
    optimizer.step(1.0)
    assert params[0].grad.stride() == (5, 1) and optimizer.steps_done == 4


class Named(torch.Tensor):
    pass


def on_meta(p):
    torch.utils.swap_tensors(p, nn.Parameter(torch.empty(p.shape, device="meta")))
    p.grad = torch.empty_like(p)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: setattr(p, "data", torch.ones(5, 6)), "has a gradient of shape"),
        (lambda p: setattr(p, "data", torch.ones(30, 1)), "has a gradient of shape"),
        (lambda p: setattr(p, "data", p.data.double()), "float64 with a gradient of"),
        (on_meta, "wanted .* on meta"),
        (lambda p: setattr(p.grad, "data", torch.ones(5, 6)), "has a gradient of shape"),
        (lambda p: setattr(p.grad, "data", torch.ones(6, 5, dtype=torch.float64)), "a gradient of torch.float64"),
        (lambda p: setattr(p, "grad", torch.ones(6, 5).as_subclass(Named)), None),
    ],
)
def test_other_kinds_of_data_are_found(change, message):
    """Of one of the parameters, or of its gradient; everything is as it was before the step that is refused."""
    params, optimizer = make("velo")
    for t in range(2):
        step(params, optimizer, t)
    for p in params:
        p.grad = torch.ones_like(p)
    change(params[0])
    before = [p.detach().clone() for p in params[1:]]
    if message is None:
        optimizer.step(1.0)
        assert optimizer.steps_done == 3
        return
    with pytest.raises(RuntimeError, match=message):
        optimizer.step(1.0)
    assert all(torch.equal(p, q) for p, q in zip(params[1:], before, strict=True)) and optimizer.steps_done == 2
