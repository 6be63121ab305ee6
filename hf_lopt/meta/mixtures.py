"""Networks of a few numbers: mixing weights of features, and the form of a schedule, for a search in few dimensions.

A mixture is a mapping from names to numbers. "feature[column]" is the weight of a feature in the direction of the
step. Rules whose output is not normalised and whose schedule is their own have four more, which the constructed
weights give the values in ``SCHEDULE``: the direction is multiplied by

    exp(log_scale) · min(1, (i + 1) / W) / (1 + i / D) ** power       after i steps

with W = exp(log_warmup) times the constructed warm-up and D = exp(log_decay) times the constructed decay. The second
and third factor are the exponent that the network computes from its functions of the step count, by least squares.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from hf_lopt.features import CELO2, SMALL_FC, ElementFeatures
from hf_lopt.meta.construct import networks, schedules, small_fc


# Rules whose network alone decides the direction: features, prefix of the leaves.
MIXTURES: dict[str, tuple[ElementFeatures, str]] = {
    **dict.fromkeys(("celo2", "celo2_base"), (CELO2, "ff_mod_stack/~/")),
    **dict.fromkeys(("elo", "mulo", "small_fc_lopt"), (SMALL_FC, "nn/~/")),
}
TIMED = ("mulo", "small_fc_lopt")
SCHEDULE = {"log_scale": 0.0, "log_warmup": 0.0, "log_decay": 0.0, "power": 0.5}
WIDTHS = (4, 8, 32)  # of the hidden layers that there are fused kernels for


def direction(weights: Mapping[str, float]) -> dict[tuple[str, int], float]:
    """Mixing weights by "feature[column]" as :mod:`hf_lopt.meta.construct.networks` takes them."""
    out = {}
    for name, value in weights.items():
        match = re.fullmatch(r"(\w+)\[(\d+)\]", name)
        if not match:
            raise ValueError(f"a mixing weight is named 'feature[column]', such as 'm_rsqrt_v[0]', got {name!r}")
        out[match[1], int(match[2])] = value
    return out


def mixture_leaves(rule: str, theta: Mapping[str, Tensor], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """``theta`` with a network whose first output is a weighted sum of features, as the constructed weights have it,
    and with the scale and schedule among ``weights``, if any of them is there.

    Raises:
        ValueError: for a rule whose weights are not a network alone, and for features and numbers that it does not
            have.
    """
    if rule not in MIXTURES:
        raise ValueError(f"mixing weights are for {', '.join(sorted(MIXTURES))}, not for {rule}")
    features, prefix = MIXTURES[rule]
    timing = {name: value for name, value in weights.items() if name in SCHEDULE}
    if timing and rule not in TIMED:
        raise ValueError(f"{rule} has no scale and schedule of its own, which {', '.join(timing)} would change")
    form = networks.columns(features, direction({k: v for k, v in weights.items() if k not in timing}))
    out = {name: leaf.clone() for name, leaf in theta.items()}
    firsts = [f"{prefix}w0__{k}" for k in range(len(features.names))]
    grouped = firsts[0] in out
    first = torch.cat([out[name] for name in firsts]) if grouped else out[f"{prefix}w0"]
    first[:, :2] = _pair(len(first), form)
    for name, part in zip(firsts, first.split(features.widths()), strict=True) if grouped else ():
        out[name] = part
    if timing:
        _set_schedule(out, prefix, sum(features.widths()), SCHEDULE | timing)
    return out


def _pair(inputs: int, form: Mapping[int, float]) -> Tensor:
    """Weights (inputs, 2) of two units with opposite signs."""
    pair = torch.zeros(inputs, 2)
    for column, weight in form.items():
        pair[column] = torch.tensor([weight, -weight])
    return pair


def _set_schedule(leaves: Mapping[str, Tensor], prefix: str, before: int, numbers: Mapping[str, float]) -> None:
    """Change output 0 by exp(log_scale), and the exponent, which the units 2 and 3 carry, to the wanted schedule.

    Raises:
        ValueError: the network's exponent does not come from these units.
    """
    exponent = torch.zeros_like(leaves[f"{prefix}w2"][:, 1])
    exponent[2:4] = torch.tensor([1.0 / small_fc.EXP_MULT, -1.0 / small_fc.EXP_MULT])
    if not torch.equal(leaves[f"{prefix}w2"][:, 1], exponent):
        raise ValueError(
            "a scale and a schedule can be mixed into constructed weights, and others of their form, only"
        )
    warmup, decay = (
        value * math.exp(numbers[name])
        for name, value in (("log_warmup", small_fc.WARMUP), ("log_decay", small_fc.DECAY))
    )
    *coefficients, constant = schedules.step_fit(warmup, decay, numbers["power"])
    first, bias = leaves[f"{prefix}w0"], leaves[f"{prefix}b0"]
    first[:, 2:4] = _pair(len(first), dict(enumerate(coefficients, before)))
    bias[2:4] = torch.tensor([constant, -constant])
    leaves[f"{prefix}w2"][:, 0] *= math.exp(numbers["log_scale"])


def narrowed(rule: str, theta: Mapping[str, Tensor], width: int = 0) -> dict[str, Tensor]:
    """Weights of the same function with hidden layers as narrow as the fused kernels and the units in use allow.

    Args:
        rule: one of ``MIXTURES``.
        theta: its weights.
        width: the least number of units; those that are not in use are free for training.
    """
    _, prefix = MIXTURES[rule]
    layers = []
    for layer in range(3):
        name = f"{prefix}w{layer}"
        parts = [name] if name in theta else [key for key in theta if key.startswith(f"{name}__")]
        layers.append((parts, torch.cat([theta[key] for key in parts]), theta[f"{prefix}b{layer}"]))
    needed = width
    for (_, w, b), (_, following, _) in zip(layers, layers[1:], strict=False):
        in_use = (w.any(0) | b.bool()) & following.any(1)
        needed = max(needed, int(in_use.nonzero().max()) + 1 if in_use.any() else 0)
    units = min((k for k in WIDTHS if k >= needed), default=max(WIDTHS))
    out = dict(theta)
    for layer, (parts, w, b) in enumerate(layers):
        if layer < 2:
            out |= {key: theta[key][..., :units].clone() for key in parts}
            out[f"{prefix}b{layer}"] = b[:units].clone()
        if layer:
            out[parts[0]] = out[parts[0]][: min(units, len(w))].clone()
    return out
