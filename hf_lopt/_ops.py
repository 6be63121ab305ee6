"""The operators of the library: their schemas, shape checks and registration.

A step is three passes over the parameters, each one operator that takes lists of *local* tensors (never DTensors) and
returns small per-tensor arrays. What lies between two passes is per-tensor arithmetic, and the place where the sums of
a sharded tensor are reduced:

* :func:`sums`             reads the gradient: row and column sums of g², and the scalar statistics of each tensor;
* :func:`update_factored`  forms the new row and column accumulators and their factors, small vectors;
* :func:`feature_sums`     reads everything: the sum of squares of every feature column;
* :func:`apply_network`    evaluates the network on the scaled features, stores the accumulators and the parameter.

Two more stand beside them: :func:`adam_step`, a whole step of Adam, and :func:`descend`, the end of a step whose
network output is worked on before it is applied.

:mod:`hf_lopt._plain` specifies them in plain PyTorch, and describes the tensors.
"""

from __future__ import annotations

import torch

from hf_lopt import _load, _plain
from hf_lopt._plain import STAT_NONFINITE, STAT_P2, STAT_PAIRS, Tensors, feature_width, stat_width


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
    "descend": "(Tensor(a!)[] params, Tensor[] steps, Tensor scale, Tensor decay, Tensor skip) -> ()",
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


def _fake_feature_sums(*args):
    x = Tensors(*args)
    _check(x.params, x.grads, x.momenta, x.second_moments)
    return x.params[0].new_empty(len(x.params), x.width, dtype=torch.float64)


def _fake_apply_network(*args):
    x, weights = Tensors(*args[:-7]), args[-7]
    _check(x.params, x.grads, x.momenta, x.second_moments)
    torch._check(
        weights[0].shape[1] == x.width,
        lambda: f"the first layer has {weights[0].shape[1]} inputs, the features have {x.width} columns",
    )
    sums = x.params[0].new_empty(len(x.params), weights[-1].shape[-1] - 1, dtype=torch.float64)
    return sums, sums.new_empty(len(x.params), stat_width(x.momenta, x.second_moments))


def _fake_adam_step(params, grads, momenta, second_moments, *args):
    _check(params, grads, momenta, second_moments)
    return params[0].new_empty(len(params), dtype=torch.float64)


def _fake_descend(params, steps, *args):
    for p, step in zip(params, steps, strict=True):
        torch._check(
            p.shape == step.shape, lambda p=p, s=step: f"parameter {tuple(p.shape)} has step {tuple(s.shape)}"
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


_KERNELS = {
    "sums": (_plain.sums, _fake_sums),
    "update_factored": (_plain.update_factored, _fake_update_factored),
    "feature_sums": (_plain.feature_sums, _fake_feature_sums),
    "apply_network": (_plain.apply_network, _fake_apply_network),
    "adam_step": (_plain.adam_step, _fake_adam_step),
    "descend": (_plain.descend, _fake_descend),
}
# Compiled kernels come with the same schemas, and are registered for the CPU.
_compiled = _load.load()
_library = torch.library.Library("hf_lopt", "FRAGMENT" if _compiled else "DEF")
for _name, (_kernel, _fake) in _KERNELS.items():
    if not _compiled:
        _library.define(_name + SCHEMAS[_name], tags=(torch.Tag.pt2_compliant_tag,))
    # Any device without a kernel of its own gets the plain one.
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hf_lopt::{_name}", _fake, lib=_library)

plain = _load.plain
sums = _load.operator("sums", _plain.sums)
update_factored = _load.operator("update_factored", _plain.update_factored)
feature_sums = _load.operator("feature_sums", _plain.feature_sums)
apply_network = _load.operator("apply_network", _plain.apply_network)
adam_step = _load.operator("adam_step", _plain.adam_step)
descend = _load.operator("descend", _plain.descend)
