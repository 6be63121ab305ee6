"""The meta-networks as pure functions over named tensors, for all tensors of a model at once.

Axes: T tensors (rows), I inputs, H hidden units of the scheduler, K networks in the bank, F features, U units of the
per-element network, O outputs. Weight matrices are (in, out), as the references store them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lopt import _plain_scheduler


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
    return _plain_scheduler.lstm_cell(gates, cell)


@dataclass(frozen=True)
class ElementNetwork:
    """The per-element network of each tensor, by layers: weights (T or 1, in, out), biases (T or 1, out)."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]


@dataclass(frozen=True)
class Folded:
    """The networks of a step, as the operator ``apply_network`` takes them.

    Attributes:
        flat: weights (T, P), layer by layer the matrix and then the bias.
        sizes: widths of the layers; () for no network.
        scale: what the first output is multiplied with, (T,).
        decay: share of the parameter that is taken off, (T,).
    """

    flat: Tensor
    sizes: tuple[int, ...]
    scale: Tensor
    decay: Tensor

    def layers(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Weights and biases, as views."""
        network = split_layers(self.flat, self.sizes)
        return network.weights, network.biases


def split_layers(flat: Tensor, sizes: Sequence[int]) -> ElementNetwork:
    """Networks from their flat weights (rows, P): for each layer its matrix, then its bias."""
    weights, biases, start = [], [], 0
    for n_in, n_out in zip(sizes, sizes[1:], strict=False):
        weights.append(flat.narrow(1, start, n_in * n_out).unflatten(1, (n_in, n_out)))
        start += n_in * n_out
        biases.append(flat.narrow(1, start, n_out))
        start += n_out
    return ElementNetwork(tuple(weights), tuple(biases))


def flatten_network(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """The inverse of :func:`split_layers`; one network, without an axis in front, is a row, too."""
    one = biases[0].dim() == 1
    layers = (x.unsqueeze(0) if one else x for pair in zip(weights, biases, strict=True) for x in pair)
    return torch.cat([x.flatten(1) for x in layers], 1)


def flatten_bank(theta: Theta, prefix: str, groups: int, layers: int) -> Tensor:
    """Bank of networks as a matrix (K, P), layer after layer, whose first layer is stored in feature groups.

    Groups are joined by number: ``w0__10`` comes after ``w0__9``, although it sorts before ``w0__2``.
    """
    first = torch.cat([theta[f"{prefix}w0__{k}"] for k in range(groups)], -2)
    leaves = [first, theta[f"{prefix}b0"]]
    for layer in range(1, layers):
        leaves += [theta[f"{prefix}w{layer}"], theta[f"{prefix}b{layer}"]]
    return torch.cat([x.flatten(1) for x in leaves], 1)
