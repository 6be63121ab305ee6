"""rnn_mlp, the optimizer of :mod:`hf_lopt.rules.rnn_mlp`."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT

from hf_lopt.optimizer import LearnedOptimizer
from hf_lopt.optimizers.argument_types import AxisOrder, StateDtype, WeightsSource


class RNNMLP(LearnedOptimizer):
    """rnn_mlp: an LSTM per tensor and a network per parameter, which send messages to each other. Needs the loss.

    Metz et al. 2020, "Tasks, stability, architecture, and compute: Training more effective learned optimizers, and
    using them to train themselves", arXiv:2009.11243; reference: google/learned_optimization, rnn_mlp_lopt. Tensors
    have at most four axes.

    Args:
        params: parameters or parameter groups.
        lr: multiplier of the rule's own step size, no unit, per group. Default 1.0.
        weights: "auto" (default), "published", "bundled", a hub id, a path, a mapping or ``Weights``; see
            :func:`hf_lopt.weights.load`.
        weight_decay: decoupled decay, p <- p - lr * weight_decay * p; no unit, per group. Default 0.0.
        axis_order: how the axes of a tensor lie, per group. Default "torch", (out, in, *kernel).
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
        max_nonfinite_steps: int = 10,
        state_dtype: StateDtype = "float32",
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(
            params,
            "rnn_mlp",
            lr=lr,
            weights=weights,
            weight_decay=weight_decay,
            axis_order=axis_order,
            max_nonfinite_steps=max_nonfinite_steps,
            state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
        )
