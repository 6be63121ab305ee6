"""Compiled kernels over accumulators in fewer bits, and parameters rounded at random, beside the plain kernels.

The random numbers are the same to the bit. The accumulators before they are rounded differ in their last bits, so that
a number next to the boundary may be rounded the other way: a few in a million.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hf_lopt.kernels import dispatch
from hf_lopt.kernels.arguments import AdamStep
from hf_lopt.kernels.reference import formats
from hf_lopt.step.accumulators import row_axis
from kernel_backends import CPU_BACKENDS
from kernel_cases import Case, case
from kernel_comparisons import close, outcome, plain_outcome


pytestmark = pytest.mark.skipif(not dispatch.loaded(), reason="the kernels are not compiled here")
# Rows of several blocks and of a part of one, rows that are cut into tiles, stacks; the last is no matrix.
SHAPES = ((5, 600), (70, 33), (2, 4500), (3, 7, 260), (40,))
STEP = 7


def stored(xs: list[Tensor], params: list[Tensor], kind: str, signed: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Accumulators in a format, where a parameter has rows, and their scales."""
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.int8 if signed else torch.uint8
    pairs = [
        formats.convert(x, None, dtype, row_axis(p.shape, "torch")) if p.dim() > 1 else (x, None)
        for x, p in zip(xs, params, strict=True)
    ]
    return [x for x, _ in pairs], [torch.empty(0) if s is None else s for _, s in pairs] if kind == "int8" else []


def in_format(x: Case, kind: str, round_params: bool = False) -> Case:
    momenta, momentum_scales = stored(x.momenta, x.params, kind, signed=True)
    second, second_scales = stored(x.second_moments, x.params, kind, signed=False)
    places = []
    for t, p in enumerate(x.params):
        places += [formats.tensor_key(t), row_axis(p.shape, "torch"), *[0] * p.dim(), *p.shape]
    rounding = {"step": torch.tensor(STEP), "places": places, "round_params": round_params}
    scales = {"momentum_scales": momentum_scales, "second_scales": second_scales}
    return replace(x, momenta=momenta, second_moments=second, scales=scales, rounding=rounding, compared={})


def decoded(values: list[Tensor], scales: list[Tensor]) -> list[Tensor]:
    return [x.load() for x in formats.accumulators(values, scales)]


def almost_equal(got: list[Tensor], want: list[Tensor]) -> None:
    """But for the last bits, and one number in ten thousand that was rounded the other way."""
    for x, y in zip(got, want, strict=True):
        differ = (x - y).abs() > 2e-5 * y.abs() + 1e-30
        assert differ.sum() <= max(1, 1e-4 * x.numel()), (differ.sum(), x.shape)
        assert (x - y).abs().max() <= 0.05 * y.abs().max()


@pytest.fixture(params=CPU_BACKENDS)
def backend(request):
    with request.param.active():
        yield request.param


@pytest.mark.parametrize("family", ["velo", "small_fc", "celo2"])
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_passes(backend, family, kind):
    x = in_format(case(SHAPES, family, size=0.1, order="torch_stacked", sliced=family == "celo2"), kind)
    for arguments in (x.sums(), x.feature_sums(), x.apply_network(), x.apply_network(into_out=True)):
        assert backend.supports(arguments)
        got, want = outcome(arguments), plain_outcome(arguments)
        for a, b in zip(got.results, want.results, strict=True):
            for y, z in zip(*([a], [b]) if isinstance(a, Tensor) else (a, b), strict=True):
                close(y, z, 1e-4, arguments.OPERATOR)
        ours, theirs = got.arguments, want.arguments
        almost_equal(decoded(ours.momenta, ours.momentum_scales), decoded(theirs.momenta, theirs.momentum_scales))
        almost_equal(
            decoded(ours.second_moments, ours.second_scales), decoded(theirs.second_moments, theirs.second_scales)
        )
        if arguments.OPERATOR == "apply_network":
            assert not torch.equal(ours.momenta[0], x.momenta[0])
            for p, q in zip(ours.params, theirs.params, strict=True):
                close(p, q, 1e-6, "parameters")


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_adam_and_rounded_parameters(backend, kind):
    x = in_format(case(SHAPES, "velo", torch.bfloat16, size=0.1), kind, round_params=True)
    adam = x.adam_step()
    one = {name: [y[:1].clone() for y in values] for name, values in x.scales.items()}
    adam = replace(adam, second_moments=[v.clone() for v in adam.second_moments], **one)
    assert isinstance(adam, AdamStep)
    for arguments in (adam, x.descend(), x.apply_network()):
        assert backend.supports(arguments)
        got, want = outcome(arguments).arguments, plain_outcome(arguments).arguments
        for p, q in zip(got.params, want.params, strict=True):
            units = (p.float() - q.float()).abs() / q.float().abs().clamp_min(1e-30)
            assert (units > 0).sum() <= max(1, 2e-3 * p.numel()) and units.max() <= 2.0**-6
        if arguments is adam:
            almost_equal(decoded(got.momenta, got.momentum_scales), decoded(want.momenta, want.momentum_scales))


def test_statistics_are_of_what_is_stored(backend):
    """What pass 2 leaves is, bit by bit, what pass 0 finds: a resumed run goes on like one that was not."""
    for kind in ("bfloat16", "int8"):
        x = in_format(case(SHAPES[:4], "velo", size=0.1), kind)
        after = outcome(x.apply_network())
        again = replace(
            x.sums(), **{k: getattr(after.arguments, k) for k in ("params", "momenta", "second_moments", *x.scales)}
        )
        assert torch.equal(outcome(again).results[2][:, 2:], after.results[1][:, 2:])


@pytest.mark.parametrize("fault", ["codes", "scales", "places", "step"])
def test_what_does_not_fit_is_refused(backend, fault):
    x = in_format(case(SHAPES[:2], "velo"), "int8")
    arguments = x.apply_network()
    change = {
        "codes": {"momenta": [arguments.momenta[0][:, :4], arguments.momenta[1]]},
        "scales": {"second_scales": [arguments.second_scales[0][..., :1], arguments.second_scales[1]]},
        "places": {"places": arguments.places[:-1]},
        "step": {"step": torch.tensor(7.0)},
    }[fault]
    with pytest.raises(RuntimeError):
        backend.overload("apply_network")(**vars(replace(arguments, **change)))


def test_kernels_for_cuda_leave_other_formats_to_pytorch():
    x = in_format(case(SHAPES, "velo"), "int8")
    dispatch._tell_plain_formats.cache_clear()
    with pytest.warns(UserWarning, match="no CUDA kernels yet") as told:
        for arguments in (x.sums(), x.feature_sums(), x.apply_network(), x.adam_step(), x.descend()):
            assert not dispatch.supports(arguments, "cuda")
    assert len(told) == 1
