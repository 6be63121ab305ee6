"""Celo2 and ELO-Celo2, the optimizers of :mod:`hf_lopt.rules.celo2`."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from hf_lopt.optimizer import LearnedOptimizer
from hf_lopt.optimizers.argument_types import AxisOrder, Branch, NewtonSchulzDtype, StateDtype, WeightsSource


class Celo2(LearnedOptimizer):
    """Celo2: an orthogonalised network update for matrices, Adam for vectors and embeddings. Needs no loss.

    Moudgil et al. 2026, "Celo2: Towards Learned Optimization Free Lunch", arXiv:2602.19142; reference:
    github.com/amoudgl/celo. Newton-Schulz orthogonalisation: Jordan et al. 2024, "Muon".
    ``hf_lopt.param_groups(model, "celo2")`` sends embeddings and the head to the Adam branch.

    Args:
        params: parameters or parameter groups.
        lr: step size, in units of the parameter, per group; the schedule is the caller's. Default 1e-3.
        weights: "auto" (default), "published", "bundled", a hub id, a path, a mapping or ``Weights``; see
            :func:`hf_lopt.weights.load`.
        weight_decay: decoupled decay, p <- p - lr * weight_decay * p; no unit, per group. Default 0.0.
        axis_order: how the axes of a tensor lie, which decides what the matrices are, per group. Default "torch",
            (out, in, *kernel).
        orthogonalize: whether the step of a matrix gets equal singular values, by Newton-Schulz. Default True.
        ns_dtype: what that iteration runs in, "float32" (default), "tf32", "bfloat16" or "auto": on CUDA "tf32", or
            "bfloat16" for parameters of that dtype. Elsewhere "tf32" and "auto" are "float32".
        branch: "network", "adam" or "auto" (Adam for tensors of rank < 2), per group. Default "auto".
        adam_lr_mult: the Adam branch's step size in units of lr. Default 20.0.
        adam_bias_correction: whether Adam corrects its moments for their start at zero. Default False.
        max_grad_norm: largest 2-norm of all gradients, in units of the gradient; 0.0: no clipping. Default 0.0.
        max_nonfinite_steps: skipped steps in a row that are an error. Default 10.
        state_dtype: what momenta and second moments of matrices are stored in, per group: "float32" (default),
            "bfloat16" or "int8"; see docs/memory.md.
        stochastic_rounding: whether bfloat16 parameters are rounded at random instead of to nearest, so that steps
            below half a unit are not lost. Default False.

    Raises:
        ValueError: for an empty parameter list, other dtypes, values out of range, and weights that cannot be loaded.
    """

    _optim_name: ClassVar[str] = "celo2"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weights: WeightsSource = "auto",
        weight_decay: float = 0.0,
        axis_order: AxisOrder = "torch",
        orthogonalize: bool = True,
        ns_dtype: NewtonSchulzDtype = "float32",
        branch: Branch = "auto",
        adam_lr_mult: float = 20.0,
        adam_bias_correction: bool = False,
        max_grad_norm: float = 0.0,
        max_nonfinite_steps: int = 10,
        state_dtype: StateDtype = "float32",
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(
            params,
            self._optim_name,
            lr=lr,
            weights=weights,
            weight_decay=weight_decay,
            axis_order=axis_order,
            orthogonalize=orthogonalize,
            ns_dtype=ns_dtype,
            branch=branch,
            adam_lr_mult=adam_lr_mult,
            adam_bias_correction=adam_bias_correction,
            max_grad_norm=max_grad_norm,
            max_nonfinite_steps=max_nonfinite_steps,
            state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
        )


class Celo2Base(Celo2):
    """``celo2_base``: Celo2 without orthogonalisation; every tensor goes through the network. Needs no loss.

    Moudgil et al. 2026, "Celo2: Towards Learned Optimization Free Lunch", arXiv:2602.19142; reference:
    github.com/amoudgl/celo.

    Args:
        params: parameters or parameter groups.
        lr: step size, in units of the parameter, per group; the schedule is the caller's. Default 1e-3.
        weights: "auto" (default), "published", "bundled", a hub id, a path, a mapping or ``Weights``; see
            :func:`hf_lopt.weights.load`.
        weight_decay: decoupled decay, p <- p - lr * weight_decay * p; no unit, per group. Default 0.0.
        axis_order: how the axes of a tensor lie, which decides what the matrices are, per group. Default "torch",
            (out, in, *kernel).
        orthogonalize: whether the step of a matrix gets equal singular values, by Newton-Schulz. Default False.
        ns_dtype: what that iteration runs in, "float32" (default), "tf32", "bfloat16" or "auto": on CUDA "tf32", or
            "bfloat16" for parameters of that dtype. Elsewhere "tf32" and "auto" are "float32".
        branch: "network", "adam" or "auto" (Adam for tensors of rank < 2), per group. Default "network".
        adam_lr_mult: the Adam branch's step size in units of lr. Default 20.0.
        adam_bias_correction: whether Adam corrects its moments for their start at zero. Default False.
        max_grad_norm: largest 2-norm of all gradients, in units of the gradient; 0.0: no clipping. Default 0.0.
        max_nonfinite_steps: skipped steps in a row that are an error. Default 10.
        state_dtype: what momenta and second moments of matrices are stored in, per group: "float32" (default),
            "bfloat16" or "int8"; see docs/memory.md.
        stochastic_rounding: whether bfloat16 parameters are rounded at random instead of to nearest, so that steps
            below half a unit are not lost. Default False.

    Raises:
        ValueError: for an empty parameter list, other dtypes, values out of range, and weights that cannot be loaded.
    """

    _optim_name: ClassVar[str] = "celo2_base"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weights: WeightsSource = "auto",
        weight_decay: float = 0.0,
        axis_order: AxisOrder = "torch",
        orthogonalize: bool = False,
        ns_dtype: NewtonSchulzDtype = "float32",
        branch: Branch = "network",
        adam_lr_mult: float = 20.0,
        adam_bias_correction: bool = False,
        max_grad_norm: float = 0.0,
        max_nonfinite_steps: int = 10,
        state_dtype: StateDtype = "float32",
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            weights=weights,
            weight_decay=weight_decay,
            axis_order=axis_order,
            orthogonalize=orthogonalize,
            ns_dtype=ns_dtype,
            branch=branch,
            adam_lr_mult=adam_lr_mult,
            adam_bias_correction=adam_bias_correction,
            max_grad_norm=max_grad_norm,
            max_nonfinite_steps=max_nonfinite_steps,
            state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
        )


class ELOCelo2(LearnedOptimizer):
    """ELO-Celo2: Celo2's network, with weight decay, a global-norm clip and the usual Adam. Needs no loss.

    We know of no paper; the weights are published as ``DiamondXL/elo-celo2``. Its authors let lr fall to a
    tenth along a cosine.

    Args:
        params: parameters or parameter groups.
        lr: step size, in units of the parameter, per group; the schedule is the caller's. Default 3.16e-4.
        weights: "auto" (default), "published", "bundled", a hub id, a path, a mapping or ``Weights``; see
            :func:`hf_lopt.weights.load`.
        weight_decay: decoupled decay, p <- p - lr * weight_decay * p; no unit, per group. Default 0.1.
        axis_order: how the axes of a tensor lie, which decides what the matrices are, per group. Default "torch",
            (out, in, *kernel).
        orthogonalize: whether the step of a matrix gets equal singular values, by Newton-Schulz. Default True.
        ns_dtype: what that iteration runs in, "float32" (default), "tf32", "bfloat16" or "auto": on CUDA "tf32", or
            "bfloat16" for parameters of that dtype. Elsewhere "tf32" and "auto" are "float32".
        branch: "network", "adam" or "auto" (Adam for tensors of rank < 2), per group. Default "auto".
        adam_lr_mult: the Adam branch's step size in units of lr. Default 20.0.
        adam_bias_correction: whether Adam corrects its moments for their start at zero. Default True.
        max_grad_norm: largest 2-norm of all gradients, in units of the gradient; 0.0: no clipping. Default 1.0.
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
        lr: float | Tensor = 3.16e-4,
        weights: WeightsSource = "auto",
        weight_decay: float = 0.1,
        axis_order: AxisOrder = "torch",
        orthogonalize: bool = True,
        ns_dtype: NewtonSchulzDtype = "float32",
        branch: Branch = "auto",
        adam_lr_mult: float = 20.0,
        adam_bias_correction: bool = True,
        max_grad_norm: float = 1.0,
        max_nonfinite_steps: int = 10,
        state_dtype: StateDtype = "float32",
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(
            params,
            "elo_celo2",
            lr=lr,
            weights=weights,
            weight_decay=weight_decay,
            axis_order=axis_order,
            orthogonalize=orthogonalize,
            ns_dtype=ns_dtype,
            branch=branch,
            adam_lr_mult=adam_lr_mult,
            adam_bias_correction=adam_bias_correction,
            max_grad_norm=max_grad_norm,
            max_nonfinite_steps=max_nonfinite_steps,
            state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
        )
