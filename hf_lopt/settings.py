"""What the settings, parameters and gradients of an optimizer may be; and that all ranks have the same."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_lopt import distributed, lr_scales
from hf_lopt.arguments_given import unknown_settings
from hf_lopt.rules.base import Rule
from hf_lopt.step.accumulators import STATE_DTYPES, check_axis_order, matrix_shape


# What parameters may be.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NON_NEGATIVE = (
    *("lr", "weight_decay", "min_param_scale", "bank_scale", "step_mult", "exp_mult", "step_scale"),
    *("adam_lr_mult", "max_grad_norm"),
)
_MOST = torch.finfo(torch.float32).max
# More than any run; the step counts in int64 and computes in float64.
MOST_STEPS = 2**53
_SWITCHES = ("orthogonalize", "adam_bias_correction", "stochastic_rounding")
# How parameters and state are stored: a matter of this machine, which a checkpoint does not decide.
STORAGE = ("state_dtype", "stochastic_rounding")
# What the Newton-Schulz iteration may run in.
NS_DTYPES = ("float32", "tf32", "bfloat16", "auto")
# How the network of small_fc_lopt is evaluated on a GPU.
PRECISIONS = ("exact", "tf32")
# Where the weights were found may differ from machine to machine; their content may not.
_MAY_DIFFER = ("weights_source", "weights_origin")


def is_rate(value: float) -> bool:
    """Whether a number is finite, also in the float32 of the step, and not negative."""
    return 0.0 <= value <= _MOST


def positive_int(name: str, value: Any) -> int:
    """``value`` as an int above 0; ValueError otherwise."""
    try:
        number = operator.index(value)
    except TypeError:
        number = int(value) if isinstance(value, float) and value.is_integer() else 0
    if not 0 < number <= MOST_STEPS or isinstance(value, bool):
        limit = f" and at most {MOST_STEPS}" if number > 0 else ""
        raise ValueError(f"{name} must be a whole number of optimizer steps above 0{limit}, got {value!r:.40}")
    return number


def number_of_epochs(value: Any) -> float:
    """``value`` as a float of at least 0; ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not is_rate(value):
        raise ValueError(f"num_epochs must be a number >= 0, and 0 where it is not known, got {value!r:.40}")
    return float(value)


def complete_settings(rule: Rule, given: Mapping[str, Any]) -> dict[str, Any]:
    """The rule's defaults and what was ``given`` instead, checked. A horizon that is not set becomes 0.

    Raises:
        ValueError: for a setting that the rule does not take, and for values out of range.
    """
    unknown = sorted(set(given) - set(rule.defaults))
    if unknown:
        raise unknown_settings(rule.class_name, unknown, rule.defaults)
    settings = dict(rule.defaults) | dict(given)
    if rule.needs_horizon:
        # 0 stands for None, which a checkpoint cannot hold.
        steps = settings.get("num_training_steps")
        settings["num_training_steps"] = 0 if steps is None else positive_int("num_training_steps", steps)
    check_settings(settings)
    return settings


def check_settings(settings: Mapping[str, Any]) -> None:
    """Range checks for the settings of a constructor or of a group.

    Raises:
        ValueError: naming the setting, its value and what it may be.
    """
    for name in _NON_NEGATIVE:
        value = settings.get(name, 0.0)
        if value is None and name == "min_param_scale":  # each tensor has its own
            continue
        # A schedule on the device; reading it would synchronise.
        if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not is_rate(value):
            raise ValueError(f"{name} must be a finite number >= 0, got {value!r:.40}")
        if isinstance(value, int) and value > MOST_STEPS:  # torch makes no tensor of it
            raise ValueError(f"{name}: a whole number must be at most {MOST_STEPS}, got {value!r:.40}")
    check_axis_order(settings.get("axis_order", "torch"))
    for name, known in (("ns_dtype", NS_DTYPES), ("precision", PRECISIONS), ("state_dtype", STATE_DTYPES)):
        word = settings.get(name, known[0])
        if not isinstance(word, str) or word not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {word!r}")
    for name in _SWITCHES:
        if not isinstance(settings.get(name, True), bool):
            raise ValueError(f"{name} must be True or False, got {settings[name]!r}")
    longest = settings.get("max_training_steps", 0)
    if isinstance(longest, bool) or not isinstance(longest, int) or not 0 <= longest <= MOST_STEPS:
        raise ValueError(
            f"max_training_steps must be a whole number of steps up to {MOST_STEPS}, 0 for none, got {longest!r:.40}"
        )
    if "max_nonfinite_steps" in settings:
        positive_int("max_nonfinite_steps", settings["max_nonfinite_steps"])
    if text := lr_scales.problem(settings):
        raise ValueError(text)


def check_parameter(p: Tensor, axis_order: str) -> None:
    """Refuse a parameter that cannot be updated.

    Raises:
        ValueError: for a dtype other than float32, bfloat16 and float16, for a partial DTensor, and for a shape that
            the ``axis_order`` of its group does not fit.
    """
    distributed.sharding_of(p)
    matrix_shape(p.shape, axis_order)
    if p.dtype not in DTYPES:
        raise ValueError(
            f"parameters must be float32, bfloat16 or float16, got {p.dtype} of shape {tuple(p.shape)}; "
            "convert the model first, or leave this parameter to another optimizer"
        )


def check_gradient(p: Tensor, name: str) -> None:
    """Refuse a sparse gradient of the parameter ``p`` of the optimizer ``name`` with a RuntimeError."""
    if p.grad is not None and p.grad.is_sparse:
        raise RuntimeError(
            f"{name} does not support sparse gradients (parameter of shape {tuple(p.shape)}); "
            "create the embedding with sparse=False"
        )


def check_ranks_agree(
    run: Mapping[str, Any],
    parameters: Sequence[tuple[Tensor, Mapping[str, Any]]],
    active: Collection[int],
    per_group: Sequence[str],
    state: Mapping[Tensor, Mapping[str, Any]],
) -> None:
    """Compare over all ranks the settings of the run and the list of trainable parameters. A collective.

    Args:
        run: settings that have one value for all groups; tensors among them are not compared.
        parameters: the trainable parameters with their groups.
        active: ids of the parameters that have a gradient in this step.
        per_group: settings of the groups that are compared.
        state: of the parameters, in which each has for itself what its group leaves open. Waits for the device.

    Raises:
        ValueError: on all ranks, naming what differs.
    """
    described = {k: str(v) for k, v in run.items() if k not in _MAY_DIFFER and isinstance(v, (str, int, float))}
    for i, group in enumerate({id(group): group for _, group in parameters}.values()):
        described[f"{lr_scales.KEY} of group {i}"] = lr_scales.in_words(group)
    for i, (p, group) in enumerate(parameters):
        gradient = "with" if id(p) in active else "without"
        described[f"parameter {i}"] = f"{distributed.describe(p)} {gradient} a gradient"
        for name in per_group:
            value, own = group[name], state.get(p, {}).get(name)
            value = f"{float(own):g}" if value is None and own is not None else value
            described[f"{name} of parameter {i}"] = str(value)
    distributed.check_agreement(described, parameters[0][0].device)
