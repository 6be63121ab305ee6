"""The network of small_fc as a torch module. Its decay offsets have no place in the file."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hf_lopt.weights.formats.format import Folders, Format, from_names, to_names
from hf_lopt.weights.formats.theta import Theta


_NETWORK = "nn/~/"
_DECAY_OFFSETS = ("momentum_decays", "rms_decays", "adafactor_decays")


def _leaves(hidden: int) -> dict[str, str]:
    """Tensor name -> leaf, of a network with so many layers between its first and its last."""
    modules = ["input", *(f"linear_{i}" for i in range(hidden)), "output"]
    return {
        f"network.{module}.{kind}": f"{_NETWORK}{kind[0]}{i}"
        for i, module in enumerate(modules)
        for kind in ("weight", "bias")
    }


def _read(tensors: Theta, bank_scale: float) -> Theta:
    hidden = sum(name.startswith("network.linear_") and name.endswith(".weight") for name in tensors)
    return from_names(tensors, _leaves(hidden))


def _fits(theta: Mapping[str, torch.Tensor]) -> bool:
    layers = sum(name.startswith(f"{_NETWORK}w") for name in theta)
    return layers >= 2 and theta.keys() - set(_DECAY_OFFSETS) == set(_leaves(layers - 2).values())


def _write(theta: Mapping[str, torch.Tensor], bank_scale: float) -> Folders:
    hidden = sum(name.startswith(f"{_NETWORK}w") for name in theta) - 2
    tensors = to_names(theta, _leaves(hidden))
    inputs, units = theta[f"{_NETWORK}w0"].shape
    return {"": (tensors, {"hidden_layers": hidden, "hidden_size": units, "input_size": inputs})}


FORMAT = Format(
    "small_fc network",
    frozenset({"network.input.weight", "network.output.weight"}),
    _read,
    _fits,
    _write,
    absent=_DECAY_OFFSETS,
)
