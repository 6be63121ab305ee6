"""A head on the scheduler of the constructed VeLO: a few numbers say how its inputs change the size of a step.

There, unit j of the LSTM is sigmoid(i) tanh(g_j), all with the same input gate, sigmoid(i) = 1/256 or half that, where
the sigmoid is nearly an exponential. What is added to i multiplies lr_mult by about its exponential:

    lr_mult = constructed(time, rank) · exp(s)        s = Σ number · input

with inputs between 0 and 1, or -1 and 1:

    "matrix", "vector"   1 for tensors of this kind, by the number of axes longer than 1
    "time[k]"            (1 + tanh(10 (x - τ_k))) / 2 at the fraction x of the run
    "loss[k]"            (1 + loss feature k) / 2: 0 while the loss falls steadily, 1 when it rises
    "small[k]"           (L(var m_k) - L(mean v)) / 5, about log(mean m² / (mean g² rms p)) / 10: large for tensors
                         that are still near zero, as new biases are
    "steady[k]"          (L(var m_k) - L(var m_0)) / 5: how much of the gradient is left in longer means

A number is thus the logarithm of a factor; zeros give the constructed weights back. Of VeLO's statistics only those
differences are used, since each alone would tie the size of a step to that of the gradients: where L, which is half a
logarithm between -2.5 and 2.5, does not end at its limits, their scale cancels. Since s is bounded, so is the factor,
and it keeps its sign: the schedule still ends at 0. Numbers of the same kind stand for the coefficients of the
direction.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from hf_lopt.features import VELO
from hf_lopt.meta.construct.networks import relu_pair
from hf_lopt.meta.construct.velo import DIRECTION, INPUTS, RANK_INPUT, VECTOR_RANKS
from hf_lopt.networks import Theta


RULES = ("velo", "velo_s")
# Largest factor, and the inverse of the smallest, that the numbers may add up to; beyond it all of them shrink.
LARGEST = 512.0
KINDS = ("matrix", "vector")
GROUPS = {"time": range(9), "loss": range(9), "small": range(3), "steady": range(1, 3)}
TIME, LOSS, MEAN_V, VAR_M = 0, 9, 18, 24  # places of VeLO's scheduler inputs
SPAN = 5.0  # of the statistics L
NAME = re.compile(r"(\w+)\[(\d+)\]")


def _form(name: str) -> tuple[Tensor, float] | None:
    """Coefficients (30,) of the scheduler's inputs and an offset; None for a name that is no input of a head."""
    form = torch.zeros(INPUTS, dtype=torch.float64)
    if name in KINDS:
        ranks = [RANK_INPUT + rank for rank in VECTOR_RANKS]
        form[ranks] = 1.0 if name == "vector" else -1.0  # an empty one-hot, of more than four axes, is a matrix
        return form, 0.0 if name == "vector" else 1.0
    match = NAME.fullmatch(name)
    if not match or int(match[2]) not in GROUPS.get(match[1], ()):
        return None
    group, k = match[1], int(match[2])
    if group in ("small", "steady"):
        form[VAR_M + k], form[MEAN_V if group == "small" else VAR_M] = 1.0 / SPAN, -1.0 / SPAN
        return form, 0.0
    form[(TIME if group == "time" else LOSS) + k] = 0.5
    return form, 0.5


def _split(numbers: Mapping[str, float]) -> tuple[dict[str, float], dict[tuple[str, int], float]]:
    """Numbers of the head, and those of the direction, by what they belong to."""
    head, direction = {}, {}
    for name, number in numbers.items():
        match = NAME.fullmatch(name)
        key = (match[1], int(match[2])) if match else ("", 0)
        if key in DIRECTION:
            direction[key] = DIRECTION[key] * math.exp(number)
        elif _form(name) is not None:
            head[name] = number
        else:
            own = [f"{group}[{places[0]} to {places[-1]}]" for group, places in GROUPS.items()]
            features = [f"{group}[{column}]" for group, column in DIRECTION]
            raise ValueError(
                f"{name!r} is no input of a head on VeLO's scheduler ({', '.join([*KINDS, *own])}) and no feature of "
                f"the constructed direction ({', '.join(features)})"
            )
    return head, direction


def bounds(numbers: Mapping[str, float]) -> tuple[float, float]:
    """Smallest and largest value that s can have."""
    own = _split(numbers)[0]
    kinds = [own.get(kind, 0.0) for kind in KINDS]  # one of the two
    low, high = min(kinds), max(kinds)
    for name, number in own.items():
        if name not in KINDS:
            least = -1.0 if name.startswith(("small", "steady")) else 0.0
            low, high = low + min(number, least * number), high + max(number, least * number)
    return low, high


def head_leaves(theta: Theta, numbers: Mapping[str, float]) -> dict[str, Tensor]:
    """``theta`` with a head.

    Args:
        theta: constructed weights of VeLO, or others with a channel of the mixing layer that nothing uses.
        numbers: logarithms of factors: of lr_mult, by the names above, all of them scaled down where they exceed
            ``LARGEST``; "fac_m[0]", "fac_g[0]", "p[0]": of the coefficients of the constructed direction.

    Raises:
        ValueError: an unknown name, or no unused channel.
    """
    head, direction = _split(numbers)
    out = {name: leaf.clone() for name, leaf in theta.items()}
    hidden = out["rnn_params/step_size/w"].shape[0]
    mixing, pooling = out["rnn_params/linear_2/w"], out["rnn_params/linear_1/w"]
    kernel = out["rnn_params/rnn/linear/w"].unflatten(1, (4, hidden))
    used = [mixing.abs().sum(0), pooling.abs().sum(0), kernel[:hidden].abs().sum((1, 2))]
    used += [out[f"rnn_params/linear_{k}/b"].abs() for k in (1, 2)]
    free = (sum(used) == 0.0).nonzero().flatten().tolist()
    if not free:
        raise ValueError(
            "a head needs a channel of the mixing layer that nothing uses: start from constructed weights"
        )
    low, high = bounds(head)
    scale = min(1.0, math.log(LARGEST) / max(high, -low, 1e-30))
    total, offset = torch.zeros(INPUTS, dtype=torch.float64), 0.0
    for name, number in head.items():
        form, constant = _form(name)
        total, offset = total + scale * number * form, offset + scale * number * constant
    mixing[:, free[0]], out["rnn_params/linear_2/b"][free[0]] = total.to(mixing), offset
    kernel[free[0], 0] = 1.0
    if direction:
        network = relu_pair(VELO, DIRECTION | direction, hidden=(4, 4), outputs=3)
        out |= {f"ff_mod_stack/~/{name}": leaf for name, leaf in network.items()}
    return out


class HeadVector:
    """The numbers of a head as a vector of length D, as :class:`hf_lopt.meta.theta.Vector` has leaves.

    Args:
        theta: constructed weights of VeLO.
        first: name -> value to start from.

    Raises:
        ValueError: see :func:`head_leaves`.
    """

    def __init__(self, theta: Theta, first: Mapping[str, float]):
        self.theta, self.first = dict(theta), dict(first)
        head_leaves(theta, first)

    def start(self) -> Tensor:
        """The first values, (D,)."""
        return torch.tensor(list(self.first.values()))

    def leaves(self, vectors: Tensor) -> dict[str, Tensor]:
        """Weights for vectors (P, D): leaves (P, *leaf shape); without P for one vector (D,)."""
        rows = torch.atleast_2d(vectors).tolist()
        own = [head_leaves(self.theta, dict(zip(self.first, row, strict=True))) for row in rows]
        return (
            {name: torch.stack([leaves[name] for leaves in own]) for name in own[0]} if vectors.dim() > 1 else own[0]
        )
