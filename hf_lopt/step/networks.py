"""The meta-networks as pure functions over named tensors, for all tensors of a model at once.

Axes: T tensors (rows), I inputs, H hidden units of the scheduler, K networks in the bank, F features, U units of the
per-element network, O outputs. Weight matrices are (in, out), as the references store them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_lopt.features import ElementFeatures
from hf_lopt.kernels import ops
from hf_lopt.kernels.arguments import SpecializeNetworks
from hf_lopt.kernels.reference import scheduler as reference
from hf_lopt.step.tensors import TensorList


if TYPE_CHECKING:
    from hf_lopt.step.measure import Measurements


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
    return reference.lstm_cell(gates, cell)


@dataclass(frozen=True)
class ElementNetwork:
    """The per-element network of each tensor, by layers: weights (T or 1, in, out), biases (T or 1, out)."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]


@dataclass(frozen=True)
class TensorNetworks:
    """The network of each result in the form that the operator ``apply_network`` takes, and its step.

    Attributes:
        flat: weights (M, P), layer by layer the matrix and then the bias.
        sizes: widths of the layers; () for no network.
        scale: what the first output is multiplied with, (M,).
        decay: share of the parameter that is taken off, (M,).
    """

    flat: Tensor
    sizes: tuple[int, ...]
    scale: Tensor
    decay: Tensor

    def layers(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Weights and biases, as views."""
        network = split_layers(self.flat, self.sizes)
        return network.weights, network.biases


def specialize_networks(
    tensors: TensorList,
    features: ElementFeatures | None,
    measurements: Measurements | None,
    networks: Tensor,
    sizes: Sequence[int],
    *,
    constants: Tensor | None = None,
    outputs: int = 2,
    factors: Sequence[Tensor] = (),
    step_mult: float | None = 1.0,
    relative: bool = False,
) -> TensorNetworks:
    """Networks for features that are not normalised, their step sizes and decays.

    ``networks`` (T or 1, P) are flat, of widths ``sizes``; of stacked replicas (R, P) or (1, P). ``constants`` are
    the values of the last inputs, (C,) or (T, C), of stacked replicas (R, C). A step is lr * factors * step_mult times
    the output, and where it is ``relative`` also times the root mean square of the parameter, which counts as
    ``min_param_scale`` at least. Weight decay is decoupled and scaled by lr. A ``step_mult`` of None leaves all this
    out: the step is made of the outputs later.
    """
    layout = tensors.layout
    numel = layout.slice_numel if measurements is None else measurements.numel
    if step_mult is None:
        lr = weight_decay = layout.one.expand(numel.shape[0])
    else:
        lr, weight_decay = tensors["lr"], tensors["weight_decay"]
    if layout.stacked:  # those of the replicas, for each tensor in turn
        networks = _for_each_tensor(networks, tensors)
        constants = None if constants is None else _for_each_tensor(constants, tensors)
    flat, scale, decay = ops.specialize_networks(
        SpecializeNetworks(
            networks=networks,
            sizes=sizes,
            outputs=outputs,
            constants=constants,
            sums=layout.empty if measurements is None else measurements.sums,
            numel=numel,
            norm_eps=0.0 if measurements is None or features is None else features.norm_eps,
            lr=lr,
            weight_decay=weight_decay,
            factors=factors,
            floor=tensors.least_sizes() if relative else None,
            step_mult=1.0 if step_mult is None else step_mult,
            p_column=features.column("p") if relative and features is not None else -1,
        )
    )
    inputs = sizes[0] - (0 if constants is None else constants.shape[-1]) if sizes else 0
    return TensorNetworks(flat, (inputs, *sizes[1:-1], outputs) if sizes else (), scale, decay)


def _for_each_tensor(x: Tensor, tensors: TensorList) -> Tensor:
    """Rows of the replicas (R, …) repeated for each tensor; what all replicas share stays as it is."""
    replicas = tensors.layout.replicas
    return x.repeat(len(tensors), 1) if x.dim() > 1 and len(x) == replicas > 1 else x


def split_layers(flat: Tensor, sizes: Sequence[int]) -> ElementNetwork:
    """Networks from their flat weights (rows, P): for each layer its matrix, then its bias."""
    layers = list(zip(sizes, sizes[1:], strict=False))
    pieces = flat.split_with_sizes([n for n_in, n_out in layers for n in (n_in * n_out, n_out)], 1)
    rows = flat.shape[0]
    weights = tuple([x.view(rows, *layer) for x, layer in zip(pieces[::2], layers, strict=True)])
    return ElementNetwork(weights, tuple(pieces[1::2]))


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
