"""Flax msgpack (`theta.state`): nested dicts of arrays, as the JAX repositories publish. It holds any theta."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgpack
import torch

from hf_lopt.weights.formats.theta import Theta, flatten, raw_float32


_MAX_BYTES = 1 << 30
_MAX_RANK = 8
_NDARRAY_EXT = 1
_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def read(file: Path) -> Theta:
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
    if code != _NDARRAY_EXT:
        raise ValueError(f"msgpack extension type {code} is not an array (type {_NDARRAY_EXT}) and is not read")
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
        return torch.empty(shape, dtype=torch.float32)
    return torch.frombuffer(bytearray(data), dtype=_DTYPES[dtype]).reshape(shape).to(torch.float32)


def _no_ext(code: int, payload: bytes) -> None:
    raise ValueError(f"msgpack extension type {code} inside an array")


def write(theta: Mapping[str, torch.Tensor]) -> bytes:
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
        node[path[-1]] = msgpack.ExtType(_NDARRAY_EXT, array)
    return msgpack.packb(tree, use_bin_type=True)
