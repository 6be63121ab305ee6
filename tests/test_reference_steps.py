"""The optimizers against `reference_steps`, which is itself held to the numbers of the JAX references.

Every rule, on the compiled and on the plain kernels, with dense weights and with the embedded ones, for tensors of all
ranks, axis orders and sizes; and every feature column by itself, with a network that copies it.
"""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

import golden
import reference_steps
from cases import ABSOLUTE, Case, rows
from hf_lopt import LearnedOptimizer, rules
from hf_lopt.kernels import ops


FILES = {
    "velo": "velo_s",
    "celo": "celo_synth",
    "celo_adam": "celo_adam_synth",
    "elo": "small_fc_lopt",
    "elo_celo2": "celo2",
}
TINY = 1e-38  # float32 has fewer digits below
HORIZON = 12
LOSSES = (2.0, 1.7, 9.0, 1.2, 0.3, 1.5)  # with a spike

# Shape, axis order, size of the parameter, size of the gradient. Small gradients show an epsilon that is wrong, large
# ones a factor that the normaliser would hide.
TENSORS = (
    ((), "torch", 1.0, 1.0),
    ((7,), "torch", 1e-5, 1e-4),
    ((5,), "torch", 1.0, 3e-15),
    ((3,), "torch", 1.0, 900.0),
    ((1, 6), "torch", 1.0, 1.0),
    ((6, 6), "torch", 1.0, 1e-4),
    ((5, 4), "jax", 1e-4, 900.0),
    ((4, 3), "jax", 1.0, 3e-15),
    ((4, 4, 3, 2), "torch", 1.0, 1e-2),
    ((3, 2, 5, 4), "jax", 1.0, 3e-5),
    ((4, 4, 3), "torch_transposed", 1.0, 1e-3),
    ((3, 5, 5), "torch_stacked", 1.0, 1.0),
)


# ---- the references' axis order


def reference_axes(rank: int, axis_order: str) -> list[int]:
    """Axis of the tensor for each axis of (*kernel, in, out)."""
    if rank < 2:
        return list(range(rank))
    first, last = list(range(rank - 2)), [rank - 2, rank - 1]
    return {
        "jax": first + last,
        "torch": [*range(2, rank), 1, 0],
        "torch_transposed": [*range(2, rank), 0, 1],
        "torch_stacked": [*first, rank - 1, rank - 2],
    }[axis_order]


def to_reference(x: torch.Tensor, axis_order: str) -> np.ndarray:
    return x.detach().double().numpy().transpose(reference_axes(x.dim(), axis_order))


def from_reference(x: np.ndarray, axis_order: str, leading: int = 0) -> np.ndarray:
    """Back; ``leading`` axes stay."""
    axes = reference_axes(x.ndim - leading, axis_order)
    return x.transpose([*range(leading), *(leading + int(axis) for axis in np.argsort(axes))])


# ---- one step of all tensors


def float64(arrays: dict) -> dict[str, np.ndarray]:
    return {name: np.asarray(x, dtype=np.float64) for name, x in arrays.items()}


def step(rule: str, params: dict, grads: dict, state: dict, theta: dict, loss: float, settings: dict) -> dict:
    """New parameters by name. ``settings`` of each tensor by name, as in ``optimizer.param_groups``."""

    def of(name: str, *keys: str) -> dict:
        return {key: settings[name][key] for key in ("lr", "weight_decay", *keys)}

    first = next(iter(params))
    if rule in ("velo", "velo_s"):
        more = of(first, "min_param_scale", "bank_scale")
        horizon = settings[first]["num_training_steps"]
        return reference_steps.velo(params, grads, state, theta, loss, horizon=horizon, **more)
    if rule == "rnn_mlp":
        return reference_steps.rnn_mlp(params, grads, state, theta, loss, **of(first))
    if settings[first].get("max_grad_norm"):
        grads = reference_steps.clip_global_norm(grads, settings[first]["max_grad_norm"])
    new = {}
    for name, p in params.items():
        arguments = (p, grads[name], state.setdefault(name, {}), theta)
        if rule in ("celo", "celo_adam"):
            more = of(name, *(("min_param_scale",) if rule == "celo" else ()))
            horizon = settings[name]["num_training_steps"]
            new[name] = getattr(reference_steps, rule)(*arguments, loss, horizon=horizon, **more)
        elif rule in ("small_fc_lopt", "mulo", "elo"):
            new[name] = reference_steps.small_fc(*arguments, **of(name, "step_scale", "step_mult", "exp_mult"))
        else:
            more = of(name, "orthogonalize", "branch", "adam_lr_mult", "adam_bias_correction")
            if more["branch"] == "auto":
                more["branch"] = "network" if p.ndim >= 2 else "adam"
            new[name] = reference_steps.celo2(*arguments, **more)
    return new


# ---- the reference steps themselves


def settings_of(case: Case, reference: golden.Golden) -> dict[str, dict]:
    own = {"num_training_steps": reference.num_steps} | case.settings
    return {name: rules.get(case.rule).defaults | own | case.of_tensor(name, reference) for name in reference.names}


@pytest.mark.parametrize("case", rows())
def test_reference_steps_follow_the_jax_references(case: Case):
    reference = golden.read(case.file)
    settings, theta, state = settings_of(case, reference), float64(reference.theta), {}
    params = float64({name: reference.raw[f"p0/{name}"] for name in reference.names})
    for t in range(1, reference.steps + 1):
        grads = float64({name: reference.grad(t, name) for name in reference.names})
        params = step(case.rule, params, grads, state, theta, float(reference.loss[t - 1]), settings)
        for name, p in params.items():
            want = reference.param(t, name)
            if want is not None:
                error = np.abs(p - want).max()
                assert error <= 1e-6 * (0.1 if name in ABSOLUTE else np.abs(want).max()), f"{name}, step {t}: {error}"
        stored, run = reference.state(t), state.get("run", state[reference.names[0]])
        for key, ours in (("lstm_in", "scheduler_inputs"), ("lr_mult", "lr_mult"), ("loss/means", "loss_means")):
            if key in stored and ours in run:
                want = stored[key] if np.ndim(run[ours]) == stored[key].ndim else stored[key][0]
                np.testing.assert_allclose(run[ours], want, rtol=3e-5, atol=3e-5, err_msg=f"{key}, step {t}")


# ---- the optimizers


def gradients(t: int) -> list[np.ndarray]:
    rng = np.random.default_rng(100 + t)
    found = []
    for shape, _, _, size in TENSORS:
        g = size * rng.standard_normal(shape)
        if size >= 1e-2:  # some that a clip changes
            g = np.where(rng.random(shape) < 0.1, 2000.0 * size, g)
        found.append(np.asarray(g, dtype=np.float32))
    return found


def build(rule: str, weights, **settings) -> tuple[LearnedOptimizer, list[torch.nn.Parameter]]:
    rng = np.random.default_rng(7)
    params = [
        torch.nn.Parameter(torch.tensor(size * rng.standard_normal(shape), dtype=torch.float32))
        for shape, _, size, _ in TENSORS
    ]
    groups = [{"params": [p], "axis_order": order} for p, (_, order, _, _) in zip(params, TENSORS, strict=True)]
    if rule in ("small_fc_lopt", "mulo", "elo"):
        for i, group in enumerate(groups):
            group["step_scale"] = 1.0 + 0.5 * (i % 3)
    if rules.get(rule).needs_horizon:
        settings["num_training_steps"] = HORIZON
    if "min_param_scale" in rules.get(rule).defaults:
        settings = {"min_param_scale": 0.0, **settings}
    if rules.get(rule).own_schedule:
        settings = {"lr": 1.0, **settings}  # given, and so as it is, however short the run
    return LearnedOptimizer(groups, rule, weights=weights, **settings), params


def check_state(optimizer: LearnedOptimizer, params: list, state: dict) -> None:
    run = state.get("run", state["0"])
    for i, (p, (_, order, _, _)) in enumerate(zip(params, TENSORS, strict=True)):
        for key, got in optimizer.state[p].items():
            want = state[str(i)][key]
            want = from_reference(want, order, leading=1).reshape(got.shape)
            small = 3e-5 * np.abs(want).max() + TINY
            np.testing.assert_allclose(got.numpy(), want, rtol=1e-4, atol=small, err_msg=f"{key} of {TENSORS[i]}")
    for key in optimizer.param_groups[0].keys() & run.keys() - {"step"}:
        got = optimizer.param_groups[0][key]
        np.testing.assert_allclose(got.numpy(), run[key], rtol=1e-5, atol=1e-5, err_msg=key)
    for key in optimizer.report.keys() & run.keys():
        got = optimizer.report[key].numpy()
        np.testing.assert_allclose(got, np.broadcast_to(run[key], got.shape), rtol=1e-4, atol=1e-4, err_msg=key)


def compare(optimizer: LearnedOptimizer, params: list, steps: int, share: float) -> None:
    """Steps of both. Parameters may differ by ``share`` of the furthest that they have been from their start, and by
    rounding: 3e-7 of the largest that they have been."""
    rule, theta, state = optimizer.rule.name, float64(optimizer.weights.theta), {}
    orders = [order for _, order, _, _ in TENSORS]
    settings = {str(i): group for i, group in enumerate(optimizer.param_groups)}
    ours = {str(i): to_reference(p, order) for i, (p, order) in enumerate(zip(params, orders, strict=True))}
    start = ours
    furthest, largest = dict.fromkeys(ours, 0.0), {name: np.abs(p).max() for name, p in ours.items()}
    for t in range(steps):
        for p, g in zip(params, gradients(t), strict=True):
            p.grad = torch.tensor(g)
        grads = {str(i): to_reference(p.grad, order) for i, (p, order) in enumerate(zip(params, orders, strict=True))}
        optimizer.step(LOSSES[t])
        ours = step(rule, ours, grads, state, theta, LOSSES[t], settings)
        for i, (name, want) in enumerate(ours.items()):
            furthest[name] = max(furthest[name], np.abs(want - start[name]).max())
            largest[name] = max(largest[name], np.abs(want).max())
            error = np.abs(to_reference(params[i], orders[i]) - want).max()
            bound = share * furthest[name] + 3e-7 * largest[name]
            assert error <= bound, f"{TENSORS[i]}, step {t}: off by {error:.2e}, allowed {bound:.2e}"
        check_state(optimizer, params, state)


@pytest.mark.parametrize("kernels", ["compiled", "plain"])
@pytest.mark.parametrize("weights", ["dense", "bundled"])
@pytest.mark.parametrize("rule", rules.names())
def test_optimizers_follow_the_reference_steps(rule: str, weights: str, kernels: str):
    settings = {"weight_decay": 0.1} | ({} if rules.get(rule).own_schedule else {"lr": 0.02})
    if "min_param_scale" in rules.get(rule).defaults:
        settings["min_param_scale"] = 1e-3
    if weights == "dense":
        if rule == "velo":
            settings["bank_scale"] = 1.0
        weights = golden.theta(FILES.get(rule, rule) + ".npz")
    optimizer, params = build(rule, weights, **settings)
    with ops.plain() if kernels == "plain" else contextlib.nullcontext():
        compare(optimizer, params, len(LOSSES), share=1e-5)


# ---- one feature column at a time

BANK, SMALL_FC, RNN_MLP = "ff_mod_stack/~/", "nn/~/", "ffmod_params/mlp/~/linear_"
BANK_LEAVES = ([f"{BANK}w0__{k}" for k in range(14)], f"{BANK}w1", f"{BANK}w2", f"{BANK}b2")
# Of each list of features the rule whose step is the simplest: columns, leaves of the network, size of the step.
COLUMNS = {
    "celo": (30, BANK_LEAVES, {"lr": 1e4}),
    "celo2_base": (30, BANK_LEAVES, {"lr": 1.0}),
    "small_fc_lopt": (39, ([f"{SMALL_FC}w0"], f"{SMALL_FC}w1", f"{SMALL_FC}w2", f"{SMALL_FC}b2"), {"lr": 1e3}),
    "rnn_mlp": (54, ([f"{RNN_MLP}0/w"], f"{RNN_MLP}1/w", f"{RNN_MLP}2/w", f"{RNN_MLP}2/b"), {"lr": 1e3}),
}


def copying(rule: str, column: int) -> dict[str, np.ndarray]:
    """Weights whose output o0 is an input of the per-element network, and whose o1 is 100.

    A ReLU network passes a number on as its positive and its negative part."""
    dense = golden.theta(FILES.get(rule, rule) + ".npz")
    theta = {leaf: np.zeros_like(x) for leaf, x in dense.items()}
    first, second, third, bias = COLUMNS[rule][1]
    for leaf in first:
        if 0 <= column < theta[leaf].shape[-2]:
            theta[leaf][..., column, 0], theta[leaf][..., column, 1] = 1.0, -1.0
        column -= theta[leaf].shape[-2]
    theta[second][..., 0, 0] = theta[second][..., 1, 1] = 1.0
    theta[third][..., 0, 0], theta[third][..., 1, 0] = 1.0, -1.0
    theta[bias][..., 1] = 100.0
    # Learned decays, of which one is clipped at 0, and what the LSTM of rnn_mlp says to the network.
    kept = ("momentum_decays", "rms_decays", "rnn_to_ff_params/rnn_to_ff/b", "rnn_to_in_params/rnn_to_in/b")
    theta |= {leaf: dense[leaf] for leaf in kept if leaf in dense}
    if "adafactor_decays" in theta:
        theta["adafactor_decays"][:] = 0.3, -0.05, 0.02
    return theta


@pytest.mark.parametrize(
    ("rule", "column"), [(rule, column) for rule, (count, _, _) in COLUMNS.items() for column in range(count)]
)
def test_every_column_follows_the_reference_steps(rule: str, column: int):
    optimizer, params = build(rule, copying(rule, column), **COLUMNS[rule][2])
    compare(optimizer, params, 2, share=3e-5)
