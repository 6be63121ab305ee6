"""A head on the scheduler of the constructed VeLO: a few numbers say how its inputs change the size of a step.

There, unit j of the LSTM is sigmoid(i) tanh(g_j), all with the same input gate, sigmoid(i) = 1/256 or half that, where
the sigmoid is nearly an exponential. What is added to i multiplies lr_mult by about its exponential:

    lr_mult = constructed(time, rank) · exp(s)        s = Σ number · (input - low) / (high - low)

for inputs between ``low`` and ``high``, which all of them are by their formulas. A number is thus the logarithm of the
factor at the upper limit of its input; zeros give the constructed weights back. Since s is bounded, so is the factor,
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
LARGEST = 64.0
# Groups of scheduler inputs: first input, how many, lower and upper limit.
GROUPS = {
    "time": (0, 9, -1.0, 1.0),
    "loss": (9, 9, -1.0, 1.0),
    "mean_v": (18, 1, -2.5, 2.5),
    "var_m": (24, 3, -2.5, 2.5),
    "var_v": (27, 3, -2.5, 2.5),
}
KINDS = ("matrix", "vector")
NAME = re.compile(r"(\w+)\[(\d+)\]")


def _form(name: str) -> tuple[Tensor, float] | None:
    """Coefficients (30,) and offset that bring an input to 0 ... 1; None for a name that is no input."""
    form = torch.zeros(INPUTS, dtype=torch.float64)
    if name in KINDS:
        ranks = [RANK_INPUT + rank for rank in VECTOR_RANKS]
        form[ranks] = 1.0 if name == "vector" else -1.0  # an empty one-hot, of more than four axes, is a matrix
        return form, 0.0 if name == "vector" else 1.0
    match = NAME.fullmatch(name)
    first, count, low, high = GROUPS.get(match[1], (0, 0, 0.0, 1.0)) if match else (0, 0, 0.0, 1.0)
    if not match or int(match[2]) >= count:
        return None
    form[first + int(match[2])] = 1.0 / (high - low)
    return form, -low / (high - low)


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
            own = [f"{group}[0 to {count - 1}]" for group, (_, count, _, _) in GROUPS.items()]
            features = [f"{group}[{column}]" for group, column in DIRECTION]
            raise ValueError(
                f"{name!r} is no input of VeLO's scheduler ({', '.join([*own, *KINDS])}) and no feature of the "
                f"constructed direction ({', '.join(features)})"
            )
    return head, direction


def bounds(numbers: Mapping[str, float]) -> tuple[float, float]:
    """Smallest and largest value that s can have."""
    own = _split(numbers)[0]
    kinds = [own.get(kind, 0.0) for kind in KINDS]  # one of the two
    rest = [x for name, x in own.items() if name not in KINDS]
    return sum(min(x, 0.0) for x in rest) + min(kinds), sum(max(x, 0.0) for x in rest) + max(kinds)


def head_leaves(theta: Theta, numbers: Mapping[str, float]) -> dict[str, Tensor]:
    """``theta`` with a head.

    Args:
        theta: constructed weights of VeLO, or others with a channel of the mixing layer that nothing uses.
        numbers: logarithms of factors. "time[k]", "loss[k]", "mean_v[0]", "var_m[k]", "var_v[k]", "matrix", "vector":
            on lr_mult, all of them scaled down where they exceed ``LARGEST``; "fac_m[0]", "fac_g[0]", "p[0]": on the
            coefficients of the constructed direction.

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
