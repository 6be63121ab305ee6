"""A head on the scheduler of the constructed VeLO: a few numbers say how its inputs change the size of a step.

There, unit j of the LSTM is sigmoid(i) tanh(g_j), all with the same input gate. A head makes the gates smaller, and
the output layer larger, until the sigmoid is an exponential and the tanh after the cell linear, even where a step is
``LARGEST`` times as large. What is added to i then multiplies lr_mult by its exponential:

    lr_mult = constructed(time, rank) · exp(s)        s = Σ number · input

with inputs between 0 and 1, or -1 and 1:

    "matrix", "vector"   1 for tensors of this kind, by the number of axes longer than 1
    "time[k]"            (1 + tanh(10 (x - τ_k))) / 2 at the fraction x of the run
    "loss[k]"            (1 + loss feature k) / 2: 0 while the loss falls steadily, 1 when it rises
    "small[k]"           (L(var m_k) - L(mean v)) / 5, about log(mean m² / (mean g² rms p)) / 10: large for tensors
                         that are still near zero, as new biases are
    "steady[k]"          (L(var m_k) - L(var m_0)) / 5: how much of the gradient is left in longer means
    "small_matrix[k]"    "small[k]" of the step before, as tanh(tanh(.)) of it relative to that of 1, if the tensor is
                         a matrix, 0 elsewhere; "small_vector[k]" likewise. They take a unit of the LSTM each

A number is thus the logarithm of a factor; zeros are the constructed weights, to float32 rounding. Of VeLO's
statistics only those differences are used, since each alone would tie the size of a step to that of the gradients:
where L, which is half a logarithm between -2.5 and 2.5, does not end at its limits, their scale cancels. Since s is
bounded, so is the factor, and lr_mult keeps its sign: the schedule still ends at 0. Numbers of the same kind stand for
the coefficients of the direction.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_lopt.meta.construct.velo import DIRECTION, INPUTS, OPEN, RANK_INPUT, VECTOR_RANKS, direction_network
from hf_lopt.step.networks import Theta


RULES = ("velo", "velo_s")
# Largest factor, and the inverse of the smallest, that the numbers may add up to; beyond it all of them shrink.
LARGEST = 512.0
LOWER = 256.0
KINDS = ("matrix", "vector")
GROUPS = {"time": range(9), "loss": range(9), "small": range(3), "steady": range(1, 3)}
UNITS = {"small_matrix": "matrix", "small_vector": "vector"}  # inputs with a unit of their own, by kind of tensor
GROUPS |= dict.fromkeys(UNITS, GROUPS["small"])
UNIT_AT_1 = math.tanh(math.tanh(1.0))
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
    if group not in ("time", "loss"):
        form[VAR_M + k], form[VAR_M if group == "steady" else MEAN_V] = 1.0 / SPAN, -1.0 / SPAN
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
            columns = [f"{group}[{places[0]} to {places[-1]}]" for group, places in GROUPS.items()]
            features = [f"{group}[{column}]" for group, column in DIRECTION]
            raise ValueError(
                f"{name!r} is no input of a head on VeLO's scheduler ({', '.join([*KINDS, *columns])}) and no feature "
                f"of the constructed direction ({', '.join(features)})"
            )
    return head, direction


def bounds(numbers: Mapping[str, float]) -> tuple[float, float]:
    """Smallest and largest value that s can have."""
    by_kind = _split(numbers)[0]
    kinds = [by_kind.get(kind, 0.0) for kind in KINDS]  # one of the two
    low, high = min(kinds), max(kinds)
    for name, number in by_kind.items():
        if name not in KINDS:
            least = 0.0 if name.startswith(("time", "loss")) else -1.0
            low, high = low + min(number, least * number), high + max(number, least * number)
    return low, high


def _with_units(theta: Theta, more: int) -> dict[str, Tensor]:
    """A copy with ``more`` units of the LSTM, and channels of the mixing layer, that do nothing."""
    out = {name: leaf.clone() for name, leaf in theta.items()}
    for name, leaf in out.items() if more else ():
        if name == "rnn_params/rnn/linear/w":
            whole = F.pad(leaf.unflatten(1, (4, -1)).unflatten(0, (2, -1)), (0, more, 0, 0, 0, more))
            out[name] = whole.flatten(2).flatten(0, 1)
        elif name == "rnn_params/rnn/linear/b":
            out[name] = F.pad(leaf.view(4, -1), (0, more)).flatten()
        elif name.startswith(("rnn_params/step_size/w", "rnn_params/rnn_to_controls/w")):
            out[name] = F.pad(leaf, (0, 0, 0, more))
        elif name.startswith(("rnn_params/linear", "lstm_init_state")):
            out[name] = F.pad(leaf, (0, more))
    return out


def _lower_gates(leaves: Theta) -> None:
    """Divides the input gates by ``LOWER`` for every kind of tensor, and multiplies the output layer with it."""

    def lower(gate: Tensor) -> Tensor:
        return torch.logit(torch.sigmoid(gate.double()) / LOWER)

    rows, biases = _gates(leaves)[0, :, 0], leaves["rnn_params/rnn/linear/b"].view(4, -1)[0]
    # A row belongs to an input that is 0 or 1, and only one of them is 1.
    scheduled = leaves["rnn_params/step_size/w"][:, 0] != 0.0  # not the units of a head that is there already
    rows.copy_(torch.where(scheduled & (rows != 0.0), lower(biases + rows) - lower(biases), rows))
    biases.copy_(torch.where(scheduled, lower(biases), biases))
    leaves["rnn_params/step_size/w"].mul_(LOWER)


def _gates(leaves: Theta) -> Tensor:
    """A view of the LSTM's matrix: from (mixed input or hidden state, unit) to (gate, unit)."""
    return leaves["rnn_params/rnn/linear/w"].unflatten(1, (4, -1)).unflatten(0, (2, -1))


def _channel(leaves: Theta, numbers: Mapping[str, float]) -> int:
    """Lets an unused channel of the mixing layer hold a sum of inputs; its place."""
    mixing, offsets = (leaves[f"rnn_params/linear_2/{kind}"] for kind in "wb")
    used = _gates(leaves)[0].abs().sum((1, 2)) + mixing.abs().sum(0) + offsets.abs()
    used = used + sum(leaves[f"rnn_params/linear_1/{kind}"].abs().view(-1, len(used)).sum(0) for kind in "wb")
    free = (used == 0.0).nonzero().flatten().tolist()
    if not free:
        raise ValueError("a head needs channels of the mixing layer that nothing uses: start from constructed weights")
    total, offset = torch.zeros(INPUTS, dtype=torch.float64), 0.0
    for name, number in numbers.items():
        form, constant = _form(name)
        total, offset = total + number * form, offset + number * constant
    mixing[:, free[0]], offsets[free[0]] = total.to(mixing), offset
    return free[0]


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
    gated = {name: number for name, number in head.items() if name.split("[")[0] in UNITS}
    hidden = len(theta["rnn_params/step_size/w"])
    out = _with_units(theta, len(gated))
    if head:
        _lower_gates(out)
    low, high = bounds(head)
    scale = min(1.0, math.log(LARGEST) / max(high, -low, 1e-30))
    plain = {name: scale * number for name, number in head.items() if name not in gated}
    if plain:
        _gates(out)[0, _channel(out, plain), 0, :hidden] = 1.0
    for unit, (name, number) in enumerate(gated.items(), start=hidden):
        size, vector = _channel(out, {name: 1.0}), _channel(out, {"vector": 1.0})
        gates, biases = _gates(out), out["rnn_params/rnn/linear/b"].view(4, -1)
        sign = 1.0 if UNITS[name.split("[")[0]] == "vector" else -1.0
        gates[0, vector, 0, unit], biases[0, unit] = 2.0 * sign * OPEN, -sign * OPEN
        gates[0, size, 1, unit], biases[2, unit], biases[3, unit] = 1.0, -OPEN - 1.0, OPEN
        gates[1, unit, 0, :hidden] = scale * number / UNIT_AT_1
    if direction:
        network = direction_network(DIRECTION | direction)
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
        return torch.tensor(list(self.first.values()), dtype=torch.float32)

    def leaves(self, vectors: Tensor) -> dict[str, Tensor]:
        """Weights for vectors (P, D): leaves (P, *leaf shape); without P for one vector (D,)."""
        rows = torch.atleast_2d(vectors).tolist()
        heads = [head_leaves(self.theta, dict(zip(self.first, row, strict=True))) for row in rows]
        return (
            {name: torch.stack([leaves[name] for leaves in heads]) for name in heads[0]}
            if vectors.dim() > 1
            else heads[0]
        )
