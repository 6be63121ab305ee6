"""The operators of the library: their schemas, fake kernels and registration.

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

* :func:`advance`              decides about the step, counts it, and forms the inputs of the scheduler;
* :func:`pool`, :func:`lstm_step`  are the scheduler around its two matrix products;
* :func:`specialize_networks`  brings the networks into the form that ``apply_network`` takes;
* :func:`assign`               stores new state; :func:`zero_nan` is for rules that take NaN in a gradient for 0.

Each is called with its arguments as an object of :mod:`hf_lopt.kernels.arguments`, from which its schema is made; the
plain kernel of the same name in :mod:`hf_lopt.kernels.reference` specifies what it computes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_lopt.features import FEATURES, SHARED_INPUTS, STAT_PAIRS, STEP
from hf_lopt.kernels import dispatch, held
from hf_lopt.kernels.arguments import (
    AdamStep,
    Advance,
    ApplyNetwork,
    Assign,
    Descend,
    FeatureSums,
    LstmStep,
    Orthogonalize,
    Pool,
    SpecializeNetworks,
    Sums,
    UpdateFactored,
    ZeroNan,
)
from hf_lopt.kernels.dispatch import Kind, Operator, Result
from hf_lopt.kernels.held import HeldList
from hf_lopt.kernels.reference import newton_schulz, passes, scheduler, steps


def _check_tensors(x: Sums | FeatureSums | AdamStep) -> None:
    for p, g, m, v in zip(x.params, x.grads, x.momenta, x.second_moments, strict=True):
        torch._check(p.shape == g.shape, lambda p=p, g=g: f"parameter {tuple(p.shape)} has gradient {tuple(g.shape)}")
        for name, state in (("momentum", m), ("second moment", v)):
            torch._check(
                state.shape[1:] == p.shape and state.dtype in dispatch.STATE_DTYPES,
                lambda n=name, s=state, p=p: (
                    f"{n} must be float32, bfloat16 or codes of shape (decays, *{tuple(p.shape)}), got {s.dtype} "
                    f"{tuple(s.shape)}"
                ),
            )


def _rows(x: FeatureSums) -> int:
    """How many results there are: one for each tensor, or for each of its slices."""
    if not x.slice_axes:
        return len(x.params)
    return sum(len(passes.slice_indices(p.shape, x.slice_axes[2 * t : 2 * t + 2])) for t, p in enumerate(x.params))


def _width(x: FeatureSums) -> int:
    counts = (len(x.momentum_decays), len(x.second_decays), len(x.factored_decays))
    return sum(FEATURES[name].columns(*counts) for name in x.features)


def _pieces(like: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Float32 results in one piece of memory, as compiled kernels make them, each from a multiple of 64 bytes on."""
    sizes = [math.prod(shape) for shape in shapes]
    starts = list(itertools.accumulate((-(-n // 16) * 16 for n in sizes), initial=0))
    whole = like.new_empty(starts.pop(), dtype=torch.float32)
    return [whole.narrow(0, a, n).view(tuple(s)) for a, n, s in zip(starts, sizes, shapes, strict=True)]


def _fake_sums(x: Sums) -> tuple[list[Tensor], list[Tensor], Tensor]:
    _check_tensors(x)
    width = passes.stat_width(x.momenta, x.second_moments)

    def without(g: Tensor, axis: int) -> list[int]:
        return [n for i, n in enumerate(g.shape) if i != axis] if axis >= 0 else [0]

    pairs = zip(x.grads, x.row_axes, x.col_axes, strict=True)
    pieces = _pieces(x.params[0], [without(g, axis) for g, *axes in pairs for axis in axes])
    return pieces[::2], pieces[1::2], x.params[0].new_empty(len(x.params), width, dtype=torch.float64)


def _fake_update_factored(x: UpdateFactored) -> tuple[list[Tensor], ...]:
    pairs = [(r, c) if axis >= 0 else (None, None) for axis, r, c in zip(x.row_axes, x.rows, x.cols, strict=True)]
    shapes = [(0,) if y is None else y.shape for pair in pairs for y in (*pair, *pair)]
    pieces = _pieces(x.row_sums[0], shapes)
    return tuple(pieces[k::4] for k in range(4))


def _fake_feature_sums(x: FeatureSums) -> Tensor:
    _check_tensors(x)
    return x.params[0].new_empty(_rows(x), _width(x), dtype=torch.float64)


def _fake_apply_network(x: ApplyNetwork) -> tuple[Tensor, Tensor]:
    _check_tensors(x)
    inputs, width = x.weights[0].shape[1], _width(x)
    torch._check(inputs == width, lambda: f"the first layer has {inputs} inputs, the features have {width} columns")
    sums = x.params[0].new_empty(_rows(x), x.weights[-1].shape[-1] - 1, dtype=torch.float64)
    return sums, sums.new_empty(len(sums), passes.stat_width(x.momenta, x.second_moments))


def _fake_adam_step(x: AdamStep) -> Tensor:
    _check_tensors(x)
    return x.params[0].new_empty(len(x.params), dtype=torch.float64)


def _fake_descend(x: Descend) -> None:
    for p, step in zip(x.params, x.steps, strict=True):
        torch._check(
            p.shape == step.shape, lambda p=p, s=step: f"parameter {tuple(p.shape)} has step {tuple(s.shape)}"
        )


def _fake_orthogonalize(x: Orthogonalize) -> tuple[Tensor, Tensor]:
    torch._check(x.x.dim() >= 2, lambda: f"there must be matrices, got a tensor of shape {tuple(x.x.shape)}")
    return x.x.new_empty(x.x.shape, dtype=torch.float32), x.x.new_empty(x.x.shape[:-2], dtype=torch.float32)


def _fake_advance(x: Advance) -> tuple[Tensor, Tensor, Tensor]:
    skip = x.counters.new_empty((), dtype=torch.bool)
    features = x.counters.new_empty(STEP.stop + len(x.correction_decays), dtype=torch.float32)
    width = SHARED_INPUTS
    if x.tensor_inputs:
        second_moments = (x.tensor_inputs[0].shape[1] - STAT_PAIRS) // 2 - 3
        width += second_moments + x.tensor_inputs[3].shape[1] + 6
    return skip, features, features.new_empty(x.rows, width)


def _fake_pool(x: Pool) -> Tensor:
    torch._check(
        x.mixed.shape == (len(x.hidden), 2 * x.hidden[0].shape[0]),
        lambda: f"{len(x.hidden)} tensors of {x.hidden[0].shape[0]} hidden units have rows {tuple(x.mixed.shape)}",
    )
    return torch.empty_like(x.mixed)


def _fake_lstm_step(x: LstmStep) -> tuple[Tensor, Tensor, Tensor]:
    rows, controls = len(x.gates), x.heads.shape[1] - 1
    return x.gates.new_empty(rows, controls), x.gates.new_empty(rows), x.gates.new_empty(rows, x.bank.shape[1])


def _fake_specialize_networks(x: SpecializeNetworks) -> tuple[Tensor, Tensor, Tensor]:
    size = 0
    if x.sizes:
        inputs = x.sizes[0] - (x.constants.shape[-1] if x.constants is not None else 0)
        widths = [inputs, *x.sizes[1:-1], x.outputs]
        size = sum((a + 1) * b for a, b in zip(widths, widths[1:], strict=False))
    rows = len(x.numel)
    return x.networks.new_empty(rows, size), x.lr.new_empty(rows), x.lr.new_empty(rows)


def _fake_assign(x: Assign) -> None:
    for target, value in zip(x.targets, x.values, strict=True):
        torch._check(
            target.shape == value.shape,
            lambda t=target, v=value: f"state {tuple(t.shape)} has new value {tuple(v.shape)}",
        )


def _fake_zero_nan(x: ZeroNan) -> None:
    pass


_library = torch.library.Library("hf_lopt", "DEF")
# What csrc/held_lists.h keeps.
_library.define("hold(Tensor[] tensors, int number) -> ()")
_library.define("release(Tensor like, int number) -> ()")
_library.define("fetch(Tensor like, int number) -> Tensor[]")
_library.define("same_kinds(Tensor like, int[] numbers, int[] strided, int kinds) -> bool")


def _define(
    arguments: type[Kind], reference: Callable[[Kind], Result], fake: Callable[[Kind], Any]
) -> Operator[Kind, Result]:
    """Define an operator with its plain kernel, for any device without one of its own, and its fake kernel."""
    name = arguments.OPERATOR
    _library.define(name + arguments.schema(), tags=(torch.Tag.pt2_compliant_tag,))

    count = len(dataclasses.fields(arguments))  # behind them are the numbers of held lists

    def plain_kernel(*values: Any) -> Any:
        assert len(values) < count + 2 or not values[-1], "the plain kernels hold no lists"
        return reference(arguments(*values[:count]))

    def fake_kernel(*values: Any) -> Any:
        return fake(arguments(*values[:count]))

    _library.impl(name, plain_kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hf_lopt::{name}", fake_kernel, lib=_library)
    return Operator(arguments, reference)


sums = _define(Sums, passes.sums, _fake_sums)
update_factored = _define(UpdateFactored, passes.update_factored, _fake_update_factored)
feature_sums = _define(FeatureSums, passes.feature_sums, _fake_feature_sums)
apply_network = _define(ApplyNetwork, passes.apply_network, _fake_apply_network)
adam_step = _define(AdamStep, steps.adam_step, _fake_adam_step)
descend = _define(Descend, steps.descend, _fake_descend)
orthogonalize = _define(Orthogonalize, newton_schulz.orthogonalize, _fake_orthogonalize)
advance = _define(Advance, scheduler.advance, _fake_advance)
pool = _define(Pool, scheduler.pool, _fake_pool)
lstm_step = _define(LstmStep, scheduler.lstm_step, _fake_lstm_step)
specialize_networks = _define(SpecializeNetworks, scheduler.specialize_networks, _fake_specialize_networks)
assign = _define(Assign, scheduler.assign, _fake_assign)
zero_nan = _define(ZeroNan, scheduler.zero_nan, _fake_zero_nan)

OPERATORS: Sequence[Operator[Any, Any]] = (
    *(sums, update_factored, feature_sums, apply_network, adam_step, descend, orthogonalize),
    *(advance, pool, lstm_step, specialize_networks, assign, zero_nan),
)
# The compiled libraries register kernels for operators that have been defined.
dispatch.load()

plain = dispatch.plain


def holds(tensors: HeldList) -> bool:
    """Whether the compiled library of the tensors' device can keep the list."""
    devices = {x.device for x in tensors} if tensors.can_be_held else set()
    return len(devices) == 1 and (kind := devices.pop().type) in held.DEVICES and dispatch.loaded(kind)
