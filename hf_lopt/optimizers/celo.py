"""Celo and Celo-Adam, the optimizers of :mod:`hf_lopt.rules.celo`."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT

from hf_lopt.optimizer import LearnedOptimizer
from hf_lopt.optimizers.argument_types import AxisOrder, StateDtype, WeightsSource


class Celo(LearnedOptimizer):
    """Celo: one per-element network and an LSTM that sees the run alone. Needs the loss and the length of the run.

    Moudgil et al. 2025, "Celo: Training Versatile Learned Optimizers on a Compute Diet", arXiv:2501.12670; reference:
    github.com/amoudgl/celo.

    Args:
        params: parameters or parameter groups.
        lr: multiplier of the rule's own step size, no unit, per group. Default 1.0.
        num_training_steps: length of the run in optimizer steps; None (default): set later, before the first step.
        weights: "auto" (default), "published", "bundled", a hub id, a path, a mapping or ``Weights``; see
            :func:`hf_lopt.weights.load`.
        weight_decay: decoupled decay, p <- p - lr * weight_decay * p; no unit, per group. Default 0.0.
        axis_order: how the axes of a tensor lie, per group. Default "torch", (out, in, *kernel).
        min_param_scale: least RMS of a tensor that its step is relative to, in units of the parameter, per group; 0 is
            the reference. None (default): decided per tensor when its state is made, see :mod:`hf_lopt.least_sizes`.
        max_nonfinite_steps: skipped steps in a row that are an error. Default 10.
        max_training_steps: in a run of more optimizer steps, several steps are one update, of their mean gradient;
            0 (default): no limit.
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
        num_training_steps: int | None = None,
        weights: WeightsSource = "auto",
        weight_decay: float = 0.0,
        axis_order: AxisOrder = "torch",
        min_param_scale: float | None = None,
        max_nonfinite_steps: int = 10,
        max_training_steps: int = 0,
        state_dtype: StateDtype = "float32",
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(
            params,
            "celo",
            lr=lr,
            num_training_steps=num_training_steps,
            weights=weights,
            weight_decay=weight_decay,
            axis_order=axis_order,
            min_param_scale=min_param_scale,
            max_nonfinite_steps=max_nonfinite_steps,
            max_training_steps=max_training_steps,
            state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
        )


class CeloAdam(LearnedOptimizer):
    """Celo-Adam: Celo's LSTM schedule over Adam. Needs the loss and the length of the run.

    Moudgil et al. 2025, "Celo: Training Versatile Learned Optimizers on a Compute Diet", arXiv:2501.12670; reference:
    github.com/amoudgl/celo.

    Args:
        params: parameters or parameter groups.
        lr: multiplier of the rule's own step size, no unit, per group. Default 1.0.
        num_training_steps: length of the run in optimizer steps; None (default): set later, before the first step.
        weights: "auto" (default), "published", "bundled", a hub id, a path, a mapping or ``Weights``; see
            :func:`hf_lopt.weights.load`.
        weight_decay: decoupled decay, p <- p - lr * weight_decay * p; no unit, per group. Default 0.0.
        axis_order: how the axes of a tensor lie, per group. Default "torch", (out, in, *kernel).
        max_nonfinite_steps: skipped steps in a row that are an error. Default 10.
        max_training_steps: in a run of more optimizer steps, several steps are one update, of their mean gradient;
            0 (default): no limit.
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
        num_training_steps: int | None = None,
        weights: WeightsSource = "auto",
        weight_decay: float = 0.0,
        axis_order: AxisOrder = "torch",
        max_nonfinite_steps: int = 10,
        max_training_steps: int = 0,
        state_dtype: StateDtype = "float32",
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(
            params,
            "celo_adam",
            lr=lr,
            num_training_steps=num_training_steps,
            weights=weights,
            weight_decay=weight_decay,
            axis_order=axis_order,
            max_nonfinite_steps=max_nonfinite_steps,
            max_training_steps=max_training_steps,
            state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
        )
