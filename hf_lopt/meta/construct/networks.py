"""Networks with a given meaning: ReLU networks that compute linear forms exactly.

A unit of the first hidden layer is relu(form); the later hidden layers pass it on unchanged, for it is not negative.
Two units with opposite signs therefore carry a linear form through any number of layers, exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_lopt.features import ElementFeatures


Form = Mapping[int, float]  # input column -> coefficient
Direction = Mapping[tuple[str, int], float]  # (feature group, column in the group) -> coefficient


@dataclass(frozen=True)
class Unit:
    """A unit of the first hidden layer: relu(Σ weights[i] input_i + bias)."""

    weights: Form
    bias: float = 0.0


@dataclass(frozen=True)
class Output:
    """An output of the network: Σ weights[j] unit_j + bias."""

    weights: Mapping[int, float] = field(default_factory=dict)
    bias: float = 0.0


def pair(form: Form, bias: float = 0.0) -> tuple[Unit, Unit]:
    """The positive and the negative part of a linear form; their difference is the form."""
    return Unit(form, bias), Unit({i: -c for i, c in form.items()}, -bias if bias else 0.0)


def columns(spec: ElementFeatures, direction: Direction) -> dict[int, float]:
    """A direction as a linear form over the input columns of ``spec``.

    Raises:
        ValueError: a feature that ``spec`` does not have.
    """
    widths = dict(zip(spec.names, spec.widths(), strict=True))
    unknown = [key for key in direction if key[1] not in range(widths.get(key[0], 0))]
    if unknown:
        raise ValueError(f"no such feature columns: {unknown}; the groups and their widths are {widths}")
    return {spec.column(group) + column: weight for (group, column), weight in direction.items()}


def relu_network(
    inputs: int, hidden: Sequence[int], units: Sequence[Unit], outputs: Sequence[Output]
) -> list[tuple[Tensor, Tensor]]:
    """Weights (in, out) and biases (out,) of the layers; units beyond those given are zero.

    Args:
        inputs: number of inputs.
        hidden: units of the hidden layers, each at least ``len(units)``.
        units: what the first hidden layer computes.
        outputs: what the last layer makes of it.

    Raises:
        ValueError: a hidden layer too small for the units.
    """
    if min(hidden) < len(units):
        raise ValueError(f"{len(units)} units are needed in every hidden layer, got {tuple(hidden)}")
    sizes = [inputs, *hidden, len(outputs)]
    layers = [
        (torch.zeros(a, b, dtype=torch.float32), torch.zeros(b, dtype=torch.float32))
        for a, b in zip(sizes, sizes[1:], strict=False)
    ]
    for j, unit in enumerate(units):
        layers[0][1][j] = unit.bias
        for i, weight in unit.weights.items():
            layers[0][0][i, j] = weight
        for w, _ in layers[1:-1]:
            w[j, j] = 1.0
    for k, output in enumerate(outputs):
        layers[-1][1][k] = output.bias
        for j, weight in output.weights.items():
            layers[-1][0][j, k] = weight
    return layers


def limited(form: Form, pull: Form, limit: float) -> tuple[list[Unit], Tensor]:
    """A linear form d plus another, q, that is held between -limit |d| and limit |d|: no d, no q.

    In two hidden layers of four units each: relu(d), relu(-d), relu(q), relu(-q), and of these relu(d + q),
    relu(-d - q), relu(q - limit |d|), relu(-q - limit |d|), which count 1, -1, -1 and 1 times. Where d is 0, so is the
    sum, exactly.

    Returns:
        the units of the first layer, and the weights of the second, (4, 4) from in to out.
    """
    second = [[1, -1, -limit, -limit], [-1, 1, -limit, -limit], [1, -1, 1, 0], [-1, 1, 0, 1]]
    return [*pair(form), *pair(pull)], torch.tensor(second, dtype=torch.float32)


LIMITED = {0: 1.0, 1: -1.0, 2: -1.0, 3: 1.0}  # how the last layer joins the units of `limited`


def agreeing(form: Form, other: Form) -> tuple[list[Unit], Tensor]:
    """What two linear forms d and q agree on: where they have the same sign, the one nearer to zero; else 0, exactly.

    In two hidden layers: relu(d), relu(-d), relu(d - q), relu(q - d), and of these relu(relu(d) - relu(d - q)) and
    relu(relu(-d) - relu(q - d)), which count 1 and -1 times.

    Returns:
        the units of the first layer, and the weights of the second, (4, 2) from in to out.
    """
    difference = {i: form.get(i, 0.0) - other.get(i, 0.0) for i in {**form, **other}}
    second = [[1, 0], [0, 1], [-1, 0], [0, -1]]
    return [*pair(form), *pair(difference)], torch.tensor(second, dtype=torch.float32)


def relu_pair(
    spec: ElementFeatures, direction: Direction, hidden: Sequence[int], outputs: int, bank: tuple[int, ...] = (1,)
) -> dict[str, Tensor]:
    """The network whose output 0 is a linear form of the features and whose other outputs are 0, as grouped leaves.
    See :func:`grouped`.

    Raises:
        ValueError: a feature that ``spec`` does not have, or a hidden layer with one unit.
    """
    form = columns(spec, direction)
    last = [Output({0: 1.0, 1: -1.0}), *[Output()] * (outputs - 1)]
    return grouped(spec, relu_network(sum(spec.widths()), hidden, pair(form), last), bank)


def pulled_pair(
    spec: ElementFeatures, direction: Direction, pull: Direction, limit: float, bank: tuple[int, ...] = (1,)
) -> dict[str, Tensor]:
    """The network with two hidden layers of four units and three outputs, of which the first is the ``direction`` plus
    a ``pull`` that is ``limited`` by it, and the others are 0."""
    units, second = limited(columns(spec, direction), columns(spec, pull), limit)
    layers = relu_network(sum(spec.widths()), (4, 4), units, [Output(LIMITED), Output(), Output()])
    layers[1] = (second, layers[1][1])
    return grouped(spec, layers, bank)


def grouped(
    spec: ElementFeatures, layers: Sequence[tuple[Tensor, Tensor]], bank: tuple[int, ...] = (1,)
) -> dict[str, Tensor]:
    """Layers as the leaves of a bank.

    Leaves ``w0__<group>``, ``w1``, ..., ``b0``, ... in (in, out) orientation, each with the axes ``bank`` in front.
    """
    leaves = {f"w0__{k}": part for k, part in enumerate(layers[0][0].split(spec.widths()))}
    leaves |= {f"w{layer}": w for layer, (w, _) in enumerate(layers) if layer}
    leaves |= {f"b{layer}": b for layer, (_, b) in enumerate(layers)}
    return {name: leaf.expand(*bank, *leaf.shape).clone() for name, leaf in leaves.items()}


def direction_record(direction: Direction) -> dict[str, float]:
    """A direction as it stands in the provenance file."""
    return {f"{group}[{column}]": value for (group, column), value in direction.items()}
