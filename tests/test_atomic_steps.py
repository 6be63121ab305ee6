"""What a step does with gradients, losses and tensors that it cannot use: all of it or nothing, on every backend."""

from __future__ import annotations

import contextlib
import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import hf_lopt
from hf_lopt import rules
from hf_lopt.kernels import ops


SHAPES = [(16, 12), (33,), (), (5, 4, 3, 3)]
MAGNITUDES = (1e6, 1e9, 1e10, 1e11, 1e12, 1e15, 1e18, 1e19, 1e20, 1e25, 1e30, 3e38)
NAMES = rules.names()
# The sum of squares of a gradient from which on rules that do not bound gradients skip the step.
LIMIT = 2.0**63
CLIPPED = ("celo", "celo_adam", "celo2_base", "elo_celo2", "rnn_mlp", "velo", "velo_s")


def make(name: str, shapes: list[tuple[int, ...]] = SHAPES, **settings: Any) -> tuple[list, hf_lopt.LearnedOptimizer]:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    if rules.get(name).needs_horizon:
        settings["num_training_steps"] = 20
    return params, hf_lopt.LearnedOptimizer(params, name, weights="bundled", **settings)


def step(params: list, optimizer: hf_lopt.LearnedOptimizer, scale: float = 1.0, loss: Any = 1.0) -> None:
    """One step with gradients whose largest number is ``scale``; the same for every optimizer."""
    generator = torch.Generator().manual_seed(optimizer.steps_done + 1)
    for p in params:
        g = 2.0 * torch.rand(p.shape, generator=generator, dtype=torch.float32) - 1.0
        p.grad = (g / g.abs().max() * scale).to(p.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        optimizer.step(loss)


def tensors_of(params: list, optimizer: hf_lopt.LearnedOptimizer) -> dict[str, torch.Tensor]:
    """Parameters, state and run, copied."""
    saved = copy.deepcopy(optimizer.state_dict())
    found = {f"parameter {i}": p.detach().clone() for i, p in enumerate(params)}
    found |= {f"{key} of {i}": torch.as_tensor(x) for i, state in saved["state"].items() for key, x in state.items()}
    group = saved["param_groups"][0]
    return found | {key: x for key, x in group.items() if isinstance(x, torch.Tensor)}


def assert_same(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], *but: str) -> None:
    changed = [key for key in before if key not in but and not torch.equal(before[key], after[key])]
    assert before.keys() == after.keys() and not changed, changed


# ---- losses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss", [float("nan"), float("inf"), torch.tensor(float("nan"))], ids=["nan", "inf", "tensor"]
)
@pytest.mark.parametrize("name", NAMES)
def test_a_loss_that_is_not_finite_skips_the_step_of_every_rule(name: str, loss: Any):
    params, optimizer = make(name)
    step(params, optimizer)
    before = tensors_of(params, optimizer)
    step(params, optimizer, loss=loss)
    assert_same(before, tensors_of(params, optimizer), "nonfinite_steps", "nonfinite_in_a_row")
    assert optimizer.metrics()["nonfinite_steps"] == 1 and optimizer.steps_done == 1
    step(params, optimizer)
    assert optimizer.steps_done == 2


@pytest.mark.parametrize("name", [name for name in NAMES if not rules.get(name).needs_loss])
def test_a_finite_loss_makes_no_difference_where_it_is_not_needed(name: str):
    found = []
    for loss in (None, 3.0):
        params, optimizer = make(name)
        for _ in range(3):
            step(params, optimizer, loss=loss)
        found.append(tensors_of(params, optimizer))
    assert_same(*found)


# ---- gradients that float32 holds, but not their squares ----


@pytest.mark.parametrize("name", NAMES)
def test_a_huge_gradient_is_taken_or_skipped_alike_on_every_backend(name: str):
    for scale in MAGNITUDES:
        found = []
        for plain in (False, True):
            params, optimizer = make(name)
            step(params, optimizer)
            before = tensors_of(params, optimizer)
            with ops.plain() if plain else contextlib.nullcontext():
                step(params, optimizer, scale)
            after = tensors_of(params, optimizer)
            assert all(x.isfinite().all() for x in after.values()), scale
            if optimizer.steps_done == 1:
                assert_same(before, after, "nonfinite_steps", "nonfinite_in_a_row")
            assert optimizer.steps_done + optimizer.metrics()["nonfinite_steps"] == 2
            found.append((optimizer.steps_done, after))
        (steps, fused), (steps_plain, plain_) = found
        assert steps == steps_plain, scale
        for key, x in fused.items():
            torch.testing.assert_close(x, plain_[key], rtol=1e-3, atol=1e-3, msg=f"{scale} {key}")


@pytest.mark.parametrize("name", NAMES)
def test_the_limit_is_that_of_the_documentation(name: str):
    root = LIMIT**0.5
    for scale, skipped in ((0.9 * root, False), (1.1 * root, name not in CLIPPED)):
        params, optimizer = make(name, [(1,)])
        step(params, optimizer, scale)
        assert optimizer.metrics()["nonfinite_steps"] == skipped


@pytest.mark.parametrize("name", NAMES)
def test_training_goes_on_after_a_spike(name: str):
    """Many steps later parameters still move, and no average is infinite."""
    for scale in (2e9, 1e20):
        params, optimizer = make(name, [(6, 5), (7,)])
        for i in range(12):
            step(params, optimizer, scale if i % 4 == 2 else 1.0)
        before = tensors_of(params, optimizer)
        step(params, optimizer)
        after = tensors_of(params, optimizer)
        assert all(x.isfinite().all() for x in after.values())
        assert not any(torch.equal(before[f"parameter {i}"], after[f"parameter {i}"]) for i in range(2))


def test_a_steady_gradient_below_the_limit_never_overflows():
    """Second moments grow up to the squares of the gradient, and their own squares enter the features."""
    for plain in (False, True):
        params, optimizer = make("small_fc_lopt", [(6, 5), (7,)])
        for state in [optimizer.state]:
            assert not state
        with ops.plain() if plain else contextlib.nullcontext():
            step(params, optimizer)
            for p in params:
                optimizer.state[p]["second_moment"].fill_(LIMIT / (2 * p.numel()))
            step(params, optimizer, 5e8)
        assert optimizer.steps_done == 2


def test_a_global_norm_that_overflows_skips_the_step():
    """It would otherwise make every gradient zero."""
    params, optimizer = make("elo_celo2")
    step(params, optimizer)
    before = tensors_of(params, optimizer)
    step(params, optimizer, 1e38)
    assert_same(before, tensors_of(params, optimizer), "nonfinite_steps", "nonfinite_in_a_row")
    step(params, optimizer, 1e12)
    assert optimizer.steps_done == 2


# ---- a step that raises has changed nothing ------------------------------------------------------------------------


def other_shape(params: list, optimizer: hf_lopt.LearnedOptimizer) -> None:
    with torch.no_grad():
        params[0].grad = None
        params[0].data = params[0].detach().reshape(12, 16).clone()
    params[0].grad = torch.ones(12, 16)


def to_float64(params: list, optimizer: hf_lopt.LearnedOptimizer) -> None:
    for p in params:
        p.grad = None
        p.data = p.data.double()
        p.grad = torch.ones_like(p)


def state_of(key: str, *shape: int, dtype: torch.dtype = torch.float32) -> Any:
    def change(params: list, optimizer: hf_lopt.LearnedOptimizer) -> None:
        optimizer.state[params[1]][key] = torch.zeros(shape, dtype=dtype)

    return change


def no_momentum(params: list, optimizer: hf_lopt.LearnedOptimizer) -> None:
    del optimizer.state[params[1]]["momentum"]


def setting(name: str, value: Any) -> Any:
    def change(params: list, optimizer: hf_lopt.LearnedOptimizer) -> None:
        optimizer.param_groups[0][name] = value

    return change


CHANGES = {
    "other shape": other_shape,
    "float64": to_float64,
    "state shape": state_of("momentum", 1, 2),
    "state transposed": state_of("momentum", 33, 1),
    "state float64": state_of("second_moment", 1, 33, dtype=torch.float64),
    "state gone": no_momentum,
    "lr nan": setting("lr", float("nan")),
    "lr negative": setting("lr", -1.0),
    "lr tensor nan": setting("lr", torch.tensor(float("nan"))),
    "lr tensor inf": setting("lr", torch.tensor(float("inf"))),
    "decay tensor nan": setting("weight_decay", torch.tensor(float("nan"))),
    "axis order": setting("axis_order", "HWIO"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "name", ["celo", "celo2", "celo_adam", "elo_celo2", "mulo", "rnn_mlp", "small_fc_lopt", "velo"]
)
def test_what_does_not_fit_is_refused_before_anything_is_changed(name: str, change: str):
    params, optimizer = make(name)
    step(params, optimizer)
    CHANGES[change](params, optimizer)
    for p in params:
        p.grad = torch.ones_like(p)
    before = tensors_of(params, optimizer)
    gradients = [p.grad.clone() for p in params]
    with pytest.raises((RuntimeError, ValueError)):
        optimizer.step(1.0)
    after = tensors_of(params, optimizer)
    assert_same({k: x.nan_to_num(-1.0) for k, x in before.items()}, {k: x.nan_to_num(-1.0) for k, x in after.items()})
    assert all(torch.equal(g, p.grad) for g, p in zip(gradients, params, strict=True))


def test_half_an_accumulated_update_is_refused_as_a_whole():
    params, optimizer = make("velo", max_training_steps=10)
    step(params, optimizer)
    optimizer.state[params[1]]["gradient_sum"] = torch.zeros(34)
    before = tensors_of(params, optimizer)
    with pytest.raises(RuntimeError, match="gradient_sum"):
        step(params, optimizer)
    assert_same(before, tensors_of(params, optimizer))


def test_a_refused_last_call_leaves_what_was_gathered():
    """The parameter that does not fit any more had its gradient in an earlier call."""
    params, optimizer = make("velo", max_training_steps=10)  # two calls per update
    step(params, optimizer)
    data, params[0].data, params[0].grad = params[0].data, params[0].data.double(), None
    before, grads = tensors_of(params, optimizer), [p.grad for p in params]
    with pytest.raises(RuntimeError, match="float64"):
        optimizer.step(1.0)
    assert_same(before, tensors_of(params, optimizer))
    assert all(p.grad is grad for p, grad in zip(params, grads, strict=True))
    params[0].data = data
    optimizer.step(1.0)
    assert optimizer.steps_done == 1 and not torch.equal(params[0], before["parameter 0"])


@pytest.mark.parametrize("name", NAMES)
def test_an_expanded_gradient_is_that_of_its_numbers(name: str):
    found = []
    for expanded in (False, True):
        params, optimizer = make(name)
        for _ in range(2):
            for i, p in enumerate(params):
                row = torch.full((1,) * p.dim(), 0.1 + i)
                p.grad = row.expand(p.shape) if expanded else row.expand(p.shape).clone()
            optimizer.step(1.0)
        found.append(tensors_of(params, optimizer))
    assert_same(*found)


def test_a_model_that_becomes_half_precision_goes_on():
    params, optimizer = make("velo")
    step(params, optimizer)
    for p in params:
        p.grad = None
        p.data = p.data.bfloat16()
    step(params, optimizer)
    assert optimizer.steps_done == 2 and all(p.dtype == torch.bfloat16 for p in params)


def test_a_learning_rate_on_an_accelerator_that_is_not_a_number_skips_the_step():
    """Nobody may read it there, so it enters the decision; a prepared step stands in for the device."""
    params, optimizer = make("celo2", lr=1e-3)
    step(params, optimizer)
    optimizer._prepared.cache.device_settings["lr"] = torch.tensor([[float("nan")]], dtype=torch.float64)
    optimizer._prepared.setting = lambda name, groups, factor=1.0: torch.full((len(groups),), float("nan"))
    before = tensors_of(params, optimizer)
    step(params, optimizer)
    assert_same(before, tensors_of(params, optimizer), "nonfinite_steps", "nonfinite_in_a_row")
