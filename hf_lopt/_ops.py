"""The operators of the library: their schemas, shape checks and registration.

A step is three passes over the parameters, each one operator that takes lists of *local* tensors (never DTensors) and
returns small per-tensor arrays. What lies between two passes is per-tensor arithmetic, and the place where the sums of
a sharded tensor are reduced:

* :func:`sums`             reads the gradient: row and column sums of g², and the scalar statistics of each tensor;
* :func:`update_factored`  forms the new row and column accumulators and their factors, small vectors;
* :func:`feature_sums`     reads everything: the sum of squares of every feature column;
* :func:`apply_network`    evaluates the network on the scaled features, stores the accumulators and the parameter.

Three more stand beside them: :func:`adam_step`, a whole step of Adam, :func:`orthogonalize`, what may be done to a
network's output before it is applied, and :func:`descend`, which applies it. What lies between the passes is small,
but on an accelerator every call of PyTorch is a launch. So it has operators, too:

* :func:`advance`       decides about the step, counts it, and forms the inputs of the scheduler;
* :func:`pool`, :func:`lstm_step`  are the scheduler around its two matrix products;
* :func:`fold_network`  brings the networks into the form that ``apply_network`` takes;
* :func:`assign`        stores new state; :func:`zero_nan` is for rules that take NaN in a gradient for 0.

:mod:`hf_lopt._plain`, :mod:`hf_lopt._plain_steps` and :mod:`hf_lopt._plain_scheduler` specify them in plain PyTorch,
and describe the tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hf_lopt import _load, _plain, _plain_scheduler, _plain_steps
from hf_lopt._plain import STAT_NONFINITE, STAT_P2, STAT_PAIRS, feature_width, slice_indices, stat_width


__all__ = ["STAT_NONFINITE", "STAT_P2", "STAT_PAIRS", "feature_width", "stat_width"]

# Arguments that all passes after the first share: the tensors, their accumulators and how to form features from them.
_COMMON = (
    "str[] features, Tensor{p}[] params, Tensor[] grads, Tensor{m}[] momenta, Tensor{v}[] second_moments, "
    "Tensor{d}[] diagonals, Tensor[] rows, Tensor[] cols, Tensor[] row_factors, Tensor[] col_factors, "
    "int[] row_axes, int[] col_axes, int[] slice_axes, "
    "float[] momentum_decays, float[] second_decays, float[] factored_decays, "
    "float clip, float second_eps, float diagonal_eps"
)
SCHEMAS = {
    "sums": (
        "(Tensor[] params, Tensor[] grads, Tensor[] momenta, Tensor[] second_moments, "
        "int[] row_axes, int[] col_axes, float clip, bool moments) -> (Tensor[], Tensor[], Tensor)"
    ),
    "update_factored": (
        "(Tensor[] rows, Tensor[] cols, Tensor[] row_sums, Tensor[] col_sums, Tensor[] row_means, "
        "int[] row_sizes, int[] col_sizes, int[] row_axes, int[] col_axes, float[] decays) "
        "-> (Tensor[], Tensor[], Tensor[], Tensor[])"
    ),
    "feature_sums": "(" + _COMMON.format(p="", m="", v="", d="") + ") -> Tensor",
    "apply_network": (
        "("
        + _COMMON.format(p="(a!)", m="(b!)", v="(c!)", d="(d!)")
        + ", Tensor[] weights, Tensor[] biases, Tensor scale, Tensor decay, float exp_mult, Tensor skip, "
        "Tensor(e!)[] out) -> (Tensor, Tensor)"
    ),
    "adam_step": (
        "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momenta, Tensor(c!)[] second_moments, "
        "float momentum_decay, float second_decay, float clip, Tensor scale, Tensor decay, "
        "Tensor momentum_correction, Tensor second_correction, float inner_eps, float outer_eps, Tensor skip) "
        "-> Tensor"
    ),
    "descend": (
        "(Tensor(a!)[] params, Tensor[] steps, Tensor lr, Tensor weight_decay, Tensor? squares, Tensor? numel, "
        "float norm_eps, int[] slice_axes, Tensor skip) -> ()"
    ),
    "orthogonalize": (
        "(Tensor x, ScalarType dtype, float[] coefficients, int steps, float eps, float? norm_eps) -> (Tensor, Tensor)"
    ),
    "advance": (
        "(Tensor[] stats, Tensor[] sums, Tensor? bad, Tensor? loss, Tensor(a!) counters, Tensor(b!)[] loss_buffer, "
        "float horizon, float[] corrected, Tensor[] own, int p_column, int rows) -> (Tensor, Tensor, Tensor)"
    ),
    "pool": "(Tensor mixed, Tensor[] hidden) -> Tensor",
    "lstm_step": (
        "(Tensor gates, Tensor(a!)[] hidden, Tensor(b!)[] cell, Tensor heads, Tensor heads_bias, Tensor bank, "
        "bool celo, Tensor skip) -> (Tensor, Tensor, Tensor)"
    ),
    "fold_network": (
        "(Tensor networks, int[] sizes, int outputs, Tensor? constants, Tensor sums, Tensor numel, float norm_eps, "
        "Tensor lr, Tensor weight_decay, Tensor[] factors, Tensor? floor, float step_mult, int p_column) "
        "-> (Tensor, Tensor, Tensor)"
    ),
    "assign": "(Tensor(a!)[] targets, Tensor[] values, Tensor skip) -> ()",
    "zero_nan": "(Tensor(a!)[] tensors) -> ()",
}


def _fake_sums(params, grads, momenta, second_moments, row_axes, col_axes, clip, moments):
    _check(params, grads, momenta, second_moments)
    width = stat_width(momenta, second_moments)

    def without(g: torch.Tensor, axis: int) -> torch.Tensor:
        shape = [n for i, n in enumerate(g.shape) if i != axis] if axis >= 0 else [0]
        return g.new_empty(shape, dtype=torch.float32)

    rows = [without(g, axis) for g, axis in zip(grads, row_axes, strict=True)]
    cols = [without(g, axis) for g, axis in zip(grads, col_axes, strict=True)]
    return rows, cols, params[0].new_empty(len(params), width, dtype=torch.float64)


def _fake_update_factored(rows, cols, row_sums, col_sums, *args):
    factored = [a >= 0 for a in args[3]]
    pairs = zip(factored, rows, cols, row_sums, strict=True)
    new = [(torch.empty_like(r), torch.empty_like(c)) if f else (s.new_empty(0),) * 2 for f, r, c, s in pairs]
    return tuple([torch.empty_like(pair[k]) for pair in new] for k in (0, 1, 0, 1))


def _rows(params: Sequence[torch.Tensor], slice_axes: Sequence[int]) -> int:
    """How many results there are: one for each tensor, or for each of its slices."""
    if not slice_axes:
        return len(params)
    return sum(len(slice_indices(p.shape, slice_axes[2 * t : 2 * t + 2])) for t, p in enumerate(params))


def _width(features: Sequence[str], *decays: Sequence[float]) -> int:
    return sum(feature_width(name, *map(len, decays)) for name in features)


def _fake_feature_sums(*args):
    _check(*args[1:5])
    width = _width(args[0], *args[13:16])
    return args[1][0].new_empty(_rows(args[1], args[12]), width, dtype=torch.float64)


def _fake_apply_network(*args):
    _check(*args[1:5])
    weights, width = args[19], _width(args[0], *args[13:16])
    torch._check(
        weights[0].shape[1] == width,
        lambda: f"the first layer has {weights[0].shape[1]} inputs, the features have {width} columns",
    )
    sums = args[1][0].new_empty(_rows(args[1], args[12]), weights[-1].shape[-1] - 1, dtype=torch.float64)
    return sums, sums.new_empty(len(sums), stat_width(args[3], args[4]))


def _fake_adam_step(params, grads, momenta, second_moments, *args):
    _check(params, grads, momenta, second_moments)
    return params[0].new_empty(len(params), dtype=torch.float64)


def _fake_descend(params, steps, *args):
    for p, step in zip(params, steps, strict=True):
        torch._check(
            p.shape == step.shape, lambda p=p, s=step: f"parameter {tuple(p.shape)} has step {tuple(s.shape)}"
        )


def _fake_orthogonalize(x, *args):
    torch._check(x.dim() >= 2, lambda: f"there must be matrices, got a tensor of shape {tuple(x.shape)}")
    return x.new_empty(x.shape, dtype=torch.float32), x.new_empty(x.shape[:-2], dtype=torch.float32)


def _fake_advance(stats, sums, bad, loss, counters, loss_buffer, horizon, corrected, own, p_column, rows):
    skip = counters.new_empty((), dtype=torch.bool)
    features = counters.new_empty(_plain_scheduler.STEP.stop + len(corrected), dtype=torch.float32)
    width = _plain_scheduler.SHARED_INPUTS
    if own:
        second_moments = (own[0].shape[1] - STAT_PAIRS) // 2 - 3
        width += second_moments + own[3].shape[1] + 6
    return skip, features, features.new_empty(rows, width)


def _fake_pool(mixed, hidden):
    torch._check(
        mixed.shape == (len(hidden), 2 * hidden[0].shape[0]),
        lambda: f"{len(hidden)} tensors of {hidden[0].shape[0]} hidden units have rows {tuple(mixed.shape)}",
    )
    return torch.empty_like(mixed)


def _fake_lstm_step(gates, hidden, cell, heads, heads_bias, bank, celo, skip):
    rows, controls = len(gates), heads.shape[1] - 1
    return gates.new_empty(rows, controls), gates.new_empty(rows), gates.new_empty(rows, bank.shape[1])


def _fake_fold_network(networks, sizes, outputs, constants, sums, numel, norm_eps, lr, *args):
    size = 0
    if sizes:
        inputs = sizes[0] - (constants.shape[-1] if constants is not None else 0)
        widths = [inputs, *sizes[1:-1], outputs]
        size = sum((a + 1) * b for a, b in zip(widths, widths[1:], strict=False))
    rows = len(numel)
    return networks.new_empty(rows, size), lr.new_empty(rows), lr.new_empty(rows)


def _fake_assign(targets, values, skip):
    for target, value in zip(targets, values, strict=True):
        torch._check(
            target.shape == value.shape,
            lambda t=target, v=value: f"state {tuple(t.shape)} has new value {tuple(v.shape)}",
        )


def _check(params, grads, momenta, second_moments) -> None:
    for p, g, m, v in zip(params, grads, momenta, second_moments, strict=True):
        torch._check(p.shape == g.shape, lambda p=p, g=g: f"parameter {tuple(p.shape)} has gradient {tuple(g.shape)}")
        for name, state in (("momentum", m), ("second moment", v)):
            torch._check(
                state.shape[1:] == p.shape and state.dtype == torch.float32,
                lambda n=name, s=state, p=p: (
                    f"{n} must be float32 of shape (decays, *{tuple(p.shape)}), got {s.dtype} {tuple(s.shape)}"
                ),
            )


# Operator -> its plain kernel and its fake one.
KERNELS = {
    "sums": (_plain.sums, _fake_sums),
    "update_factored": (_plain.update_factored, _fake_update_factored),
    "feature_sums": (_plain.feature_sums, _fake_feature_sums),
    "apply_network": (_plain.apply_network, _fake_apply_network),
    "adam_step": (_plain_steps.adam_step, _fake_adam_step),
    "descend": (_plain_steps.descend, _fake_descend),
    "orthogonalize": (_plain_steps.orthogonalize, _fake_orthogonalize),
    "advance": (_plain_scheduler.advance, _fake_advance),
    "pool": (_plain_scheduler.pool, _fake_pool),
    "lstm_step": (_plain_scheduler.lstm_step, _fake_lstm_step),
    "fold_network": (_plain_scheduler.fold_network, _fake_fold_network),
    "assign": (_plain_scheduler.assign, _fake_assign),
    "zero_nan": (_plain_scheduler.zero_nan, lambda tensors: None),
}
_library = torch.library.Library("hf_lopt", "DEF")
for _name in KERNELS:
    _library.define(_name + SCHEMAS[_name], tags=(torch.Tag.pt2_compliant_tag,))
# The operators have to be there before the compiled libraries register their kernels.
_load.load()
for _name, (_kernel, _fake) in KERNELS.items():
    # Any device without a kernel of its own gets the plain one.
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hf_lopt::{_name}", _fake, lib=_library)

plain = _load.plain
sums = _load.operator("sums", _plain.sums)
update_factored = _load.operator("update_factored", _plain.update_factored)
feature_sums = _load.operator("feature_sums", _plain.feature_sums)
apply_network = _load.operator("apply_network", _plain.apply_network)
adam_step = _load.operator("adam_step", _plain_steps.adam_step)
descend = _load.operator("descend", _plain_steps.descend)
orthogonalize = _load.operator("orthogonalize", _plain_steps.orthogonalize)
advance = _load.operator("advance", _plain_scheduler.advance)
pool = _load.operator("pool", _plain_scheduler.pool)
lstm_step = _load.operator("lstm_step", _plain_scheduler.lstm_step)
fold_network = _load.operator("fold_network", _plain_scheduler.fold_network)
assign = _load.operator("assign", _plain_scheduler.assign)
zero_nan = _load.operator("zero_nan", _plain_scheduler.zero_nan)
