"""Networks of a few numbers: mixing weights of features, and the form of a schedule, for a search in few dimensions.

A mixture is a mapping from names to numbers. "feature[column]" is the weight of a feature in the direction of the
step. Rules whose output is not normalised and whose schedule is their own count it as far as the newest gradient
agrees with it, and have four more, which the constructed weights give the values in ``SCHEDULE``: it is multiplied by

    exp(log_scale) · min(1, (i + 1) / W) / (1 + i / D) ** power       after i steps

with W = exp(log_warmup) times the constructed warm-up and D = exp(log_decay) times the constructed decay. The second
and third factor are the exponent that the network computes from its functions of the step count, by least squares.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_lopt.features import CELO2, SMALL_FC, ElementFeatures
from hf_lopt.meta import head
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
    and with the scale and schedule among ``weights``, if any of them is there. For VeLO a head on the scheduler.

    Raises:
        ValueError: for a rule whose weights are not a network alone, and for features and numbers that it does not
            have.
    """
    if rule in head.RULES:
        return head.head_leaves(theta, weights)
    if rule not in MIXTURES:
        raise ValueError(f"mixing weights are for {', '.join(sorted([*MIXTURES, *head.RULES]))}, not for {rule}")
    features, prefix = MIXTURES[rule]
    timing = {name: value for name, value in weights.items() if name in SCHEDULE}
    if timing and rule not in TIMED:
        raise ValueError(f"{rule} has no scale and schedule of its own, which {', '.join(timing)} would change")
    chosen = direction({k: v for k, v in weights.items() if k not in timing})
    form = networks.columns(features, chosen)
    out = {name: leaf.clone() for name, leaf in theta.items()}
    firsts = [f"{prefix}w0__{k}" for k in range(len(features.names))]
    grouped = firsts[0] in out
    first = torch.cat([out[name] for name in firsts]) if grouped else out[f"{prefix}w0"]
    units = small_fc.direction_units(chosen)[0] if rule in TIMED else networks.pair(form)
    set_units(first, units)
    for name, part in zip(firsts, first.split(features.widths()), strict=True) if grouped else ():
        out[name] = part
    if timing:
        _set_schedule(out, prefix, sum(features.widths()), SCHEDULE | timing)
    return out


def set_units(first: Tensor, units: Sequence[networks.Unit], start: int = 0) -> None:
    """Give the units from ``start`` on of a first layer (inputs, units) other inputs."""
    first[:, start : start + len(units)] = 0.0
    for unit, each in enumerate(units, start):
        for column, weight in each.weights.items():
            first[column, unit] = weight


def _set_schedule(leaves: Mapping[str, Tensor], prefix: str, before: int, numbers: Mapping[str, float]) -> None:
    """Change output 0 by exp(log_scale), and the exponent, which two units carry, to the wanted schedule.

    Raises:
        ValueError: the network's exponent does not come from these units.
    """
    exponent = torch.zeros_like(leaves[f"{prefix}w2"][:, 1])
    carry = list(small_fc.EXPONENT)
    exponent[carry] = torch.tensor([1.0 / small_fc.EXP_MULT, -1.0 / small_fc.EXP_MULT], dtype=torch.float32)
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
    set_units(first, networks.pair(dict(enumerate(coefficients, before))), carry[0])
    bias[carry] = torch.tensor([constant, -constant], dtype=torch.float32)
    leaves[f"{prefix}w2"][:, 0] *= math.exp(numbers["log_scale"])


@dataclass
class _Network:
    """The layers of a rule's network, with the features of the first one together."""

    parts: list[list[str]]  # names of the leaves that make up the weights of each layer
    weights: list[Tensor]  # (in, out)
    biases: list[Tensor]
    names: list[str]  # of the biases

    @classmethod
    def of(cls, rule: str, theta: Mapping[str, Tensor]) -> _Network:
        _, prefix = MIXTURES[rule]
        matrices = [f"{prefix}w{layer}" for layer in range(3)]
        parts = [[name] if name in theta else [k for k in theta if k.startswith(f"{name}__")] for name in matrices]
        names = [f"{prefix}b{layer}" for layer in range(3)]
        return cls(parts, [torch.cat([theta[k] for k in keys]) for keys in parts], [theta[k] for k in names], names)

    def in_use(self, layer: int) -> Tensor:
        """Units of a hidden layer that have an input and an effect, bool."""
        return (self.weights[layer].any(0) | self.biases[layer].bool()) & self.weights[layer + 1].any(1)

    def needed(self) -> int:
        """How many units the hidden layers need: those after the last one in use do nothing."""
        return max(int(used.nonzero().max()) + 1 if used.any() else 0 for used in map(self.in_use, range(2)))

    def resized(self, units: int) -> None:
        """Cut the hidden layers to their first ``units``, or add units without inputs and effect."""
        for layer in range(2):
            more = units - len(self.biases[layer])
            self.weights[layer] = F.pad(self.weights[layer], (0, more))
            self.biases[layer] = F.pad(self.biases[layer], (0, more))
            self.weights[layer + 1] = F.pad(self.weights[layer + 1], (0, 0, 0, more))

    def into(self, theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The leaves of ``theta`` with this network."""
        out = dict(theta) | dict(zip(self.names, self.biases, strict=True))
        for keys, weights in zip(self.parts, self.weights, strict=True):
            sizes = [len(weights)] if len(keys) == 1 else [len(theta[k]) for k in keys]
            out |= dict(zip(keys, (x.clone() for x in weights.split(sizes)), strict=True))
        return out


def narrowed(rule: str, theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the same function, with hidden layers as narrow as the units in use and the fused kernels allow."""
    network = _Network.of(rule, theta)
    network.resized(min((k for k in WIDTHS if k >= network.needed()), default=len(network.biases[0])))
    return network.into(theta)


def with_spare_units(
    rule: str, theta: Mapping[str, Tensor], units: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Weights of the same function whose hidden layers have ``units`` units, all of which can be trained.

    A unit with neither inputs nor effect stays so: the gradient with respect to both is zero. Here those that are not
    in use get random inputs, of which nothing is made yet.

    Raises:
        ValueError: more units are in use, or there is no fused kernel for so many.
    """
    network = _Network.of(rule, theta)
    if units not in WIDTHS or units < network.needed():
        raise ValueError(
            f"{units} hidden units: the start uses {network.needed()}, and there are kernels for "
            f"{', '.join(map(str, WIDTHS))}"
        )
    network.resized(units)
    for layer in range(2):
        spare = ~network.in_use(layer)
        inputs = network.weights[layer]
        inputs[:, spare] = (
            torch.randn(len(inputs), int(spare.sum()), generator=generator, dtype=torch.float32) * len(inputs) ** -0.5
        )
        network.weights[layer + 1][spare] = 0.0
    return network.into(theta)
