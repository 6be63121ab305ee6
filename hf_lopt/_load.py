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


# What the kernels are written for: see csrc/features.h and csrc/arguments.cpp.
_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
_FEATURES = frozenset("g clip_g p m v m_rsqrt_v rsqrt_v fac_g g_rsqrt_v row col rsqrt_row rsqrt_col fac_m".split())
_ONLY_SMALL = frozenset(("clip_g", "g_rsqrt_v"))
_UNITS = (4, 8, 32)
_DECAYS = (3, 1, 3)
_SMALL_SIDE, _SMALL_MATRIX = 64, 1 << 16

_REMEDY = (
    "learned optimizers will run in plain PyTorch, some hundred times slower on a CPU. Install a C++17 compiler, then "
    "hf_lopt again with `pip install --no-build-isolation --no-deps --force-reinstall` (in a checkout: `make setup`). "
    "HF_LOPT_KERNELS=torch in the environment silences this warning."
)
_CUDA_REMEDY = (
    "on a GPU learned optimizers will run in plain PyTorch, many times slower. Install the CUDA toolkit of torch's "
    "own CUDA version (its nvcc is looked for on the path and under CUDA_HOME), then hf_lopt again with "
    "`pip install --no-build-isolation --no-deps --force-reinstall` (in a checkout: `make setup`). "
    "HF_LOPT_KERNELS=torch in the environment silences this warning."
)
# The devices that have compiled kernels.
_loaded: set[str] = set()
_enabled = True


def load() -> bool:
    """Load ``hf_lopt._C``, which registers the CPU kernels of operators that are defined; whether that was possible.

    On a torch for CUDA also ``hf_lopt._C_cuda``, the kernels for CUDA. Warns once about one that is missing, of the
    latter only where there is a GPU. Raises ValueError for a value of ``HF_LOPT_KERNELS`` that means nothing.
    """
    choice = os.environ.get("HF_LOPT_KERNELS", "")
    if choice not in ("", "torch"):
        raise ValueError(f"HF_LOPT_KERNELS must be unset or 'torch', got {choice!r}")
    if choice == "torch" or not _import("hf_lopt._C", _REMEDY):
        return False
    _loaded.add("cpu")
    if torch.version.cuda and _import("hf_lopt._C_cuda", _CUDA_REMEDY if torch.cuda.is_available() else ""):
        _loaded.add("cuda")
    return True


def _import(name: str, remedy: str) -> bool:
    """Import an extension; without it warn, unless there is no remedy to tell."""
    try:
        importlib.import_module(name)
        return True
    except ModuleNotFoundError:
        message = f"hf_lopt was installed without its compiled kernels {name}"
    except ImportError as error:  # for example built for a newer torch
        message = f"the compiled kernels {name} do not load ({error})"
    if remedy:
        warnings.warn(f"{message}: {remedy}", stacklevel=3)
    return False


def loaded(device: str = "cpu") -> bool:
    """Whether there are compiled kernels for a type of device."""
    return device in _loaded


def enabled() -> bool:
    """Whether compiled kernels are used: not within :func:`plain`."""
    return _enabled


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """A context within which the operators run in plain PyTorch, for comparisons."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


def operator(name: str, kernel: Callable) -> Callable:
    """The function to call for the operator ``name``, whose plain kernel is ``kernel``.

    It is the operator itself, except where compiled kernels are loaded: then what they do not cover goes to the plain
    kernel, and what they change is told to autograd, which does not see it.
    """
    overload = getattr(torch.ops.hf_lopt, name).default
    if not _loaded:
        return overload
    position, covers, mutated = CALLS[name]

    def call(*args: Any) -> Any:
        first = args[position]
        device = (first if isinstance(first, Tensor) else first[0]).device.type
        if device != "cpu" and device not in _loaded:
            return overload(*args)  # a device without kernels of its own, or a fake tensor
        here = covers_on_cpu if device == "cpu" else covers_on_cuda
        if not (_enabled and covers(*args) and here(name, *args)):
            return kernel(*args)
        if mutated:
            lists = (args[i] if isinstance(args[i], (list, tuple)) else [args[i]] for i in mutated)
            torch.autograd.graph.increment_version([x for xs in lists for x in xs if not x.is_inference()])
        return overload(*args)

    call.__name__, call.__doc__ = name, kernel.__doc__
    return call


def _covers_sums(params: Sequence[Tensor], grads: Sequence[Tensor], *_: Any) -> bool:
    return _DTYPES.issuperset([x.dtype for x in (*params, *grads)])


def _covers_factored(rows: Sequence[Tensor], *args: Any) -> bool:
    return bool(rows) and all(x.dtype == torch.float32 for xs in (rows, *args[:4]) for x in xs)


def _covers_features(features: Sequence[str], params: Sequence[Tensor], grads: Sequence[Tensor], *args: Any) -> bool:
    decays = args[10:13]
    return _FEATURES.issuperset(features) and tuple(map(len, decays)) == _DECAYS and _covers_sums(params, grads)


def _covers_slices(
    params: Sequence[Tensor],
    row_axes: Sequence[int],
    col_axes: Sequence[int],
    slice_axes: Sequence[int],
    anywhere: bool,
) -> bool:
    """Slices over the last axis of vectors, and of larger tensors over the last two axes (or ``anywhere``), which have
    to be the factored ones."""
    pairs = zip(slice_axes[::2], slice_axes[1::2], strict=True) if slice_axes else ()
    for p, a, b, pair in zip(params, row_axes, col_axes, pairs, strict=bool(slice_axes)):
        n = p.dim()
        if n == 2 and pair[0] == pair[1] and not (a < 0 and pair[0] == 1):
            return False
        if n > 2 and not anywhere and not (set(pair) == {n - 2, n - 1} and (a < 0 or {a, b} == set(pair))):
            return False
    return True


def _covers_slices_of(name: str, args: Sequence[Any], anywhere: bool) -> bool:
    if name in ("feature_sums", "apply_network"):
        return _covers_slices(args[1], *args[10:13], anywhere)
    if name == "descend":
        none = [-1] * len(args[0])
        return _covers_slices(args[0], none, none, args[7], anywhere)
    return True


def covers_on_cpu(name: str, *args: Any) -> bool:
    """Whether the CPU kernels, too, take a call that ``CALLS`` says the compiled kernels cover."""
    return name not in ONLY_CUDA and _covers_slices_of(name, args, False)


def covers_on_cuda(name: str, *args: Any) -> bool:
    """Whether the CUDA kernels, too, take a call that ``CALLS`` says the compiled kernels cover."""
    if name in ONLY_CPU:
        return False
    return _covers_slices_of(name, args, True) and (name != "update_factored" or len(args[9]) == 3)


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


def _covers_matrices(x: Tensor, dtype: torch.dtype, *_: Any) -> bool:
    """Small ones, in a core's cache: for others a library takes all threads."""
    rows, columns = x.shape[-2:]
    return x.dtype == dtype == torch.float32 and min(rows, columns) <= _SMALL_SIDE and rows * columns <= _SMALL_MATRIX


def _covers_advance(*args: Any) -> bool:
    stats, sums, corrected, own = args[0], args[1], args[7], args[8]
    # The numbers of decays of VeLO's accumulators, and some room in the arguments of the kernel.
    return len(stats) <= 8 and len(sums) <= 8 and len(corrected) <= 8 and (not own or own[0].shape[1] == 11)


def _covers_pool(mixed: Tensor, hidden: Sequence[Tensor]) -> bool:
    return mixed.dtype == torch.float32


def _covers_lstm(gates: Tensor, hidden: Sequence[Tensor], cell: Sequence[Tensor], heads: Tensor, *_: Any) -> bool:
    return gates.dtype == torch.float32 and heads.shape[0] <= 2048 and heads.shape[1] <= 1024


def _covers_fold(networks: Tensor, sizes: Sequence[int], *args: Any) -> bool:
    return len(sizes) in (0, 4) and len(args[7]) <= 4


# Operator -> position of a tensor or list that tells the device, what its compiled kernels cover, what it changes.
CALLS: dict[str, tuple[int, Callable[..., bool], tuple[int, ...]]] = {
    "sums": (0, _covers_sums, ()),
    "update_factored": (2, _covers_factored, ()),
    "feature_sums": (1, _covers_features, ()),
    "apply_network": (1, _covers_network, (1, 3, 4, 5, 25)),
    "adam_step": (0, _covers_sums, (0, 2, 3)),
    "descend": (0, _covers_sums, (0,)),
    "orthogonalize": (0, _covers_matrices, ()),
    "advance": (4, _covers_advance, (4, 5)),
    "pool": (0, _covers_pool, ()),
    "lstm_step": (0, _covers_lstm, (1, 2)),
    "fold_network": (7, _covers_fold, ()),
    "assign": (2, lambda *_: True, (0,)),
    "zero_nan": (0, lambda tensors: _DTYPES.issuperset(x.dtype for x in tensors), (0,)),
}
# A few calls of PyTorch on the CPU, but launches on a GPU.
ONLY_CUDA = frozenset(("advance", "pool", "lstm_step", "assign", "zero_nan"))
# Matrix products of a library on a GPU.
ONLY_CPU = frozenset(("orthogonalize",))
