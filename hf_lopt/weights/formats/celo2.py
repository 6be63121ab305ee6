"""The network of Celo2, matrices as in the JAX reference."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hf_lopt.weights.formats.format import Folders, Format, from_names, to_names
from hf_lopt.weights.formats.theta import BANK, VELO_GROUPS, Theta


# Tensor name -> leaf.
_LEAVES = {f"w0.{k}": f"{BANK}w0__{k}" for k in range(len(VELO_GROUPS))} | {"b0": f"{BANK}b0"}
_LEAVES |= {f"dense_{kind}.{i}": f"{BANK}{kind}{i + 1}" for i in (0, 1) for kind in "wb"}


def _read(tensors: Theta, bank_scale: float) -> Theta:
    return from_names(tensors, _LEAVES)


def _fits(theta: Mapping[str, torch.Tensor]) -> bool:
    return theta.keys() == set(_LEAVES.values()) and theta[f"{BANK}b0"].ndim == 1


def _write(theta: Mapping[str, torch.Tensor], bank_scale: float) -> Folders:
    tensors = to_names(theta, _LEAVES)
    config = {"activation": "relu", "feature_dims": list(VELO_GROUPS), "hidden_layers": 2}
    config |= {"hidden_size": tensors["b0"].shape[-1], "output_size": tensors["dense_b.1"].shape[-1]}
    return {"": (tensors, config)}


FORMAT = Format("Celo2 network", frozenset({"w0.0", "dense_w.0"}), _read, _fits, _write)
