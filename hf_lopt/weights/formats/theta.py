"""Meta-weights in memory: a dict from the tree path of the JAX reference (`rnn_params/linear/w`) to a tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch


# Path -> float32 CPU tensor; weights are oriented (in, out).
Theta = dict[str, torch.Tensor]

# Where the leaves of the bank of networks are.
BANK = "ff_mod_stack/~/"
# Columns of the input groups of VeLO's network; group k is the leaf w0__k.
VELO_GROUPS = (1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)

_MAX_DEPTH = 16


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
                if not (isinstance(key, str) and key and _is_unicode(key)):
                    raise ValueError(f"the key {key!r} under {'/'.join(path) or 'the root'} is not a name")
                visit(value, (*path, key))
            return
        name = "/".join(path)
        if name in theta:
            raise ValueError(f"two leaves are called {name!r}")
        theta[name] = as_float32(name, node)

    visit(tree, ())
    return theta


def _is_unicode(text: str) -> bool:
    """Whether the text can be encoded, as the digest needs it: not half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def as_float32(name: str, value: Any) -> torch.Tensor:
    """A copy of the array ``value``, float32 and contiguous on the CPU; ValueError for the leaf ``name`` otherwise."""
    if not isinstance(value, torch.Tensor):
        value = _from_numpy(name, value)
    if not value.is_floating_point():
        raise ValueError(f"leaf {name!r} has dtype {value.dtype}; floating point is needed")
    if value.is_meta or value.layout != torch.strided or value.is_nested:
        kind = "on the meta device" if value.is_meta else f"a {'nested' if value.is_nested else value.layout} tensor"
        raise ValueError(f"leaf {name!r} is {kind}; a dense tensor with values is needed")
    return value.detach().to("cpu", torch.float32, copy=True).contiguous()


def _from_numpy(name: str, value: Any) -> torch.Tensor:
    if value is None or isinstance(value, (str, bytes)):
        raise ValueError(f"leaf {name!r} is not an array but {type(value).__name__}")
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, OverflowError, RuntimeError, RecursionError) as error:
        raise ValueError(f"leaf {name!r} is not an array but {type(value).__name__}: {error}") from error
    # JAX's bfloat16 is a numpy extension type (kind "V" or "f" by version), which torch does not take.
    if array.dtype.name == "bfloat16":
        array = array.astype(np.float32)
    if array.dtype.kind != "f":
        raise ValueError(f"leaf {name!r} has dtype {array.dtype}; floating point is needed")
    with np.errstate(over="ignore"):  # what becomes infinite is refused by name later
        return torch.from_numpy(array.astype(np.float32))


def some_of(names: Iterable[str]) -> str:
    """The first few of some names in sorted order, for a message."""
    names = sorted(names)
    return (", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")) or "none"
