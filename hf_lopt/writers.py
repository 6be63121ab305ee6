"""Writes meta-weights in the file formats in which learned optimizers are published: :mod:`hf_lopt.formats` backwards.

Everything is made in memory and returned as bytes; who calls decides where they go. The same theta gives the same
bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgpack
import torch
from safetensors.torch import save as safetensors_bytes

from hf_lopt.formats import (
    BANK,
    CELO2_LEAVES,
    DECAY_OFFSETS,
    FC,
    NDARRAY_EXT,
    READERS,
    SAFETENSORS,
    SPLIT_BANK,
    SPLIT_BANK_SCALE,
    SPLIT_RNN,
    VELO_GROUPS,
    Theta,
    as_float32,
    raw_float32,
    small_fc_leaves,
    some_of,
)


CONFIG = "config.json"


@dataclass(frozen=True)
class Writer:
    """The other direction of a `Reader`.

    Attributes:
        name: as that of the reader.
        fits: whether theta is of the architecture that the format was made for.
        convert: (theta, bank_scale) -> {subfolder: (tensors, configuration)}; "" is the folder itself.
        absent: leaves that the format cannot carry.
    """

    name: str
    fits: Callable[[Mapping[str, torch.Tensor]], bool]
    convert: Callable[[Mapping[str, torch.Tensor], float], dict[str, tuple[Theta, dict[str, Any]]]]
    absent: tuple[str, ...] = ()


def write_flax(theta: Mapping[str, torch.Tensor]) -> bytes:
    """Theta as flax stores it (`theta.state`): sorted, nested in the way of the JAX reference, float32.

    Raises:
        ValueError: for a leaf whose path is also that of a group of leaves.
    """
    tree: dict[str, Any] = {}
    for name in sorted(theta):
        # Haiku's tree has a level for the module name, which may itself hold a "/": component / module / parameter.
        first, _, rest = name.partition("/")
        module, _, last = rest.rpartition("/")
        path = [part for part in (first, module, last) if part]
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ValueError(f"{name!r} cannot be stored as a tree: a part of its path is a leaf of its own")
        array = msgpack.packb((tuple(theta[name].shape), "float32", raw_float32(theta[name])), use_bin_type=True)
        node[path[-1]] = msgpack.ExtType(NDARRAY_EXT, array)
    return msgpack.packb(tree, use_bin_type=True)


def write_safetensors(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Named tensors as the content of a `.safetensors` file, float32; the same tensors give the same bytes."""
    own = {name: as_float32(name, tensors[name]) for name in sorted(tensors)}
    return safetensors_bytes(own)


def write_published(
    theta: Mapping[str, torch.Tensor], *, bank_scale: float = 100.0
) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """Theta in the folder format of its architecture: relative path -> content, and the leaves that it cannot carry.

    Args:
        bank_scale: the factor that the optimizer puts on the mean over its bank; the two-folder VeLO format stores the
            bank for a factor of 100. Unless the two are equal, a value may change in its last bit.

    Raises:
        ValueError: no folder format fits; the message names those there are.
    """
    writer = next((w for w in WRITERS if w.fits(theta)), None)
    if writer is None:
        known = ", ".join(w.name for w in WRITERS)
        raise ValueError(
            f"the leaves {some_of(theta)} fit no published folder format ({known}). Use format='theta_state' or "
            "'safetensors', which hold any tree."
        )
    files = {}
    for folder, (tensors, config) in writer.convert(theta, bank_scale).items():
        prefix = f"{folder}/" if folder else ""
        files[prefix + SAFETENSORS] = write_safetensors(tensors)
        files[prefix + CONFIG] = json.dumps(config, indent=2, sort_keys=True).encode()
    return files, writer.absent


def _unrename(theta: Mapping[str, torch.Tensor], leaves: Mapping[str, str]) -> Theta:
    """The inverse of `_rename`, for torch's (out, in) weights."""
    return {
        name: theta[leaf].mT.contiguous() if name.endswith(".weight") else theta[leaf] for name, leaf in leaves.items()
    }


def _write_velo_split(theta: Mapping[str, torch.Tensor], bank_scale: float) -> dict[str, tuple[Theta, dict[str, Any]]]:
    scale = bank_scale / SPLIT_BANK_SCALE
    bank = {"0": torch.cat([theta[f"{BANK}w0__{k}"] for k in range(len(VELO_GROUPS))], -2)}
    bank |= {number: theta[f"{BANK}w{number}"] for number in ("1", "2")}
    mlp: Theta = {}
    for layer, number in SPLIT_BANK.items():
        index = ".0" if layer == "hidden" else ""
        mlp[f"{layer}_weights_{index}"] = (bank[number].mT * scale).contiguous()
        mlp[f"{layer}_bias_{index}"] = theta[f"{BANK}b{number}"] * scale
        # Scratch space of that implementation, which wants it in the file.
        for kind in ("weights", "bias"):
            mlp[f"{layer}_{kind}{index}"] = torch.zeros(mlp[f"{layer}_{kind}_{index}"].shape[1:])
    size, units, outputs = bank["0"].shape[0], bank["0"].shape[-1], bank["2"].shape[-1]
    inputs, hidden = theta["rnn_params/linear/w"].shape
    rnn_config = {"input_size": inputs, "lstm_hidden_size": hidden, "mix_layers": True, "param_inits": size}
    mlp_config = {"input_size": sum(VELO_GROUPS), "hidden_size": units, "hidden_layers": 1, "output_size": outputs}
    return {
        "rnn": (_unrename(theta, SPLIT_RNN), rnn_config),
        "mlp": (mlp, mlp_config | {"param_inits": size}),
    }


def _write_small_fc(theta: Mapping[str, torch.Tensor], bank_scale: float) -> dict[str, tuple[Theta, dict[str, Any]]]:
    hidden = sum(name.startswith(f"{FC}w") for name in theta) - 2
    tensors = _unrename(theta, small_fc_leaves(hidden))
    inputs, units = theta[f"{FC}w0"].shape
    return {"": (tensors, {"hidden_layers": hidden, "hidden_size": units, "input_size": inputs})}


def _write_celo2_mlp(theta: Mapping[str, torch.Tensor], bank_scale: float) -> dict[str, tuple[Theta, dict[str, Any]]]:
    tensors = {name: theta[leaf] for name, leaf in CELO2_LEAVES.items()}
    config = {"activation": "relu", "feature_dims": list(VELO_GROUPS), "hidden_layers": 2}
    config |= {"hidden_size": tensors["b0"].shape[-1], "output_size": tensors["dense_b.1"].shape[-1]}
    return {"": (tensors, config)}


def _is_velo(theta: Mapping[str, torch.Tensor]) -> bool:
    leaves = {*SPLIT_RNN.values(), *(f"{BANK}w0__{k}" for k in range(len(VELO_GROUPS)))}
    leaves |= {f"{BANK}{leaf}" for leaf in ("w1", "w2", "b0", "b1", "b2")}
    # Celo has the same leaves, but its scheduler sees no features of the tensor, and its bank is mixed by a softmax.
    return theta.keys() == leaves and theta["rnn_params/linear/w"].shape[0] == sum(VELO_GROUPS)


def _is_small_fc(theta: Mapping[str, torch.Tensor]) -> bool:
    layers = sum(name.startswith(f"{FC}w") for name in theta)
    return layers >= 2 and theta.keys() - set(DECAY_OFFSETS) == set(small_fc_leaves(layers - 2).values())


def _is_celo2(theta: Mapping[str, torch.Tensor]) -> bool:
    return theta.keys() == set(CELO2_LEAVES.values()) and theta[f"{BANK}b0"].ndim == 1


WRITERS = (
    Writer(READERS[0].name, _is_velo, _write_velo_split),
    Writer(READERS[1].name, _is_small_fc, _write_small_fc, absent=DECAY_OFFSETS),
    Writer(READERS[2].name, _is_celo2, _write_celo2_mlp),
)
