"""Compiled kernels over accumulators in fewer bits, and parameters rounded at random, beside the plain kernels.

The random numbers are the same to the bit. The accumulators before they are rounded differ in their last bits, so that
a number next to the boundary may be rounded the other way: a few in a million.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from emulated import emulator
from hf_lopt.kernels import dispatch
from hf_lopt.kernels.arguments import AdamStep, Arguments
from hf_lopt.kernels.reference import formats
from hf_lopt.step.accumulators import row_axis
from kernel_backends import BACKENDS, CUDA_BACKENDS
from kernel_cases import Case, case, strided
from kernel_comparisons import close, equal, outcome, plain_outcome


pytestmark = pytest.mark.skipif(not dispatch.loaded(), reason="the kernels are not compiled here")
# Rows of several blocks and of a part of one, rows that are cut into tiles, stacks; the last is no matrix.
SHAPES = ((5, 600), (70, 33), (2, 4500), (3, 7, 260), (40,), (9, 384))
STEP = 7


def stored(x: Tensor, kind: str, signed: bool, axis: int) -> tuple[Tensor, Tensor]:
    """An accumulator in a format, and its scales, none for other formats than codes."""
    if x.dim() < 3:  # of a vector
        return x, torch.empty(0)
    values, scale = formats.convert(x, None, getattr(torch, kind if kind != "int8" or signed else "uint8"), axis)
    return values, torch.empty(0) if scale is None else scale


def cuts_rows(x: Case, t: int, axis: int) -> bool:
    """Whether slices of a tensor have parts of rows, which no one keeps as codes."""
    shape, axes = x.params[t].shape, x.slice_axes[2 * t : 2 * t + 2]
    return len(shape) > 2 and any(n > 1 and i >= axis and i not in axes for i, n in enumerate(shape) if axes)


def in_format(x: Case, kind: str, round_params: bool = False, sharded: bool = False, order: str = "torch") -> Case:
    """``sharded``: tensors are parts of larger ones, cut along the axes before their rows and the first of these."""
    pairs, places = [], []
    for t, p in enumerate(x.params):
        axis, starts, whole = row_axis(p.shape, order), [0] * p.dim(), list(p.shape)
        own = "bfloat16" if kind == "int8" and cuts_rows(x, t, axis) else kind
        pairs.append((stored(x.momenta[t], own, True, axis), stored(x.second_moments[t], own, False, axis)))
        for i in range(axis + 1 if sharded and p.dim() else 0):
            starts[i] = 256 if i == axis else 3 + i
            whole[i] += starts[i] + 2
        places += [formats.tensor_key(t), axis, *starts, *whole]
    (momenta, momentum_scales), (second, second_scales) = (zip(*x, strict=True) for x in zip(*pairs, strict=True))
    rounding = {"step": torch.tensor(STEP), "places": places, "round_params": round_params}
    scales = {"momentum_scales": list(momentum_scales), "second_scales": list(second_scales)}
    scales = scales if kind == "int8" else {name: [] for name in scales}
    return replace(
        x, momenta=list(momenta), second_moments=list(second), scales=scales, rounding=rounding, compared={}
    )


def decoded(values: list[Tensor], scales: list[Tensor]) -> list[Tensor]:
    return [x.load() for x in formats.accumulators(values, scales)]


def almost_equal(got: list[Tensor], want: list[Tensor]) -> None:
    """But for the last bits, and one number in ten thousand that was rounded the other way."""
    for x, y in zip(got, want, strict=True):
        differ = (x - y).abs() > 2e-5 * y.abs() + 1e-30
        assert differ.sum() <= max(1, 1e-4 * x.numel()), (differ.sum(), x.shape)
        assert (x - y).abs().max() <= 0.05 * y.abs().max()


@pytest.fixture(params=BACKENDS)
def backend(request):
    with request.param.active():
        yield request.param


@pytest.mark.parametrize("family", ["velo", "small_fc", "celo2"])
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_passes(backend, family, kind):
    x = case(SHAPES, family, size=0.1, order="torch_stacked", sliced=family == "celo2")
    x = in_format(x, kind, order="torch_stacked").to(backend.device)
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
    x = in_format(case(SHAPES, "velo", torch.bfloat16, size=0.1), kind, round_params=True).to(backend.device)
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
        x = in_format(case(SHAPES[:4], "velo", size=0.1), kind).to(backend.device)
        after = outcome(x.apply_network())
        again = replace(
            x.sums(), **{k: getattr(after.arguments, k) for k in ("params", "momenta", "second_moments", *x.scales)}
        )
        assert torch.equal(outcome(again).results[2][:, 2:], after.results[1][:, 2:])


@pytest.mark.parametrize("fault", ["codes", "scales", "places", "step"])
def test_what_does_not_fit_is_refused(backend, fault):
    x = in_format(case(SHAPES[:2], "velo"), "int8").to(backend.device)
    arguments = x.apply_network()
    change = {
        "codes": {"momenta": [arguments.momenta[0][:, :4], arguments.momenta[1]]},
        "scales": {"second_scales": [arguments.second_scales[0][..., :1], arguments.second_scales[1]]},
        "places": {"places": arguments.places[:-1]},
        "step": {"step": torch.tensor(7.0)},
    }[fault]
    with pytest.raises(RuntimeError):
        backend.overload("apply_network")(**vars(replace(arguments, **change)))


# ---- bits, on CUDA --------------------

# Rows with full tiles and without, of several blocks, of less than one, and that no thread begins at; one row alone;
# groups of lines; slices of which neighbours are far apart; a vector.
LAYOUTS = ((12, 640), (9, 300), (1, 700), (70, 33), (3, 7, 260), (20, 3, 40), (9, 20, 3, 3), (6, 64, 1, 1), (40,))


def exact(x: Case) -> list[Arguments]:
    """Calls whose new accumulators and parameters are rounded once before they are stored, whatever an implementation
    multiplies and adds together: products with a half are exact, and steps of size 0."""
    still = replace(x, scale=0.0, decay=0.25)
    halves = {"momentum_decays": (0.5, 0.5, 0.5), "second_decays": (0.5,)}
    numbers = {"scale": x.numbers(0.0), "decay": x.numbers(0.25)}
    adam = replace(x.adam_step(), momentum_decay=0.5, second_decay=0.5, **numbers)
    descend = replace(x.descend(), lr=x.numbers(1.0), weight_decay=x.numbers(0.25))
    return [*(replace(still.apply_network(into_out=y), **halves) for y in (False, True)), adam, descend]


STORED = ("params", "momenta", "second_moments", "momentum_scales", "second_scales")


def stored_tensors(arguments: Arguments) -> dict[str, Tensor]:
    return {f"{name}[{t}]": x for name in STORED for t, x in enumerate(getattr(arguments, name, []))}


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(
    "family, dtype, order",
    [
        ("velo", torch.float32, "torch"),
        ("velo", torch.bfloat16, "jax"),
        ("small_fc", torch.bfloat16, "torch"),
        ("celo2", torch.bfloat16, "torch"),
    ],
)
@pytest.mark.parametrize("backend", CUDA_BACKENDS[:1], indirect=True)
def test_bits_are_those_of_plain_pytorch(backend, kind, family, dtype, order):
    """Codes, scales and random roundings in every layout, of shards, and in any order of blocks and threads."""
    x = case(LAYOUTS, family, dtype, dtype, size=0.1, order=order, sliced=family == "celo2")
    x = in_format(x, kind, round_params=True, sharded=True, order=order)
    for i, arguments in enumerate(exact(x)):
        assert backend.supports(arguments)
        emulator().shuffle(i)
        try:
            got, want = outcome(arguments).arguments, plain_outcome(arguments).arguments
        finally:
            emulator().shuffle(0)
        expected = stored_tensors(want)
        for name, a in stored_tensors(got).items():
            # PyTorch's root on the CPU is not always the nearest number.
            bound = 2.5e-7 if name.startswith("second_scales") else 0.0
            torch.testing.assert_close(a, expected[name], rtol=bound, atol=0.0, msg=f"{arguments.OPERATOR} {name}")


@pytest.mark.parametrize("backend", CUDA_BACKENDS[:1], indirect=True)
def test_strides_of_codes_do_not_matter(backend):
    x = in_format(case(LAYOUTS[:3], size=0.1), "int8")
    arguments = x.apply_network()

    def apart(xs: list[Tensor]) -> list[Tensor]:
        return [strided(y, "transposed") for y in xs]

    other = replace(arguments, **{name: apart(getattr(arguments, name)) for name in STORED})
    assert not other.momenta[0].is_contiguous()
    got, want = (stored_tensors(outcome(y).arguments) for y in (other, arguments))
    assert equal(list(got.values()), list(want.values()))


def test_what_cuda_kernels_leave_to_pytorch():
    x = in_format(case(SHAPES, "velo"), "int8", sharded=True)
    calls = (x.sums(), x.feature_sums(), x.apply_network(), x.adam_step(), x.descend())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(dispatch.supports(arguments, "cuda") for arguments in calls)
        # Without random numbers there is rounding to nearest, which the kernels have not.
        assert not dispatch.supports(replace(x.apply_network(), step=None, places=[]), "cuda")
    x = in_format(case([(64, 8, 4, 3)]), "bfloat16")
    x.rounding["places"][-2] = 8  # half of the kernel's first axis
    dispatch._warn_of_plain_formats.cache_clear()
    with pytest.warns(UserWarning, match="sharded along an axis of a convolution's kernel") as told:
        for arguments in (x.apply_network(), x.adam_step()):
            assert not dispatch.supports(arguments, "cuda") and not dispatch.supports(arguments, "cpu")
    assert len(told) == 1
