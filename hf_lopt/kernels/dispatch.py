"""Loads the compiled kernels, and decides which calls they take.

The kernels change speed, not numbers: without them, and for calls that they do not support, the operators of
:mod:`hf_lopt.kernels.ops` run in plain PyTorch. ``HF_LOPT_KERNELS=torch`` in the environment switches them off.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import operator
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from hf_lopt import notices
from hf_lopt.features import FEATURES
from hf_lopt.kernels import cards, held, remedy
from hf_lopt.kernels.arguments import (
    AdamStep,
    Advance,
    ApplyNetwork,
    Assign,
    Descend,
    FeatureSums,
    LstmStep,
    Orthogonalize,
    Pool,
    SpecializeNetworks,
    Sums,
    UpdateFactored,
    ZeroNan,
)
from hf_lopt.kernels.held import HELD, WITH_DTYPES, HeldList, HeldResults, any_on
from hf_lopt.kernels.reference.formats import read_places
from hf_lopt.kernels.schema import Arguments
from hf_lopt.kernels.small_matrices import is_small


_NO_LISTS = HELD - {HeldList}  # what PyTorch does not take for a list of tensors
# What the kernels are written for.
_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
_FLOAT32 = frozenset((torch.float32,))
STATE_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.int8, torch.uint8))
_FEATURES = frozenset(FEATURES) - {"log_abs_p"}
_NOT_WITH_32_UNITS = frozenset(("clip_g", "g_rsqrt_v"))
_UNITS = (4, 8, 32)
_DECAYS = (3, 1, 3)  # numbers of momenta, second moments and factored accumulators

_SLOW = {
    "hf_lopt._C": "no compiled kernels: about 10 times slower",
    "hf_lopt._C_cuda": "no compiled CUDA kernels: many times slower",
}
_NEEDS = {
    "hf_lopt._C": "a C++17 compiler",
    "hf_lopt._C_cuda": "the CUDA toolkit of torch's own CUDA version (its nvcc on the path or under CUDA_HOME)",
}
# The devices that have compiled kernels.
_loaded: set[str] = set()
# Why an extension that would be of use is not there, and what brings it; by its name.
_missing: dict[str, str] = {}


class _Choice(threading.local):
    """Of each thread: one that compares in plain PyTorch must not change what others run meanwhile."""

    enabled = True


_choice = _Choice()


def load() -> bool:
    """Load ``hf_lopt._C``, which defines the operators and registers their CPU kernels; whether that was possible.

    On a torch for CUDA also ``hf_lopt._C_cuda``, the kernels for CUDA. One that is missing, of the latter only where
    there is a GPU, is told when a run begins (:mod:`hf_lopt.notices`).

    Raises:
        ValueError: for a value of ``HF_LOPT_KERNELS`` that means nothing.
    """
    choice = os.environ.get("HF_LOPT_KERNELS", "")
    if choice not in ("", "torch"):
        raise ValueError(f"HF_LOPT_KERNELS must be unset or 'torch', got {choice!r}")
    if choice == "torch" or not _import("hf_lopt._C", needed=True):
        return False
    _loaded.add("cpu")
    if torch.version.cuda and _import("hf_lopt._C_cuda", needed=torch.cuda.is_available()):
        _loaded.add("cuda")
    return True


def _import(name: str, needed: bool) -> bool:
    """Import an extension; without it note why, if it is needed."""
    try:
        importlib.import_module(name)
        return True
    except ModuleNotFoundError:
        why = f"hf_lopt was installed without its compiled kernels {name}"
    except ImportError as error:  # for example built for a newer torch
        why = f"the compiled kernels {name} do not load ({error})"
    if needed:
        _missing[name] = f"{why}. Install {_NEEDS[name]}, then: {remedy.command()}"
        notices.note(_SLOW[name], f"{_SLOW[name]}: {_missing[name]}. HF_LOPT_KERNELS=torch silences this.")
    return False


def missing() -> dict[str, str]:
    """For each extension that is wanted here and is not there, why, and the command that brings it."""
    return dict(_missing)


def loaded(device: str = "cpu") -> bool:
    """Whether there are compiled kernels for a type of device."""
    return device in _loaded


def enabled() -> bool:
    """Whether this thread uses compiled kernels: not within :func:`plain`."""
    return _choice.enabled


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """A context within which the operators run in plain PyTorch in this thread, for comparisons."""
    before, _choice.enabled = _choice.enabled, False
    try:
        yield
    finally:
        _choice.enabled = before


Kind = TypeVar("Kind", bound=Arguments)
Result = TypeVar("Result")


class Operator(Generic[Kind, Result]):
    """Calls one operator of the library with its arguments as an object.

    The call goes to the operator of PyTorch, except where compiled kernels are loaded: then what they do not support
    goes to the plain kernel, and what they change is told to autograd, which does not see it. Which arguments these
    are is read from the schema.
    """

    def __init__(self, arguments: type[Kind], reference: Callable[[Kind], Result]):
        self.name, self.arguments, self.reference = arguments.OPERATOR, arguments, reference
        self._overload = getattr(torch.ops.hf_lopt, self.name).default
        schema = self._overload._schema.arguments
        self._lists = [x.name for x in schema if str(x.type) == "List[Tensor]"]
        self._written = [x.name for x in schema if x.alias_info is not None and x.alias_info.is_write]
        self._written_lists = [name for name in self._written if name in self._lists]
        self._written_tensors = [name for name in self._written if name not in self._lists]
        self._results = arguments.RETURNS.count("Tensor[]") if arguments.HOLDS else 0
        self.__doc__ = reference.__doc__

    def __call__(self, arguments: Kind) -> Result:
        place = arguments.device
        device = place.type
        if not _loaded or (device != "cpu" and device not in _loaded):
            # No kernels at all, a device without kernels of its own, or a fake tensor.
            return self._call(arguments)
        if not (_choice.enabled and (device != "cuda" or cards.runs(place)) and supports(arguments, device)):
            return self.reference(arguments)
        if self._written:
            self.count_changes(arguments)
        return self._call_held(arguments, place)

    def count_changes(self, arguments: Kind) -> None:
        """Move the version counters of what a call changes; tensors of an inference mode have none."""
        values = vars(arguments)
        changed: list[Tensor] = [values[name] for name in self._written_tensors]
        for name in self._written_lists:
            changed += values[name]
        try:
            torch.autograd.graph.increment_version(changed)
        except RuntimeError:  # asking each of them would cost more than the call
            torch.autograd.graph.increment_version([x for x in changed if not x.is_inference()])

    def _call(self, arguments: Kind) -> Result:
        values = vars(arguments)  # in the order of the schema; names would take longer
        for name in self._lists:
            if type(values[name]) in _NO_LISTS:
                values = {**values, name: list(values[name])}
        result: Result = self._overload(*values.values())
        return result

    def _call_held(self, arguments: Kind, device: torch.device) -> Result:
        """A call of a compiled kernel, with the numbers of lists in place of those that the library holds; lists
        among its results stay there."""
        # Who looks at the calls on their way, as a mode does, sees them whole.
        if not self.arguments.HOLDS or device.type not in held.DEVICES or torch._C._len_torch_dispatch_stack():
            return self._call(arguments)
        first = getattr(arguments, self._lists[0])
        count = len(first)
        if count < held.FEW:
            return self._call(arguments)
        values, code = dict(vars(arguments)), []
        for name in self._lists:
            x = values[name]
            if type(x) is HeldList and x.number:
                code += 1, x.number
                values[name] = ()
                continue
            numbers = x.numbers if type(x) in HELD else []
            code += [len(numbers), *numbers]
            if numbers:
                values[name] = x.rest
        results = [HeldResults(device, count, spare) for spare in self._spare(first)]
        code += [number for x in results for number in x.numbers]
        found: Any = self._overload(*values.values(), any_on(device), code)
        whole: Any = (*results, *found[len(results) :]) if results else found
        result: Result = whole
        return result

    def _spare(self, first: Sequence[Tensor]) -> list[list[Any]]:
        """For each list among the results, numbers of those of earlier calls with the same first list."""
        return [first.spare[self.name, i] if type(first) is HeldList else [] for i in range(self._results)]


# ---- what the compiled kernels support ------------------------------------------------------------------------------


def supports(arguments: Arguments, device: str) -> bool:
    """Whether the compiled kernels of a type of device, "cpu" or "cuda", take a call."""
    kind = type(arguments)
    return kind not in (_ONLY_CPU if device == "cuda" else _ONLY_CUDA) and _SUPPORTS[kind](arguments, device)


_dtype = operator.attrgetter("dtype")


def _are(dtypes: frozenset[torch.dtype], *lists: Any) -> bool:
    """Whether all tensors have one of these types."""
    return all(dtypes.issuperset(x.dtypes if type(x) in WITH_DTYPES else map(_dtype, x)) for x in lists)


def _are_floating(*lists: Sequence[Tensor]) -> bool:
    return _are(_DTYPES, *lists)


def _supports_formats(x: Sums | FeatureSums | AdamStep | Descend, device: str) -> bool:
    """Accumulators that are not float32, and parameters that are rounded at random: of tensors that are cut along the
    first axis of their rows at most, on the CPU in slices of whole rows."""
    writes = isinstance(x, (ApplyNetwork, AdamStep, Descend))
    if not writes or x.step is None:
        # What is stored without random numbers is rounded to nearest, which the CUDA kernels do not.
        return device == "cpu" or not writes or isinstance(x, Descend) or _are(_FLOAT32, x.momenta, x.second_moments)
    slice_axes = [] if isinstance(x, AdamStep) else x.slice_axes
    for p, place in zip(x.params, read_places(x.places, x.params), strict=True):
        behind = range(place.row_axis + 1, p.dim())
        if any(place.starts[i] or place.sizes[i] != p.shape[i] for i in behind):
            return _tell_plain_formats(device)
        if device == "cpu" and slice_axes and p.dim() > 2 and place.row_axis < p.dim() - 2:
            return False
    return True


def _tell_plain_formats(device: str) -> bool:
    """False; warns once where that costs most."""
    if device != "cpu":
        _warn_of_plain_formats()
    return False


@functools.cache
def _warn_of_plain_formats() -> None:
    notices.warn(
        "state in fewer bits, and rounding at random, have no CUDA kernels for tensors that are sharded along an axis "
        "of a convolution's kernel: the step runs in plain PyTorch, several times slower. Shard along another axis."
    )


def _supports_sums(x: Sums, device: str) -> bool:
    # Also without moments: a resumed run takes them, and has to find the same sums over rows and columns.
    return _are_floating(x.params, x.grads) and _supports_formats(x, device)


def _supports_adam(x: AdamStep, device: str) -> bool:
    return _are_floating(x.params, x.grads) and _supports_formats(x, device)


def _supports_factored(x: UpdateFactored, device: str) -> bool:
    if device == "cuda" and len(x.decays) != 3:
        return False
    return bool(x.rows) and _are(_FLOAT32, x.rows, x.cols, x.row_sums, x.col_sums, x.row_means)


def _supports_features(x: FeatureSums, device: str) -> bool:
    decays = (len(x.momentum_decays), len(x.second_decays), len(x.factored_decays))
    return (
        _FEATURES.issuperset(x.features)
        and decays == _DECAYS
        and _are_floating(x.params, x.grads)
        and _supports_formats(x, device)
        and _supports_slices(x.params, x.row_axes, x.col_axes, x.slice_axes, device)
    )


def _supports_slices(
    params: Sequence[Tensor], row_axes: Sequence[int], col_axes: Sequence[int], slice_axes: Sequence[int], device: str
) -> bool:
    """Slices over the last axis of vectors; and of larger tensors over the last two axes, which have to be the
    factored ones, on a GPU over any two."""
    pairs = zip(slice_axes[::2], slice_axes[1::2], strict=True) if slice_axes else ()
    for p, a, b, pair in zip(params, row_axes, col_axes, pairs, strict=bool(slice_axes)):
        n = p.dim()
        if n == 2 and pair[0] == pair[1] and not (a < 0 and pair[0] == 1):
            return False
        last_two = set(pair) == {n - 2, n - 1} and (a < 0 or {a, b} == set(pair))
        if n > 2 and device != "cuda" and not last_two:
            return False
    return True


def _supports_network(x: ApplyNetwork, device: str) -> bool:
    if len(x.weights) != 3 or x.weights[0].shape[2] not in _UNITS:
        return False
    units = x.weights[0].shape[2]
    return (
        all(w.dtype == torch.float32 for w in x.weights)
        and x.weights[1].shape[1:] == (units, units)
        and x.weights[2].shape[1:] == (units, 2)
        and (units <= 8 or _NOT_WITH_32_UNITS.isdisjoint(x.features))
        and _supports_features(x, device)
    )


def _supports_descend(x: Descend, device: str) -> bool:
    none = [-1] * len(x.params)
    floating = _are_floating(x.params, x.steps) and _supports_formats(x, device)
    return floating and _supports_slices(x.params, none, none, x.slice_axes, device)


def _supports_matrices(x: Orthogonalize, device: str) -> bool:
    """Small ones, in a core's cache: for others a library takes all threads."""
    return x.x.dtype == x.dtype == torch.float32 and is_small(x.x.shape)


def _supports_advance(x: Advance, device: str) -> bool:
    # The kernel's arguments have room for eight of each, and it is written for VeLO's numbers of decays.
    short = max(len(x.stats), len(x.sums), len(x.correction_decays)) <= 8
    return short and (not x.tensor_inputs or x.tensor_inputs[0].shape[1] == 11)


def _supports_pool(x: Pool, device: str) -> bool:
    return x.mixed.dtype == torch.float32


def _supports_lstm(x: LstmStep, device: str) -> bool:
    return x.gates.dtype == torch.float32 and x.heads.shape[0] <= 2048 and x.heads.shape[1] <= 1024


def _supports_specialize(x: SpecializeNetworks, device: str) -> bool:
    return len(x.sizes) in (0, 4) and len(x.factors) <= 4


def _supports_assign(x: Assign, device: str) -> bool:
    return True


def _supports_zero_nan(x: ZeroNan, device: str) -> bool:
    return _are_floating(x.tensors)


_SUPPORTS: dict[type[Arguments], Callable[[Any, str], bool]] = {
    Sums: _supports_sums,
    UpdateFactored: _supports_factored,
    FeatureSums: _supports_features,
    ApplyNetwork: _supports_network,
    AdamStep: _supports_adam,
    Descend: _supports_descend,
    Orthogonalize: _supports_matrices,
    Advance: _supports_advance,
    Pool: _supports_pool,
    LstmStep: _supports_lstm,
    SpecializeNetworks: _supports_specialize,
    Assign: _supports_assign,
    ZeroNan: _supports_zero_nan,
}
# A call of PyTorch for each tensor on the CPU, but one launch on a GPU.
_ONLY_CUDA = frozenset((ZeroNan,))
# On a GPU these are matrix products of a library.
_ONLY_CPU = frozenset((Orthogonalize,))
