"""Every rule follows the trajectory of its JAX reference, in both axis orders, across a checkpoint in the middle.

Independent numbers: parameters and internals of the reference implementations, run on fixed inputs.
"""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch

import golden
from cases import ABSOLUTE, Case, devices, rows
from hf_lopt import LearnedOptimizer, rules


AXIS_ORDERS = ("jax", "torch")


def build(case: Case, reference: golden.Golden, params: list, orders: list[str] | str) -> LearnedOptimizer:
    """One group per tensor, with its axis order and its settings."""
    orders = [orders] * len(params) if isinstance(orders, str) else orders
    named = zip(params, reference.names, orders, strict=True)
    groups = [{"params": [p], "axis_order": o} | case.of_tensor(name, reference) for p, name, o in named]
    settings = dict(case.settings)
    if rules.get(case.rule).needs_horizon:
        settings["num_training_steps"] = reference.num_steps
    return LearnedOptimizer(groups, case.rule, weights=reference.theta, **settings)


def through_a_file(optimizer: LearnedOptimizer, fresh: LearnedOptimizer) -> LearnedOptimizer:
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    return fresh


def check_params(case: Case, reference: golden.Golden, params: list, t: int, axis_order: str) -> None:
    for name, p in zip(reference.names, params, strict=True):
        want = reference.param(t, name)
        if want is None:
            continue
        got = golden.from_layout(p.detach().cpu().numpy(), axis_order)
        error = np.abs(got.astype(np.float64) - want).max()
        relative = case.first if t == 1 else case.last
        bound = ABSOLUTE.get(name, relative * np.abs(want).max())
        assert error <= bound, f"step {t}, {name}: off by {error:.2e}, allowed {bound:.2e}"
        # Sharper, since steps are small next to the parameters; limited by the rounding of p in step 1.
        moved = np.abs(want - reference.raw[f"p0/{name}"]).max()
        if name not in ABSOLUTE and t in (1, reference.steps) and moved > 0:
            assert error <= (5e-4 if t == 1 else 1.5e-4) * moved, (
                f"step {t}, {name}: {error:.2e} of a step {moved:.2e}"
            )


def check_state(optimizer: LearnedOptimizer, reference: golden.Golden, params: list, t: int, axis_order: str) -> None:
    """Accumulators and scheduler state; the files have decays on the last axis."""
    stored = reference.state(t)
    keys = {"mom": "momentum", "rms": "second_moment", "fac_diag": "factored_diag"}
    keys |= {"adam_mom": "momentum", "adam_rms": "second_moment"}
    if axis_order == "jax":
        keys |= {"fac_row": "factored_row", "fac_col": "factored_col"}
    for i, (name, p) in enumerate(zip(reference.names, params, strict=True)):
        for key, ours in keys.items():
            want = stored.get(f"{key}/{name}")
            if want is None or ours not in optimizer.state[p]:
                continue  # Celo-Adam's reference carries factored accumulators that nothing uses
            want = golden.to_layout(np.moveaxis(want, -1, 0), axis_order, leading=1)
            got = optimizer.state[p][ours].cpu().numpy().reshape(want.shape)
            np.testing.assert_allclose(
                got, want, rtol=2e-5, atol=1e-5 * np.abs(want).max(), err_msg=f"{key} {name} {t}"
            )
        for key, ours in (("lstm_h", "lstm_hidden"), ("lstm_c", "lstm_cell"), ("from_mlp", "from_mlp")):
            if key in stored:
                got = optimizer.state[p][ours].cpu().numpy()[: stored[key].shape[1]]
                np.testing.assert_allclose(got, stored[key][i], rtol=2e-5, atol=4e-5, err_msg=f"{key} {name} {t}")


def check_report(optimizer: LearnedOptimizer, reference: golden.Golden, t: int) -> None:
    stored, report = reference.state(t), optimizer.report
    # Loss features are differences of nearly equal numbers; 2e-5 is what float32 gives the reference itself.
    for key, ours, tolerance in (
        ("loss_features", "loss_features", 3e-5),
        ("lstm_in", "scheduler_inputs", 3e-5),
        ("lr_mult", "lr_mult", 3e-5),
        ("controls", "controls", 5e-5),
    ):
        if key in stored and ours in report:
            got = report[ours].cpu().numpy()
            np.testing.assert_allclose(got, stored[key], rtol=tolerance, atol=tolerance, err_msg=f"{key}, step {t}")
    for key, ours in (
        ("loss/means", "loss_means"),
        ("loss/running_min", "loss_min"),
        ("train_loss_mean", "loss_mean"),
        ("train_loss_var", "loss_var"),
        ("clip_value", "clip_value"),
    ):
        if key in stored:
            np.testing.assert_allclose(optimizer.param_groups[0][ours].cpu().numpy(), stored[key], rtol=1e-6)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("axis_order", AXIS_ORDERS)
@pytest.mark.parametrize("case", rows())
def test_follows_the_reference(case: Case, axis_order: str, device: str):
    reference = golden.read(case.file)
    params = golden.parameters(reference, axis_order, device=device)
    optimizer = build(case, reference, params, axis_order)
    checked = 0
    for t in range(1, reference.steps + 1):
        golden.set_gradients(reference, t, params, axis_order)
        optimizer.step(float(reference.loss[t - 1]))
        check_params(case, reference, params, t, axis_order)
        check_report(optimizer, reference, t)
        if any(key.startswith(("mom/", "fac_row/")) for key in reference.state(t)):
            check_state(optimizer, reference, params, t, axis_order)
            checked += 1
        if t == reference.steps // 2:
            optimizer = through_a_file(optimizer, build(case, reference, params, axis_order))
    assert checked >= 1


@pytest.mark.parametrize("case", rows())
def test_axis_order_is_per_group(case: Case):
    """Half of the tensors in torch layout, half in JAX layout, in one optimizer."""
    reference = golden.read(case.file)
    orders = [AXIS_ORDERS[i % 2] for i in range(len(reference.names))]
    both = {order: golden.parameters(reference, order) for order in AXIS_ORDERS}
    params = [both[order][i] for i, order in enumerate(orders)]
    optimizer = build(case, reference, params, orders)
    for t in range(1, reference.steps + 1):
        for p, order, name in zip(params, orders, reference.names, strict=True):
            p.grad = torch.tensor(golden.to_layout(reference.grad(t, name), order))
        optimizer.step(float(reference.loss[t - 1]))
    for p, order, name in zip(params, orders, reference.names, strict=True):
        want = reference.param(reference.steps, name)
        error = np.abs(golden.from_layout(p.detach().cpu().numpy(), order) - want).max()
        assert error <= ABSOLUTE.get(name, case.last * np.abs(want).max()), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_are_rounded_once(dtype: torch.dtype):
    """A half-precision parameter is what the float32 computation from the same start gives, rounded."""
    reference = golden.read("velo_s.npz")
    case = Case("velo_s.npz", "velo", {"bank_scale": 1.0})
    half = golden.parameters(reference, "jax", dtype)
    optimizer = build(case, reference, half, "jax")
    for t in (1, 2, 3):
        full = [torch.nn.Parameter(p.detach().float()) for p in half]
        twin = build(case, reference, full, "jax")
        if t > 1:
            state = copy.deepcopy(optimizer.state_dict())
            twin.load_state_dict(state)
        golden.set_gradients(reference, t, half, "jax")
        for p, q in zip(half, full, strict=True):
            q.grad = p.grad.float()
        for o in (optimizer, twin):
            o.step(float(reference.loss[t - 1]))
        for p, q in zip(half, full, strict=True):
            assert torch.equal(p, q.to(dtype))
            assert all(s.dtype == torch.float32 for s in optimizer.state[p].values())
            for key, value in optimizer.state[p].items():
                assert torch.equal(value, twin.state[q][key]), key
