"""LearnedOptimizer keeps the habits of torch.optim: signatures, groups, checkpoints, copies, odd parameters.

The rule's numbers are proved in test_golden.py; here the same numbers have to come out by every other road.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn

import golden
import hf_lopt
from hf_lopt import VeLO


THETA = golden.theta("velo_s.npz")
SHAPES = [(), (7,), (5, 9), (3, 4, 5), (4, 3, 2, 2), (2, 3, 1, 4, 2)]


def make_params(dtype: torch.dtype = torch.float32, shapes=SHAPES, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter((torch.randn(shape, generator=generator) * 0.3).to(dtype)) for shape in shapes]


def make(params, **settings) -> VeLO:
    return VeLO(params, **({"num_training_steps": 20, "weights": THETA, "bank_scale": 1.0} | settings))


def train(optimizer, params, steps: range, skip: int | None = None) -> None:
    """Steps with gradients and losses that depend on the step number alone."""
    for t in steps:
        generator = torch.Generator().manual_seed(100 + t)
        for i, p in enumerate(params):
            g = torch.randn(p.shape, generator=generator)
            p.grad = None if i == skip else g.to(p.dtype)
        optimizer.observe_loss(3.0 / (t + 1) + 0.1 * (t % 3))
        optimizer.step()


def equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", ["step", "state_dict", "load_state_dict", "add_param_group", "zero_grad"])
def test_signatures_are_those_of_torch(name):
    ours = inspect.signature(getattr(hf_lopt.LearnedOptimizer, name)).parameters
    theirs = inspect.signature(getattr(torch.optim.AdamW, name)).parameters
    # Ours has one keyword more: step(loss=...).
    assert [(p.name, p.kind, p.default) for p in ours.values() if (name, p.name) != ("step", "loss")] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]


def test_constructor_signature():
    parameters = inspect.signature(VeLO).parameters
    wanted = {"lr": 1.0, "weights": "auto", "weight_decay": 0.0, "axis_order": "torch", "min_param_scale": None}
    assert {key: parameters[key].default for key in wanted} == wanted
    assert parameters["bank_scale"].default == 100.0 and "velo" in hf_lopt.available()


def test_three_ways_to_give_the_loss():
    runs = []
    for how in ("observe", "tensor", "float", "closure", "parts"):
        params = make_params()
        optimizer = make(params)
        for t, loss in enumerate((2.0, 1.25, 1.5)):
            generator = torch.Generator().manual_seed(t)
            grads = [torch.randn(p.shape, generator=generator) for p in params]
            calls = 0

            def closure(grads=grads, params=params, optimizer=optimizer, loss=loss):
                nonlocal calls
                calls += 1
                assert torch.is_grad_enabled()
                optimizer.zero_grad()
                sum((p * g).sum() for p, g in zip(params, grads, strict=True)).backward()
                return torch.tensor(loss)

            if how == "closure":
                assert optimizer.step(closure) == loss and calls == 1
                continue
            for p, g in zip(params, grads, strict=True):
                p.grad = g.clone()
            if how == "observe":
                optimizer.observe_loss(torch.tensor([loss], requires_grad=True))
                assert optimizer.step() is None
            elif how == "parts":
                optimizer.observe_loss(loss / 4)
                optimizer.observe_loss(torch.tensor(loss * 3 / 4))
                optimizer.step()
            else:
                optimizer.step(torch.tensor(loss) if how == "tensor" else loss)
        runs.append(params)
    for other in runs[1:]:
        assert equal(runs[0], other)


def test_a_loss_given_to_step_replaces_an_observed_one():
    a, b = make_params(), make_params()
    first, second = make(a), make(b)
    for optimizer, params in ((first, a), (second, b)):
        for p in params:
            p.grad = torch.ones_like(p)
        if optimizer is second:
            optimizer.observe_loss(1e6)
        optimizer.step(2.0)
    assert equal(a, b) and torch.equal(first.param_groups[0]["loss_means"], second.param_groups[0]["loss_means"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_resume_from_a_file_is_bitwise(dtype):
    params = make_params(dtype)
    optimizer = make(params)
    train(optimizer, params, range(3))
    buffer = io.BytesIO()
    torch.save({"params": params, "optimizer": optimizer.state_dict()}, buffer)
    train(optimizer, params, range(3, 7))

    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    resumed = [nn.Parameter(p) for p in saved["params"]]
    fresh = make(resumed)
    fresh.load_state_dict(saved["optimizer"])
    assert all(x.dtype == torch.float32 for state in fresh.state.values() for x in state.values())
    train(fresh, resumed, range(3, 7))
    assert equal(params, resumed) and fresh.steps_done == optimizer.steps_done == 7


def test_settings_come_back_with_the_checkpoint():
    params = make_params()
    optimizer = make(params, num_training_steps=33, lr=0.5)
    train(optimizer, params, range(2))
    fresh = make(make_params(), num_training_steps=None)
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.num_training_steps == 33 and fresh.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_their_own_way(copy_of):
    params = make_params()
    optimizer = make(params)
    train(optimizer, params, range(3))
    twin_params, twin = copy_of((params, optimizer))
    assert twin.weights.sha256 == optimizer.weights.sha256 and twin.rule is optimizer.rule
    before = [p.detach().clone() for p in params]
    train(twin, twin_params, range(3, 5))
    assert equal(before, params) and not equal(params, twin_params)
    train(optimizer, params, range(3, 5))
    assert equal(params, twin_params)


def test_lr_scales_the_step_and_schedulers_drive_it():
    """Two first steps from one start, the second at half the lr, move the parameters half as far."""
    moved = []
    for lr in (1.0, 0.5):
        params = make_params(shapes=[(6, 5)])
        start = params[0].detach().clone()
        optimizer = make(params, lr=lr)
        train(optimizer, params, range(1))
        moved.append(params[0].detach() - start)
    torch.testing.assert_close(moved[0], 2 * moved[1], rtol=1e-3, atol=1e-7)

    params = make_params()
    optimizer = make(params)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.0 if t >= 2 else 1.0)
    for t in range(3):
        train(optimizer, params, range(t, t + 1))
        before = [p.detach().clone() for p in params]
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.0
    train(optimizer, params, range(3, 4))
    assert equal(before, params) and optimizer.steps_done == 4


def test_weight_decay_is_decoupled_and_scaled_by_lr():
    """p <- p - lr wd p - step, with the p from before: the difference of two runs is the decay alone."""
    params, decayed = make_params(), make_params()
    start = [p.detach().clone() for p in params]
    train(make(params, lr=0.5), params, range(1))
    train(make(decayed, lr=0.5, weight_decay=0.1), decayed, range(1))
    for p0, p, q in zip(start, params, decayed, strict=True):
        torch.testing.assert_close(p.detach() - q.detach(), 0.05 * p0, rtol=1e-3, atol=1e-7)


def test_min_param_scale_is_a_floor_under_the_step():
    """The step of a tensor is proportional to its RMS, or to the floor where that is larger."""
    moved = {}
    for floor in (0.0, 0.02, 10.0):
        params = [nn.Parameter(torch.full((4, 6), 0.1)), nn.Parameter(torch.zeros(4, 6))]
        train(make(params, min_param_scale=floor), params, range(1))
        moved[floor] = [(params[0] - 0.1).abs().max().item(), params[1].abs().max().item()]
    assert moved[0.02][0] == moved[0.0][0]
    assert moved[10.0][0] == pytest.approx(100 * moved[0.0][0], rel=1e-3)
    # A tensor of zeros has an RMS of sqrt(1e-9).
    assert moved[0.02][1] == pytest.approx(0.02 / 1e-9**0.5 * moved[0.0][1], rel=1e-3)


def test_groups_match_one_group_and_take_their_own_lr():
    one, many = make_params(), make_params()
    train(make(one), one, range(4))
    train(make([{"params": many[:2]}, {"params": many[2:], "lr": 1.0}]), many, range(4))
    assert equal(one, many)
    params = make_params()
    start = [p.detach().clone() for p in params]
    train(make([{"params": params[:3]}, {"params": params[3:], "lr": 0.0}]), params, range(2))
    assert not any(map(torch.equal, start[:3], params[:3])) and equal(start[3:], params[3:])


def test_a_group_added_later_joins_the_run():
    params = make_params()
    optimizer = make(params[:3])
    train(optimizer, params[:3], range(3))
    group = {"params": params[3:], "lr": 0.25}
    optimizer.add_param_group(group)
    assert set(group) == {"params", "lr"}, "the caller's dict stays as it is"
    assert optimizer.param_groups[1]["num_training_steps"] == 20
    train(optimizer, params, range(3, 5))
    assert [int(g["step"]) for g in optimizer.param_groups] == [5, 5]
    with pytest.warns(UserWarning, match="bank_scale"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "bank_scale": 7.0})


def test_parameters_without_gradient_are_left_out():
    """A parameter that never gets a gradient changes nothing, for itself and for the others."""
    params, alone = make_params(), make_params()
    start = params[2].detach().clone()
    optimizer = make(params)
    train(optimizer, params, range(4), skip=2)
    del alone[2]
    twin = make(alone)
    for t in range(4):
        generator = torch.Generator().manual_seed(100 + t)
        grads = [torch.randn(p.shape, generator=generator) for p in params]
        del grads[2]
        for p, g in zip(alone, grads, strict=True):
            p.grad = g
        twin.step(3.0 / (t + 1) + 0.1 * (t % 3))
    assert torch.equal(params[2], start) and params[2] in optimizer.state
    assert equal([p for i, p in enumerate(params) if i != 2], alone)


def test_frozen_empty_and_tied_parameters():
    embedding, head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    head.weight = embedding.weight
    frozen, empty = nn.Parameter(torch.ones(3), requires_grad=False), nn.Parameter(torch.empty(0, 4))
    module = nn.ModuleList([embedding, head])
    optimizer = make([*module.parameters(), frozen, empty])
    for _ in range(3):
        optimizer.zero_grad()
        loss = head(embedding(torch.tensor([1, 2, 3]))).square().mean() + empty.sum()
        loss.backward()
        optimizer.step(loss)
    assert len(optimizer.state) == 1 and head.weight is embedding.weight
    assert torch.equal(frozen, torch.ones(3)) and torch.isfinite(embedding.weight).all()


def test_a_step_of_zero_lr_without_loss_allocates_and_changes_nothing():
    """Distributed checkpoint loading calls step() like this before it restores the state."""
    params = make_params()
    start = [p.detach().clone() for p in params]
    optimizer = make(params, num_training_steps=None)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert equal(start, params) and optimizer.steps_done == 0 and len(optimizer.state) == len(params)


def test_training_learns():
    """The point of it all, with the embedded weights: a small regression, loss down by more than ten times."""
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    y = torch.sin(x @ torch.randn(8, 1))
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = VeLO(model.parameters(), num_training_steps=300, weights="bundled")
    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step(loss)
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0], (losses[0], losses[-1])


def test_autocast_around_the_step_changes_nothing():
    a, b = make_params(), make_params()
    train(make(a), a, range(3))
    optimizer = make(b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        train(optimizer, b, range(3))
    assert equal(a, b)


@pytest.mark.parametrize("through_data", [False, True])
def test_an_edit_of_the_parameters_between_steps_is_seen(through_data):
    """Statistics are kept from step to step; an edit of a parameter (clipping, averaging) must not meet stale ones."""
    params = make_params(shapes=[(6, 5), (7,)])
    optimizer = make(params)
    train(optimizer, params, range(2))
    with torch.no_grad():
        for p in params:
            (p.data if through_data else p).mul_(3.0)
    twin_params, twin = copy.deepcopy((params, optimizer))  # a copy has no statistics to reuse
    train(optimizer, params, range(2, 4))
    train(twin, twin_params, range(2, 4))
    for p, q in zip(params, twin_params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=0)


def test_metrics():
    params = make_params()
    optimizer = make(params)
    assert optimizer.metrics() == {}
    before = [p.detach().clone() for p in params]
    train(optimizer, params, range(1))
    metrics = optimizer.metrics()
    change = torch.cat([(p - q).flatten() for p, q in zip(before, params, strict=True)])
    assert metrics["update_rms"] == pytest.approx(change.square().mean().sqrt().item(), rel=1e-3)
    assert metrics["lr_mult_min"] <= metrics["lr_mult_mean"] <= metrics["lr_mult_max"]


def test_past_the_horizon_it_goes_on_with_one_warning():
    """tanh(10 (i / n - tau)) has no end: the formula goes on for i > n."""
    params = make_params()
    optimizer = make(params, num_training_steps=5)
    with pytest.warns(UserWarning, match="6 steps.*num_training_steps=5") as record:
        train(optimizer, params, range(9))
    assert sum("num_training_steps" in str(w.message) for w in record) == 1
    i = 8
    want = torch.tanh(10 * (torch.tensor(i / 5) - torch.tensor([0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1])))
    torch.testing.assert_close(optimizer.report["scheduler_inputs"][0, :9], want)
    assert all(torch.isfinite(p).all() for p in params)


def test_a_group_can_be_added_after_loading():
    """Loading makes torch add a key of its own to the defaults, which no group has."""
    params = make_params()
    optimizer = make(params)
    train(optimizer, params, range(1))
    fresh = make(params)
    fresh.load_state_dict(optimizer.state_dict())
    late = torch.nn.Parameter(torch.ones(2, 3))
    fresh.add_param_group({"params": [late]})
    assert fresh.param_groups[1]["step"] is fresh.param_groups[0]["step"]


def test_a_wrapper_with_the_same_dict_shares_the_waiting_loss():
    """Wrappers exist that take over an optimizer's ``__dict__``; a loss given to one is there for the other's step."""
    params = make_params()
    optimizer = make(params)
    wrapper = object.__new__(VeLO)
    wrapper.__dict__.update(optimizer.__dict__)
    wrapper.observe_loss(1.0)
    assert optimizer.has_observed_loss
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not wrapper.has_observed_loss and wrapper.steps_done == 1
