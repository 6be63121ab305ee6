"""small_fc_lopt, μLO and ELO, the optimizers of :mod:`hf_lopt.rules.small_fc`."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT

from hf_lopt.optimizer import LearnedOptimizer
from hf_lopt.optimizers.argument_types import AxisOrder, Precision, StateDtype, WeightsSource


class SmallFC(LearnedOptimizer):
    """small_fc_lopt: one per-element network for all tensors, with features of the step count. Needs no loss.

    Metz et al. 2022, "Practical tradeoffs between memory, compute, and performance in learned optimizers",
    arXiv:2203.11860; reference: google/learned_optimization, adafac_mlp_lopt.

    Args:
        params: parameters or parameter groups.
        lr: multiplier of the rule's own step size, no unit, per group. Default 1.0.
        weights: "auto" (default), "published", "bundled", a hub id, a path, a mapping or ``Weights``; see
            :func:`hf_lopt.weights.load`.
        weight_decay: decoupled decay, p <- p - lr * weight_decay * p; no unit, per group. Default 0.0.
        axis_order: how the axes of a tensor lie, per group. Default "torch", (out, in, *kernel).
        step_mult: factor of the network's first output, in units of the parameter. Default 0.001.
        exp_mult: factor of its second output, a log scale: the step is o0 exp(exp_mult o1) step_mult. Default 0.001.
        step_scale: multiplier of the final step, no unit, per group. Default 1.0.
        precision: of the network on a GPU: "exact" (default), the accuracy of float32; or "tf32", faster, with matrix
            products in TF32 that change steps by a few parts in 10^4. On a CPU both are "exact".
        max_grad_norm: largest 2-norm of all gradients, in units of the gradient; 0.0 (default): no clipping.
        max_nonfinite_steps: skipped steps in a row that are an error. Default 10.
        state_dtype: what momenta and second moments of matrices are stored in, per group: "float32" (default),
            "bfloat16" or "int8"; see docs/memory.md.
        stochastic_rounding: whether bfloat16 parameters are rounded at random instead of to nearest, so that steps
            below half a unit are not lost. Default False.

    Raises:
        ValueError: for an empty parameter list, other dtypes, values out of range, and weights that cannot be loaded.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        weights: WeightsSource = "auto",
        weight_decay: float = 0.0,
        axis_order: AxisOrder = "torch",
        step_mult: float = 0.001,
        exp_mult: float = 0.001,
        step_scale: float = 1.0,
        precision: Precision = "exact",
        max_grad_norm: float = 0.0,
        max_nonfinite_steps: int = 10,
        state_dtype: StateDtype = "float32",
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(
            params,
            "small_fc_lopt",
            lr=lr,
            weights=weights,
            weight_decay=weight_decay,
            axis_order=axis_order,
            step_mult=step_mult,
            exp_mult=exp_mult,
            step_scale=step_scale,
            precision=precision,
            max_grad_norm=max_grad_norm,
            max_nonfinite_steps=max_nonfinite_steps,
            state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
        )


class MuLO(LearnedOptimizer):
    """μLO: small_fc_lopt with a multiplier for the width of each tensor, its ``step_scale``. Needs no loss.

    Thérien et al. 2024, "μLO: Compute-Efficient Meta-Generalization of Learned Optimizers", arXiv:2406.00153.
    ``hf_lopt.param_groups(model, "mulo", base_width=...)`` makes groups with the multipliers. NaN in a gradient counts
    as 0, as in the reference.

    Args:
        params: parameters or parameter groups.
        lr: multiplier of the rule's own step size, no unit, per group. Default 1.0.
        weights: "auto" (default), "published", "bundled", a hub id, a path, a mapping or ``Weights``; see
            :func:`hf_lopt.weights.load`.
        weight_decay: decoupled decay, p <- p - lr * weight_decay * p; no unit, per group. Default 0.0.
        axis_order: how the axes of a tensor lie, per group. Default "torch", (out, in, *kernel).
        step_mult: factor of the network's first output, in units of the parameter. Default 0.01.
        exp_mult: factor of its second output, a log scale: the step is o0 exp(exp_mult o1) step_mult. Default 0.001.
        step_scale: multiplier of the final step, base width / width, per group. Default 1.0.
        precision: of the network on a GPU: "exact" (default), the accuracy of float32; or "tf32", faster, with matrix
            products in TF32 that change steps by a few parts in 10^4. On a CPU both are "exact".
        max_grad_norm: largest 2-norm of all gradients, in units of the gradient; 0.0 (default): no clipping.
        max_nonfinite_steps: skipped steps in a row that are an error. Default 10.
        state_dtype: what momenta and second moments of matrices are stored in, per group: "float32" (default),
            "bfloat16" or "int8"; see docs/memory.md.
        stochastic_rounding: whether bfloat16 parameters are rounded at random instead of to nearest, so that steps
            below half a unit are not lost. Default False.

    Raises:
        ValueError: for an empty parameter list, other dtypes, values out of range, and weights that cannot be loaded.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        weights: WeightsSource = "auto",
        weight_decay: float = 0.0,
        axis_order: AxisOrder = "torch",
        step_mult: float = 0.01,
        exp_mult: float = 0.001,
        step_scale: float = 1.0,
        precision: Precision = "exact",
        max_grad_norm: float = 0.0,
        max_nonfinite_steps: int = 10,
        state_dtype: StateDtype = "float32",
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(
            params,
            "mulo",
            lr=lr,
            weights=weights,
            weight_decay=weight_decay,
            axis_order=axis_order,
            step_mult=step_mult,
            exp_mult=exp_mult,
            step_scale=step_scale,
            precision=precision,
            max_grad_norm=max_grad_norm,
            max_nonfinite_steps=max_nonfinite_steps,
            state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
        )


class ELO(LearnedOptimizer):
    """ELO: the network of small_fc_lopt under an ordinary learning-rate schedule. Needs no loss.

    We know of no paper; the weights are published as ``DiamondXL/elo``. NaN in a gradient counts as 0.

    Args:
        params: parameters or parameter groups.
        lr: step size, in units of the parameter, per group; the schedule is the caller's. Default 1e-3.
        weights: "auto" (default), "published", "bundled", a hub id, a path, a mapping or ``Weights``; see
            :func:`hf_lopt.weights.load`.
        weight_decay: decoupled decay, p <- p - lr * weight_decay * p; no unit, per group. Default 0.0.
        axis_order: how the axes of a tensor lie, per group. Default "torch", (out, in, *kernel).
        step_mult: factor of the network's first output, no unit. Default 1.0.
        exp_mult: factor of its second output, a log scale: lr o0 exp(exp_mult o1) step_mult. Default 0.001.
        step_scale: multiplier of the final step, no unit, per group. Default 1.0.
        precision: of the network on a GPU: "exact" (default), the accuracy of float32; or "tf32", faster, with matrix
            products in TF32 that change steps by a few parts in 10^4. On a CPU both are "exact".
        max_grad_norm: largest 2-norm of all gradients, in units of the gradient; 0.0 (default): no clipping.
        max_nonfinite_steps: skipped steps in a row that are an error. Default 10.
        state_dtype: what momenta and second moments of matrices are stored in, per group: "float32" (default),
            "bfloat16" or "int8"; see docs/memory.md.
        stochastic_rounding: whether bfloat16 parameters are rounded at random instead of to nearest, so that steps
            below half a unit are not lost. Default False.

    Raises:
        ValueError: for an empty parameter list, other dtypes, values out of range, and weights that cannot be loaded.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weights: WeightsSource = "auto",
        weight_decay: float = 0.0,
        axis_order: AxisOrder = "torch",
        step_mult: float = 1.0,
        exp_mult: float = 0.001,
        step_scale: float = 1.0,
        precision: Precision = "exact",
        max_grad_norm: float = 0.0,
        max_nonfinite_steps: int = 10,
        state_dtype: StateDtype = "float32",
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(
            params,
            "elo",
            lr=lr,
            weights=weights,
            weight_decay=weight_decay,
            axis_order=axis_order,
            step_mult=step_mult,
            exp_mult=exp_mult,
            step_scale=step_scale,
            precision=precision,
            max_grad_norm=max_grad_norm,
            max_nonfinite_steps=max_nonfinite_steps,
            state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
        )
