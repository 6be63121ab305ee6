"""Flax msgpack (`theta.state`): nested dicts of arrays, as the JAX repositories publish. It holds any theta."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgpack
import torch

from hf_lopt.weights.formats.theta import Theta, flatten, raw_float32


# A tree has a few dozen leaves; a file that claims more would only cost time and memory.
_MAX_KEYS = 4096
_MAX_KEY_BYTES = 1024
_MAX_DEPTH = 16
_MAX_RANK = 8
_MAX_SIZE = 1 << 30
_NDARRAY_EXT = 1
_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def read(file: Path, content: bytes) -> Theta:
    """Read a flax msgpack tree of arrays (`theta.state`).

    Args:
        file: for messages.
        content: of the file.

    Raises:
        ValueError: the file is damaged or holds anything but nested dicts of floating-point arrays.
    """
    try:
        reader = _Reader(content)
        tree = reader.tree()
        reader.end()
        return flatten(tree)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        reason = str(error) or "it ends too early"
        raise ValueError(
            f"{file}: damaged, or not a flax msgpack file of arrays: {reason}. "
            "Download or copy it again, or use another file."
        ) from error


class _Reader:
    """Reads one value after another, and looks at the kind of each before anything is made of it.

    A container is entered here and never by the library, which would build whatever a file says: so depth, keys and
    objects are counted before they cost anything.
    """

    def __init__(self, content: bytes):
        self._content = content
        self._keys = 0
        self._unpacker = msgpack.Unpacker(None, raw=False, max_buffer_size=len(content), ext_hook=_flax_array)
        self._unpacker.feed(content)

    def kind(self) -> str:
        """The kind of the next value."""
        position = self._unpacker.tell()
        if position >= len(self._content):
            raise ValueError("it ends too early")
        first = self._content[position]
        if first <= 0x7F or first >= 0xE0 or 0xCC <= first <= 0xD3:
            return "int"
        if first <= 0x8F or first in (0xDE, 0xDF):
            return "map"
        if first <= 0x9F or first in (0xDC, 0xDD):
            return "list"
        if first <= 0xBF or first in (0xD9, 0xDA, 0xDB):
            return "str"
        if first in (0xC4, 0xC5, 0xC6):
            return "bytes"
        if first in (0xCA, 0xCB):
            return "float"
        return {0xC0: "None", 0xC1: "an unknown type"}.get(first, "bool" if first <= 0xC3 else "ext")

    def tree(self, depth: int = 0) -> dict[str, Any]:
        """A map of maps and arrays."""
        if (kind := self.kind()) != "map":
            raise ValueError(f"expected a mapping from path to array, got {kind}")
        if depth >= _MAX_DEPTH:
            raise ValueError(f"more than {_MAX_DEPTH} nested levels")
        count = self._unpacker.read_map_header()
        self._keys += count
        if self._keys > _MAX_KEYS:
            raise ValueError(f"more than {_MAX_KEYS} keys")
        node: dict[str, Any] = {}
        for _ in range(count):
            key = self._key()
            if key in node:
                raise ValueError(f"two leaves are called {key!r}")
            kind = self.kind()
            if kind == "map":
                node[key] = self.tree(depth + 1)
            elif kind == "ext":
                node[key] = self._array_leaf(key)
            else:
                raise ValueError(f"leaf {key[:80]!r} is not an array but {kind}")
        return node

    def _key(self) -> str:
        if (kind := self.kind()) != "str":
            raise ValueError(f"a key of type {kind} is not a name")
        key: str = self._unpacker.unpack()
        if len(key) > _MAX_KEY_BYTES:
            raise ValueError(f"the key {key[:40]!r}... of {len(key)} characters is not a name")
        return key

    def _array_leaf(self, key: str) -> torch.Tensor:
        value = self._unpacker.unpack()
        if not isinstance(value, torch.Tensor):  # a time, which the library reads by itself
            raise ValueError(f"leaf {key[:80]!r} is not an array but {type(value).__name__}")
        return value

    def array(self) -> torch.Tensor:
        """The fields of an array: shape, dtype name, little-endian bytes."""
        if self.kind() != "list" or self._unpacker.read_array_header() != 3:
            raise ValueError("an array is not stored as (shape, dtype, bytes)")
        shape = self._shape()
        kind = self.kind()
        dtype = self._unpacker.unpack() if kind == "str" else kind
        if kind != "str" or dtype not in _DTYPES:
            raise ValueError(f"array dtype {dtype[:40]!r} is not one of {', '.join(_DTYPES)}")
        if (kind := self.kind()) != "bytes":
            raise ValueError(f"the data of an array is not bytes; there is {kind} inside an array")
        return _tensor(shape, _DTYPES[dtype], self._unpacker.unpack())

    def _shape(self) -> tuple[int, ...]:
        rank = self._unpacker.read_array_header() if self.kind() == "list" else -1
        if not 0 <= rank <= _MAX_RANK:
            raise ValueError("bad array shape: a list of at most 8 sizes is needed")
        kinds, sizes = [], []
        for _ in range(rank):
            kinds.append(self.kind())
            if kinds[-1] != "int":
                break
            sizes.append(self._unpacker.unpack())
        if kinds != ["int"] * rank or not all(0 <= n <= _MAX_SIZE for n in sizes):
            raise ValueError(f"bad array shape {sizes}")
        return tuple(sizes)

    def end(self) -> None:
        """ValueError if anything follows."""
        if (rest := len(self._content) - self._unpacker.tell()) > 0:
            raise ValueError(f"{rest} bytes too many")


def _flax_array(code: int, payload: bytes) -> torch.Tensor:
    """An array as flax stores it: extension type 1 holding msgpack [shape, dtype name, little-endian bytes]."""
    if code != _NDARRAY_EXT:
        raise ValueError(f"msgpack extension type {code} is not an array (type {_NDARRAY_EXT}) and is not read")
    reader = _Reader(payload)
    array = reader.array()
    reader.end()
    return array


def _tensor(shape: tuple[int, ...], dtype: torch.dtype, data: bytes) -> torch.Tensor:
    want = math.prod(shape) * dtype.itemsize
    if len(data) != want:
        raise ValueError(f"an array of shape {shape} and dtype {dtype} needs {want} bytes, got {len(data)}")
    if want == 0:
        raise ValueError(f"an array of shape {shape} is empty")
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape).to(torch.float32)


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
