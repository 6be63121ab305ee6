"""Arguments of a wrong size or type: every operator refuses them before it reads or writes through a pointer.

The compiled operators are called without the choice that precedes them, which would send some of the calls to the
plain kernels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from hf_lopt.kernels import dispatch
from hf_lopt.kernels.arguments import Arguments
from kernel_backends import CPU_BACKENDS, CUDA_BACKENDS
from kernel_comparisons import OPERATORS
from kernel_samples import arguments_on, samples


# What is not wrong: lists that may be of any length, and tensors that may be of any size.
VALID = {
    ("advance", "stats", "fewer"),
    ("advance", "stats", "smaller"),
    ("advance", "sums", "fewer"),
    ("advance", "sums", "smaller"),
    ("lstm_step", "bank", "smaller"),  # networks of another size
    ("orthogonalize", "x", "smaller"),
    ("specialize_networks", "factors", "fewer"),
    ("zero_nan", "tensors", "fewer"),
    ("zero_nan", "tensors", "smaller"),
}
OTHER_TYPE = {torch.float32: torch.float64, torch.float64: torch.float32, torch.int64: torch.int32}

pytestmark = pytest.mark.skipif(not dispatch.loaded(), reason="the kernels are not compiled here")
SAMPLES = samples()
# All instruction sets of a CPU have the same checks.
BACKENDS = [*CPU_BACKENDS[:1], *CUDA_BACKENDS]


def pointers(arguments: Arguments) -> list[str]:
    """The names of the arguments that are tensors or lists of them."""
    hints = get_type_hints(type(arguments), include_extras=True)
    return [name for name in vars(arguments) if get_args(hints[name])[1].name.startswith("Tensor")]


def smaller(x: Tensor) -> Tensor:
    """Without the last place along the last axis that is longer than one."""
    axis = max((i for i, n in enumerate(x.shape) if n > 1), default=None)
    return x.new_empty(0) if axis is None else x.narrow(axis, 0, x.shape[axis] - 1).contiguous()


def of_another_type(x: Tensor) -> Tensor:
    return x.to(OTHER_TYPE.get(x.dtype, torch.float32))


def wrong(value: Tensor | list[Tensor], fault: str) -> Tensor | list[Tensor]:
    """The value of an argument with a fault in one of its tensors, the first that has elements."""
    if fault == "fewer":
        return value[:-1]
    change = smaller if fault == "smaller" else of_another_type
    if isinstance(value, Tensor):
        return change(value)
    place = next(i for i, x in enumerate(value) if x.numel() > 1)
    return [change(x) if i == place else x for i, x in enumerate(value)]


def has_numbers(value: Tensor | list[Tensor] | None) -> bool:
    """Whether there is a tensor that could be wrong."""
    tensors = [value] if isinstance(value, Tensor) else value or []
    return any(x.numel() > 0 for x in tensors)


FAULTS = [
    (name, field, fault)
    for name, arguments in SAMPLES.items()
    for field in pointers(arguments)
    if has_numbers(getattr(arguments, field))
    for fault in ("smaller", "type", "fewer")
    if (fault != "fewer" or not isinstance(getattr(arguments, field), Tensor)) and (name, field, fault) not in VALID
]
# Other arguments that do not fit.
MISFITS = [
    ("sums", {"row_axes": [-1, 2, 2]}),
    ("sums", {"col_axes": [-1, 0]}),
    ("update_factored", {"row_sizes": [1, 9]}),
    ("update_factored", {"col_axes": [-1, 5, 1]}),
    ("feature_sums", {"features": ("g", "log_abs_p")}),
    ("feature_sums", {"momentum_decays": (0.9, 0.99)}),
    ("feature_sums", {"factored_decays": (0.9,)}),
    ("feature_sums", {"slice_axes": [0, 1]}),
    ("apply_network", {"second_decays": (0.9, 0.99)}),
    ("apply_network", {"features": ("g", "p")}),
    ("adam_step", {"scale": torch.ones(4)}),
    ("descend", {"slice_axes": [0, 1]}),
    ("orthogonalize", {"x": torch.ones(7)}),
    ("orthogonalize", {"coefficients": (1.0,)}),
    ("orthogonalize", {"dtype": torch.bfloat16}),
    ("specialize_networks", {"networks": SAMPLES["specialize_networks"].networks[:2]}),
    ("specialize_networks", {"sizes": (41, 8, 3)}),
]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def refused(backend, arguments: Arguments) -> None:
    arguments = arguments_on(arguments, backend.device)
    with pytest.raises(RuntimeError):
        backend.overload(arguments.OPERATOR)(**vars(arguments))


@pytest.mark.parametrize("name", OPERATORS)
def test_the_samples_are_valid(backend, name):
    arguments = arguments_on(SAMPLES[name], backend.device)
    if backend.supports(arguments):
        backend.overload(name)(**vars(arguments))


@pytest.mark.parametrize("name, field, fault", FAULTS)
def test_wrong_tensors_are_refused(backend, name, field, fault):
    if not backend.supports(SAMPLES[name]):
        pytest.skip("no kernel of this backend")
    refused(backend, replace(SAMPLES[name], **{field: wrong(getattr(SAMPLES[name], field), fault)}))


@pytest.mark.parametrize("name, fields", MISFITS)
def test_what_does_not_fit_is_refused(backend, name, fields):
    if not backend.supports(SAMPLES[name]):
        pytest.skip("no kernel of this backend")
    refused(backend, replace(SAMPLES[name], **fields))
