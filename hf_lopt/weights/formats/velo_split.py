"""VeLO as torch modules in two folders: the RNN is the scheduler, the MLP the bank of networks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from hf_lopt.weights.formats import safetensors_file
from hf_lopt.weights.formats.format import Folders, Format, from_names, require, to_names, transpose
from hf_lopt.weights.formats.theta import BANK, VELO_GROUPS, Theta


# The factor that this format applies to its bank, whatever the optimizer's own factor.
_BANK_SCALE = 100.0
_RNN_MODULES = {
    "mix_layer1": "linear",
    "mix_layer2": "linear_1",
    "final_mix_layer": "linear_2",
    "lstm.linear": "rnn/linear",
    "rnn_to_controls": "rnn_to_controls",
    "step_size": "step_size",
}
# Tensor name -> leaf.
_RNN = {"lstm_init_state.0": "lstm_init_state/hidden", "lstm_init_state.1": "lstm_init_state/cell"} | {
    f"{module}.{kind}": f"rnn_params/{leaf}/{kind[0]}"
    for module, leaf in _RNN_MODULES.items()
    for kind in ("weight", "bias")
}
# Layer -> its number in the names of leaves, and what its tensors' names end in.
_LAYERS = {"input": "0", "hidden": "1", "output": "2"}
_SUFFIX = {"input": "", "hidden": ".0", "output": ""}
# One tensor of the RNN's file and one of the MLPs'.
_MARKS = ("lstm.linear.weight", "input_weights_")


def _read(tensors: Theta, bank_scale: float) -> Theta:
    # The names without the trailing underscore hold the mixed network of some past step, not meta-weights.
    bank = {f"{layer}_{kind}_{_SUFFIX[layer]}" for layer in _LAYERS for kind in ("weights", "bias")}
    scratch = {f"{layer}_{kind}{_SUFFIX[layer]}" for layer in _LAYERS for kind in ("weights", "bias")}
    require(tensors, _RNN.keys() | bank, ignored=scratch)
    theta = from_names({name: tensors[name] for name in _RNN}, _RNN)
    scale = _BANK_SCALE / bank_scale
    for layer, number in _LAYERS.items():
        name = f"{layer}_weights_{_SUFFIX[layer]}"
        w_KIO = transpose(name, tensors[name]) * scale
        theta[f"{BANK}b{number}"] = tensors[f"{layer}_bias_{_SUFFIX[layer]}"] * scale
        if layer != "input":
            theta[f"{BANK}w{number}"] = w_KIO.contiguous()
            continue
        if w_KIO.shape[-2] != sum(VELO_GROUPS):
            raise ValueError(f"input_weights_ takes {w_KIO.shape[-2]} features; VeLO has {sum(VELO_GROUPS)}")
        for group, w in enumerate(w_KIO.split(VELO_GROUPS, dim=-2)):
            theta[f"{BANK}w0__{group}"] = w.contiguous()
    return theta


def _fits(theta: Mapping[str, torch.Tensor]) -> bool:
    leaves = {*_RNN.values(), *(f"{BANK}w0__{k}" for k in range(len(VELO_GROUPS)))}
    leaves |= {f"{BANK}{leaf}" for leaf in ("w1", "w2", "b0", "b1", "b2")}
    # Celo has the same leaves, but its scheduler sees no features of the tensor, and its bank is mixed by a softmax.
    return theta.keys() == leaves and theta["rnn_params/linear/w"].shape[0] == sum(VELO_GROUPS)


def _write(theta: Mapping[str, torch.Tensor], bank_scale: float) -> Folders:
    scale = bank_scale / _BANK_SCALE
    bank = {"0": torch.cat([theta[f"{BANK}w0__{k}"] for k in range(len(VELO_GROUPS))], -2)}
    bank |= {number: theta[f"{BANK}w{number}"] for number in ("1", "2")}
    mlp: Theta = {}
    for layer, number in _LAYERS.items():
        suffix = _SUFFIX[layer]
        mlp[f"{layer}_weights_{suffix}"] = (bank[number].mT * scale).contiguous()
        mlp[f"{layer}_bias_{suffix}"] = theta[f"{BANK}b{number}"] * scale
        # Scratch space of that implementation, which wants it in the file.
        for kind in ("weights", "bias"):
            mlp[f"{layer}_{kind}{suffix}"] = torch.zeros(
                mlp[f"{layer}_{kind}_{suffix}"].shape[1:], dtype=torch.float32
            )
    size, units, outputs = bank["0"].shape[0], bank["0"].shape[-1], bank["2"].shape[-1]
    inputs, hidden = theta["rnn_params/linear/w"].shape
    rnn_config = {"input_size": inputs, "lstm_hidden_size": hidden, "mix_layers": True, "param_inits": size}
    mlp_config = {"input_size": sum(VELO_GROUPS), "hidden_size": units, "hidden_layers": 1, "output_size": outputs}
    return {
        "rnn": (to_names(theta, _RNN), rnn_config),
        "mlp": (mlp, mlp_config | {"param_inits": size}),
    }


FORMAT = Format("VeLO in two folders, RNN and MLP", frozenset(_MARKS), _read, _fits, _write)


def lacks_other_half(file: Path) -> bool:
    """Whether `file` is one of the two files of this format, without the other."""
    if file.suffix != ".safetensors":
        return False
    names = safetensors_file.read(file).keys()
    return sum(mark in names for mark in _MARKS) == 1


def other_half(name: str) -> str | None:
    """The name of the other half: rnn and mlp swapped in the last path component, or None."""
    head, last = re.fullmatch(r"(.*?)([^/\\]*)[/\\]*", name, flags=re.DOTALL).groups()
    swap = {"rnn": "mlp", "RNN": "MLP", "Rnn": "Mlp"}
    swap |= {v: k for k, v in swap.items()}
    swapped, count = re.subn("|".join(swap), lambda m: swap[m[0]], last)
    return head + swapped if count == 1 else None
