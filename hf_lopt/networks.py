"""The meta-networks as pure functions over named tensors, for all tensors of a model at once.

Axes: T tensors (rows), I inputs, H hidden units of the scheduler, K networks in the bank, F features, U units of the
per-element network, O outputs. Weight matrices are (in, out), as the references store them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


Theta = Mapping[str, Tensor]


def linear(x: Tensor, theta: Theta, name: str) -> Tensor:
    return torch.addmm(theta[f"{name}/b"], x, theta[f"{name}/w"])


def mix(x: Tensor, theta: Theta) -> Tensor:
    """Mixing layer (T, I) -> (T, H): a linear map of each row plus a maximum over all rows.

    The maximum couples all tensors of a run. The leaf ``linear`` exists in the weights, but the reference discards its
    result.
    """
    pooled = torch.relu(linear(x, theta, "rnn_params/linear_1")).max(0, keepdim=True).values
    return linear(x, theta, "rnn_params/linear_2") + pooled


def lstm(x: Tensor, hidden: Tensor, cell: Tensor, theta: Theta) -> tuple[Tensor, Tensor]:
    """One LSTM step for all rows: gates in the order input, candidate, forget (with 1 added), output."""
    gates = linear(torch.cat([x, hidden], 1), theta, "rnn_params/rnn/linear")
    i, g, f, o = gates.chunk(4, 1)
    cell = torch.sigmoid(f + 1.0) * cell + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell


@dataclass(frozen=True)
class ElementNetwork:
    """The per-element network of each tensor, by layers: weights (T or 1, in, out), biases (T or 1, out)."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]

    def scaled(self, scale: Tensor) -> ElementNetwork:
        """With the feature scales (T, F) folded into the first layer: normalised features need not be formed."""
        return ElementNetwork((self.weights[0] * scale.unsqueeze(2), *self.weights[1:]), self.biases)

    def first_outputs(self, count: int) -> ElementNetwork:
        """Without the outputs after the first ``count``."""
        weights = (*self.weights[:-1], self.weights[-1][:, :, :count])
        return ElementNetwork(weights, (*self.biases[:-1], self.biases[-1][:, :count]))

    def repeated(self, count: int) -> ElementNetwork:
        """For ``count`` tensors in turn, each of which holds as many runs as there are networks."""
        layers = [x.repeat(count, *[1] * (x.dim() - 1)) if len(x) > 1 else x for x in (*self.weights, *self.biases)]
        return ElementNetwork(tuple(layers[: len(self.weights)]), tuple(layers[len(self.weights) :]))


def split_layers(flat: Tensor, sizes: Sequence[int]) -> ElementNetwork:
    """Networks from their flat weights (rows, P): for each layer its matrix, then its bias."""
    weights, biases, start = [], [], 0
    for n_in, n_out in zip(sizes, sizes[1:], strict=False):
        weights.append(flat[:, start : start + n_in * n_out].unflatten(1, (n_in, n_out)))
        start += n_in * n_out
        biases.append(flat[:, start : start + n_out])
        start += n_out
    return ElementNetwork(tuple(weights), tuple(biases))


def flatten_bank(theta: Theta, prefix: str, groups: int, layers: int) -> Tensor:
    """Bank of networks as a matrix (K, P), layer after layer, whose first layer is stored in feature groups.

    Groups are joined by number: ``w0__10`` comes after ``w0__9``, although it sorts before ``w0__2``.
    """
    first = torch.cat([theta[f"{prefix}w0__{k}"] for k in range(groups)], -2)
    leaves = [first, theta[f"{prefix}b0"]]
    for layer in range(1, layers):
        leaves += [theta[f"{prefix}w{layer}"], theta[f"{prefix}b{layer}"]]
    return torch.cat([x.flatten(1) for x in leaves], 1)


def fold_constants(network: ElementNetwork, constants: Tensor) -> ElementNetwork:
    """The network without its last inputs, whose values ``constants`` (C,) or (T, C) are the same for all elements of
    a tensor: they become part of the first bias."""
    first, count = network.weights[0], constants.shape[-1]
    bias = network.biases[0] + (torch.atleast_2d(constants).unsqueeze(1) @ first[:, -count:]).squeeze(1)
    return ElementNetwork((first[:, :-count], *network.weights[1:]), (bias, *network.biases[1:]))
