"""Loads the compiled kernels, and decides which calls they take.

The kernels change speed, not numbers: without them, and for calls that they do not cover, the operators of
:mod:`hf_lopt._ops` run in plain PyTorch. ``HF_LOPT_KERNELS=torch`` in the environment switches them off.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


# What the kernels are written for: see csrc/mlp.h and csrc/cpu/common.cpp.
_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
_FEATURES = frozenset("g clip_g p m v m_rsqrt_v rsqrt_v fac_g g_rsqrt_v row col rsqrt_row rsqrt_col fac_m".split())
_ONLY_SMALL = frozenset(("clip_g", "g_rsqrt_v"))
_UNITS = (4, 8, 32)
_DECAYS = (3, 1, 3)

_REMEDY = (
    "learned optimizers will run in plain PyTorch, some hundred times slower on a CPU. Install a C++17 compiler, then "
    "hf_lopt again with `pip install --no-build-isolation --no-deps --force-reinstall` (in a checkout: `make setup`). "
    "HF_LOPT_KERNELS=torch in the environment silences this warning."
)
_loaded, _enabled = False, True


def load() -> bool:
    """Load ``hf_lopt._C``, which defines the operators and registers their CPU kernels; whether that was possible.

    Warns once if it was not. Raises ValueError for a value of ``HF_LOPT_KERNELS`` that means nothing.
    """
    global _loaded
    choice = os.environ.get("HF_LOPT_KERNELS", "")
    if choice not in ("", "torch"):
        raise ValueError(f"HF_LOPT_KERNELS must be unset or 'torch', got {choice!r}")
    if choice != "torch":
        try:
            importlib.import_module("hf_lopt._C")
            _loaded = True
        except ModuleNotFoundError:
            warnings.warn(f"hf_lopt was installed without its compiled kernels: {_REMEDY}", stacklevel=2)
        except ImportError as error:  # for example built for a newer torch
            warnings.warn(f"the compiled kernels of hf_lopt do not load ({error}): {_REMEDY}", stacklevel=2)
    return _loaded


def loaded() -> bool:
    """Whether there are compiled kernels for the CPU."""
    return _loaded


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """A context within which the operators run in plain PyTorch on the CPU, for comparisons."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


def operator(name: str, kernel: Callable) -> Callable:
    """The function to call for the operator ``name``, whose plain kernel is ``kernel``.

    It is the operator itself, except on the CPU when compiled kernels are loaded: then what they do not cover goes to
    the plain kernel, and what they change is told to autograd, which does not see it.
    """
    overload = getattr(torch.ops.hf_lopt, name).default
    if not _loaded or name not in _CALLS:
        return overload
    position, covers, mutated = _CALLS[name]

    def call(*args: Any) -> Any:
        if args[position][0].device.type == "cpu":
            if not (_enabled and covers(*args)):
                return kernel(*args)
            if mutated:
                changed = [x for i in mutated for x in args[i] if not x.is_inference()]
                torch.autograd.graph.increment_version(changed)
        return overload(*args)

    call.__name__, call.__doc__ = name, kernel.__doc__
    return call


def _covers_sums(params: Sequence[Tensor], grads: Sequence[Tensor], *_: Any) -> bool:
    return _DTYPES.issuperset([x.dtype for x in (*params, *grads)])


def _covers_factored(rows: Sequence[Tensor], *args: Any) -> bool:
    return bool(rows) and all(x.dtype == torch.float32 for xs in (rows, *args[:4]) for x in xs)


def _covers_features(features: Sequence[str], params: Sequence[Tensor], grads: Sequence[Tensor], *args: Any) -> bool:
    decays = args[10:13]
    return (
        _FEATURES.issuperset(features)
        and tuple(map(len, decays)) == _DECAYS
        and _covers_slices(params, *args[7:10])
        and _covers_sums(params, grads)
    )


def _covers_slices(
    params: Sequence[Tensor], row_axes: Sequence[int], col_axes: Sequence[int], slice_axes: Sequence[int]
) -> bool:
    """Slices over the last two axes, which are the factored ones, or over the last axis of vectors."""
    pairs = zip(slice_axes[::2], slice_axes[1::2], strict=True) if slice_axes else ()
    for p, a, b, pair in zip(params, row_axes, col_axes, pairs, strict=bool(slice_axes)):
        n = p.dim()
        if n > 2 and not {a, b} == set(pair) == {n - 2, n - 1}:
            return False
        if n == 2 and pair[0] == pair[1] and not (a < 0 and pair[0] == 1):
            return False
    return True


def _covers_network(features: Sequence[str], *args: Any) -> bool:
    weights = args[18]
    if len(weights) != 3 or weights[0].shape[2] not in _UNITS:
        return False
    units = weights[0].shape[2]
    return (
        all(w.dtype == torch.float32 for w in weights)
        and weights[1].shape[1:] == (units, units)
        and weights[2].shape[1:] == (units, 2)
        and (units <= 8 or _ONLY_SMALL.isdisjoint(features))
        and _covers_features(features, *args)
    )


# Operator -> position of the parameters among its arguments, what its compiled kernel covers, which lists it changes.
_CALLS: dict[str, tuple[int, Callable[..., bool], tuple[int, ...]]] = {
    "sums": (0, _covers_sums, ()),
    "update_factored": (2, _covers_factored, ()),
    "feature_sums": (1, _covers_features, ()),
    "apply_network": (1, _covers_network, (1, 3, 4, 5, 25)),
    "adam_step": (0, _covers_sums, (0, 2, 3)),
    "descend": (0, _covers_sums, (0,)),
}
