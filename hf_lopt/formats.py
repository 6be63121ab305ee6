"""Reads the file formats in which learned optimizers are published; :mod:`hf_lopt.writers` is the other direction.

Everything becomes a `Theta`: a dict from the tree path of the JAX reference (`rnn_params/linear/w`) to a float32 CPU
tensor, weights oriented (in, out). Nothing here executes code from a file: msgpack and safetensors are plain data, and
pickles are never opened.

A format of named tensors is one entry of `READERS`. The flax format carries the tree itself and needs no entry.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file


Theta = dict[str, torch.Tensor]

THETA_STATE = "theta.state"
SAFETENSORS = "model.safetensors"
# Beside the weights: rule, origin, and what the format of the weights has no room for.
PROVENANCE = "hf_lopt.json"

# Columns of the input groups of VeLO's network; group k is the leaf w0__k.
VELO_GROUPS = (1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)
# The factor that the two-folder VeLO format applies to its bank, whatever the optimizer's own factor.
SPLIT_BANK_SCALE = 100.0

_MAX_BYTES = 1 << 30
_MAX_DEPTH = 16
_MAX_RANK = 8
NDARRAY_EXT = 1
_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True)
class Reader:
    """One format of named tensors.

    Attributes:
        name: what the format is called in messages.
        marks: tensor names that identify it; all of them must be there.
        convert: (tensors, bank_scale) -> theta.
        absent: leaves of the rule that the format cannot carry.
    """

    name: str
    marks: frozenset[str]
    convert: Callable[[Theta, float], Theta]
    absent: tuple[str, ...] = ()


def read(files: Sequence[Path], *, bank_scale: float = 100.0) -> tuple[Theta, tuple[str, ...]]:
    """Read one set of meta-weights from `files` (several files together make one set).

    Args:
        files: existing files, `*.safetensors` or flax msgpack (any other name).
        bank_scale: the factor that the optimizer will put on the mean over its bank of networks. The two-folder VeLO
            format stores the bank for a factor of 100; it is rescaled so that bank_scale * bank is what it means.

    Returns:
        theta, and the leaves that this format cannot carry (the caller fills them).

    Raises:
        ValueError: a file is damaged, or no reader knows the format. The message names the file.
    """
    where = " + ".join(str(f) for f in files)
    if len(files) == 1 and files[0].suffix != ".safetensors":
        return read_flax(files[0]), ()
    tensors: Theta = {}
    for file in files:
        for name, tensor in read_safetensors(file).items():
            if name in tensors:
                raise ValueError(
                    f"{where}: both files hold a tensor {name!r}, so they are not the two halves of one set."
                )
            tensors[name] = tensor
    if any("/" in name for name in tensors):
        return tensors, ()
    reader = next((r for r in READERS if r.marks <= tensors.keys()), None)
    if reader is None:
        known = ", ".join(r.name for r in READERS)
        raise ValueError(
            f"{where}: the tensors {some_of(tensors)} belong to no known format (flax theta.state, theta paths, "
            f"{known}). Convert the file to a mapping from theta path to array and pass that."
        )
    try:
        return reader.convert(tensors, bank_scale), reader.absent
    except ValueError as error:
        raise ValueError(f"{where} ({reader.name}): {error}") from error


def lacks_other_half(file: Path) -> bool:
    """Whether `file` is one of the two files of the split VeLO format, without the other."""
    if file.suffix != ".safetensors":
        return False
    names = read_safetensors(file).keys()
    return sum(mark in names for mark in _SPLIT_MARKS) == 1


def sibling(name: str) -> str | None:
    """The name of the other half in the split VeLO format: rnn and mlp swapped in the last path component, or None."""
    head, last = re.fullmatch(r"(.*?)([^/\\]*)[/\\]*", name, flags=re.DOTALL).groups()
    swap = {"rnn": "mlp", "RNN": "MLP", "Rnn": "Mlp"}
    swap |= {v: k for k, v in swap.items()}
    swapped, count = re.subn("|".join(swap), lambda m: swap[m[0]], last)
    return head + swapped if count == 1 else None


def content_sha256(theta: Mapping[str, torch.Tensor]) -> str:
    """Hex digest of what is in theta, independent of the file format.

    Per leaf, in sorted order: the name in UTF-8, a zero byte, the shape as decimals joined by commas, a zero byte, and
    the values as little-endian float32 in C order.
    """
    digest = hashlib.sha256()
    for name in sorted(theta):
        leaf = theta[name]
        digest.update(f"{name}\0{','.join(map(str, leaf.shape))}\0".encode())
        digest.update(raw_float32(leaf))
    return digest.hexdigest()


def raw_float32(leaf: torch.Tensor) -> bytes:
    """The values as little-endian float32 in C order."""
    return leaf.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4", copy=False).tobytes()


# --- flax msgpack


def read_flax(file: Path) -> Theta:
    """Read a flax msgpack tree of arrays (`theta.state`).

    Raises:
        ValueError: the file is damaged or holds anything but nested dicts of floating-point arrays.
    """
    size = file.stat().st_size
    if size > _MAX_BYTES:
        raise ValueError(
            f"{file}: {size} bytes; meta-weights are at most {_MAX_BYTES}. This is not a theta.state file."
        )
    try:
        tree = msgpack.unpackb(file.read_bytes(), ext_hook=_flax_array, raw=False, strict_map_key=True)
        return flatten(tree)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise ValueError(
            f"{file}: damaged, or not a flax msgpack file of arrays: {error}. "
            "Download or copy it again, or use another file."
        ) from error


def _flax_array(code: int, payload: bytes) -> torch.Tensor:
    """An array as flax stores it: extension type 1 holding msgpack [shape, dtype name, little-endian bytes]."""
    if code != NDARRAY_EXT:
        raise ValueError(f"msgpack extension type {code} is not an array (type {NDARRAY_EXT}) and is not read")
    fields = msgpack.unpackb(payload, raw=False, ext_hook=_no_ext)
    if not (isinstance(fields, list) and len(fields) == 3):
        raise ValueError("an array is not stored as (shape, dtype, bytes)")
    shape, dtype, data = fields
    if not (
        isinstance(shape, list)
        and len(shape) <= _MAX_RANK
        and all(type(n) is int and 0 <= n <= _MAX_BYTES for n in shape)
    ):
        raise ValueError(f"bad array shape {str(shape)[:80]}")
    if not (isinstance(dtype, str) and dtype in _DTYPES):
        raise ValueError(f"array dtype {str(dtype)[:40]!r} is not one of {', '.join(_DTYPES)}")
    if not isinstance(data, bytes):
        raise ValueError("the data of an array is not bytes")
    want = math.prod(shape) * _DTYPES[dtype].itemsize
    if len(data) != want:
        raise ValueError(f"an array of shape {tuple(shape)} and dtype {dtype} needs {want} bytes, got {len(data)}")
    if want == 0:
        return torch.empty(shape)
    return torch.frombuffer(bytearray(data), dtype=_DTYPES[dtype]).reshape(shape).to(torch.float32)


def _no_ext(code: int, payload: bytes) -> None:
    raise ValueError(f"msgpack extension type {code} inside an array")


def flatten(tree: Any) -> Theta:
    """Join the keys of a nested mapping of arrays with "/"; module names may themselves hold a "/".

    Arrays: torch, numpy, or anything `numpy.asarray` takes (JAX).

    Raises:
        ValueError: a key is not text, two paths coincide, or a leaf is not a floating-point array.
    """
    if not isinstance(tree, Mapping):
        raise ValueError(f"expected a mapping from path to array, got {type(tree).__name__}")
    theta: Theta = {}

    def visit(node: Any, path: tuple[str, ...]) -> None:
        if isinstance(node, Mapping):
            if len(path) >= _MAX_DEPTH:
                raise ValueError(f"more than {_MAX_DEPTH} nested levels")
            for key, value in node.items():
                if not (isinstance(key, str) and key):
                    raise ValueError(f"the key {key!r} under {'/'.join(path) or 'the root'} is not a name")
                visit(value, (*path, key))
            return
        name = "/".join(path)
        if name in theta:
            raise ValueError(f"two leaves are called {name!r}")
        theta[name] = as_float32(name, node)

    visit(tree, ())
    return theta


def as_float32(name: str, value: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        if value is None or isinstance(value, (str, bytes)):
            raise ValueError(f"leaf {name!r} is not an array but {type(value).__name__}")
        array = np.asarray(value)
        # JAX's bfloat16 is a numpy extension type (kind "V" or "f" by version), which torch does not take.
        if array.dtype.name == "bfloat16":
            array = array.astype(np.float32)
        if array.dtype.kind != "f":
            raise ValueError(f"leaf {name!r} has dtype {array.dtype}; floating point is needed")
        value = torch.from_numpy(array.astype(np.float32))
    if not value.is_floating_point():
        raise ValueError(f"leaf {name!r} has dtype {value.dtype}; floating point is needed")
    return value.detach().to("cpu", torch.float32, copy=True).contiguous()


# --- safetensors


def read_safetensors(file: Path) -> Theta:
    """Read named float tensors; ValueError naming the file when it is damaged."""
    try:
        return {name: as_float32(name, tensor) for name, tensor in load_file(file).items()}
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"{file}: damaged, or not a safetensors file of floating-point tensors: {error}. "
            "Download or copy it again, or use another file."
        ) from error


def _rename(tensors: Theta, leaves: Mapping[str, str], *, transpose: Callable[[str], bool]) -> Theta:
    """Theta from a table {tensor name: leaf}, transposing the tensors that `transpose` selects."""
    _require(tensors, leaves)
    return {
        leaf: _transpose(name, tensors[name]).contiguous() if transpose(name) else tensors[name]
        for name, leaf in leaves.items()
    }


def _transpose(name: str, weight: torch.Tensor) -> torch.Tensor:
    if weight.ndim < 2:
        raise ValueError(f"the weight {name} has shape {tuple(weight.shape)}; a matrix is needed")
    return weight.mT


def _require(tensors: Theta, names: Iterable[str], *, ignored: Iterable[str] = ()) -> None:
    missing = sorted(set(names) - tensors.keys())
    extra = sorted(tensors.keys() - set(names) - set(ignored))
    if missing or extra:
        raise ValueError(
            f"missing tensors: {some_of(missing)}; unexpected tensors: {some_of(extra)}. "
            "The file is of another architecture than the published one, or incomplete."
        )


def some_of(names: Iterable[str]) -> str:
    names = sorted(names)
    return (", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")) or "none"


BANK = "ff_mod_stack/~/"
_SPLIT_RNN_MODULES = {
    "mix_layer1": "linear",
    "mix_layer2": "linear_1",
    "final_mix_layer": "linear_2",
    "lstm.linear": "rnn/linear",
    "rnn_to_controls": "rnn_to_controls",
    "step_size": "step_size",
}
SPLIT_RNN = {"lstm_init_state.0": "lstm_init_state/hidden", "lstm_init_state.1": "lstm_init_state/cell"} | {
    f"{module}.{kind}": f"rnn_params/{leaf}/{kind[0]}"
    for module, leaf in _SPLIT_RNN_MODULES.items()
    for kind in ("weight", "bias")
}
SPLIT_BANK = {"input": "0", "hidden": "1", "output": "2"}
_SPLIT_MARKS = ("lstm.linear.weight", "input_weights_")


def _velo_split(tensors: Theta, bank_scale: float) -> Theta:
    # The names without the trailing underscore hold the mixed network of some past step, not meta-weights.
    index = {layer: ".0" if layer == "hidden" else "" for layer in SPLIT_BANK}
    bank = {f"{layer}_{kind}_{index[layer]}" for layer in SPLIT_BANK for kind in ("weights", "bias")}
    scratch = {f"{layer}_{kind}{index[layer]}" for layer in SPLIT_BANK for kind in ("weights", "bias")}
    _require(tensors, SPLIT_RNN.keys() | bank, ignored=scratch)
    rnn = {name: tensors[name] for name in SPLIT_RNN}
    theta = _rename(rnn, SPLIT_RNN, transpose=lambda name: name.endswith(".weight"))
    scale = SPLIT_BANK_SCALE / bank_scale
    for layer, number in SPLIT_BANK.items():
        name = f"{layer}_weights_{index[layer]}"
        w_KIO = _transpose(name, tensors[name]) * scale
        theta[f"{BANK}b{number}"] = tensors[f"{layer}_bias_{index[layer]}"] * scale
        if layer != "input":
            theta[f"{BANK}w{number}"] = w_KIO.contiguous()
            continue
        if w_KIO.shape[-2] != sum(VELO_GROUPS):
            raise ValueError(f"input_weights_ takes {w_KIO.shape[-2]} features; VeLO has {sum(VELO_GROUPS)}")
        for group, w in enumerate(w_KIO.split(VELO_GROUPS, dim=-2)):
            theta[f"{BANK}w0__{group}"] = w.contiguous()
    return theta


FC = "nn/~/"
DECAY_OFFSETS = ("momentum_decays", "rms_decays", "adafactor_decays")


def small_fc_leaves(hidden: int) -> dict[str, str]:
    modules = ["input", *(f"linear_{i}" for i in range(hidden)), "output"]
    return {
        f"network.{module}.{kind}": f"{FC}{kind[0]}{i}"
        for i, module in enumerate(modules)
        for kind in ("weight", "bias")
    }


def _small_fc(tensors: Theta, bank_scale: float) -> Theta:
    hidden = sum(name.startswith("network.linear_") and name.endswith(".weight") for name in tensors)
    return _rename(tensors, small_fc_leaves(hidden), transpose=lambda name: name.endswith(".weight"))


CELO2_LEAVES = {f"w0.{k}": f"{BANK}w0__{k}" for k in range(len(VELO_GROUPS))} | {"b0": f"{BANK}b0"}
CELO2_LEAVES |= {f"dense_{kind}.{i}": f"{BANK}{kind}{i + 1}" for i in (0, 1) for kind in "wb"}


def _celo2_mlp(tensors: Theta, bank_scale: float) -> Theta:
    return _rename(tensors, CELO2_LEAVES, transpose=lambda name: False)


READERS = (
    Reader("VeLO in two folders, RNN and MLP", frozenset(_SPLIT_MARKS), _velo_split),
    Reader(
        "small_fc network",
        frozenset({"network.input.weight", "network.output.weight"}),
        _small_fc,
        absent=DECAY_OFFSETS,
    ),
    Reader("Celo2 network", frozenset({"w0.0", "dense_w.0"}), _celo2_mlp),
)
