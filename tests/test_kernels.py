"""The compiled CPU kernels against the plain-PyTorch kernels of the same operators, and against float64.

Every comparison runs for each instruction set of this processor. The families are those of the rules: VeLO and Celo
(4 hidden units), small_fc (32), Celo2 (8, writes its step to ``out``).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_lopt import _load, _ops
from kernel_cases import DECAYS, FAMILIES, SHAPES, Case, case, instruction_set, instruction_sets, strided, threads


pytestmark = pytest.mark.skipif(not _load.loaded(), reason="the kernels are not compiled here")


@pytest.fixture(params=instruction_sets())
def kernels(request):
    with instruction_set(request.param):
        yield request.param


def close(got: Tensor, want: Tensor, relative: float, what: str, absolute: float = 1e-36) -> None:
    """Equal to within ``relative`` of the largest number of ``want``; what float32 cannot hold may be inf or NaN."""
    got, want = got.double(), want.double()
    finite = want.isfinite()
    assert torch.equal(finite.all(), got.isfinite().all()), f"{what}: only one of them is finite"
    if finite.all() and want.numel():
        error, bound = (got - want).abs().max(), relative * want.abs().max() + absolute
        assert error <= bound, f"{what}: {error:.3g} > {bound:.3g}"


def rounding(p: Tensor, bound: float) -> float:
    """A relative bound; wider for a few elements, where an accumulator may be a difference of larger numbers."""
    return bound if p.numel() > 64 else 100 * bound


def compare(x: Case) -> None:
    """All passes by the compiled kernels against the plain ones, with the same inputs."""
    got = x.first_pass(True)
    with _ops.plain():
        want = x.first_pass(True)
    for name, ours, plain in zip(("row sums", "column sums"), got[:2], want[:2], strict=True):
        for a, b in zip(ours, plain, strict=True):
            assert a.shape == b.shape and a.dtype == torch.float32
            close(a, b, 1e-5, name)
    assert torch.equal(got[2][:, 0], want[2][:, 0])
    for t in range(len(x.params)):
        close(got[2][t, 1:3], want[2][t, 1:3], 1e-6, "statistics")
        mean_square = want[2][t, 4::2] / max(x.params[t].numel(), 1)
        close(
            got[2][t, 3::2],
            want[2][t, 3::2],
            1e-6,
            "sums",
            float(1e-6 * want[2][t, 0] + 1e-36) + 1e-6 * float(mean_square.sqrt().max() * x.params[t].numel()),
        )
        close(got[2][t, 4::2], want[2][t, 4::2], 1e-6, "sums of squares")

    f = x.factors()
    sums = _ops.feature_sums(*x.common(f))
    with _ops.plain():
        plain_sums = _ops.feature_sums(*x.common(f))
    for t, p in enumerate(x.slices(x.params)):
        assert not plain_sums[t].isfinite().all() or sums[t].isfinite().all()
        # The sums matter as mean squares beside the normaliser's epsilon.
        size = plain_sums[t] + max(p.numel(), 1) * x.features.norm_eps
        both = sums[t].isfinite() & plain_sums[t].isfinite()
        error = ((sums[t] - plain_sums[t]) / size)[both].abs()
        assert error.numel() == 0 or error.max() < rounding(p, 1e-5), (p.shape, error)
    if not plain_sums.isfinite().all():
        return  # such a step is skipped

    weights, biases = x.network(plain_sums)
    count = len(x.slices(x.params))
    scale = torch.full((count,), 1e-3, device=x.device)
    arguments = (weights, biases, scale, scale * 0.1, 1e-3, torch.tensor(False, device=x.device))
    for into_out in (True, False):
        y = copy.deepcopy(x)
        results = []
        for z, context in ((x, contextlib.nullcontext()), (y, _ops.plain())):
            out = [torch.empty(p.shape, device=x.device) for p in z.params] if into_out else []
            before = [p.clone() for p in z.params]
            with context:
                results.append((*_ops.apply_network(*z.common(f), *arguments, out), out, before))
        (sums, stats, steps, before), (plain_sums, plain_stats, plain_steps, _) = results
        for t, p in enumerate(x.slices(x.params)):
            close(sums[t], plain_sums[t], rounding(p, 1e-4), "Σ step²")
            close(stats[t, :4], plain_stats[t, :4], 1e-5, "new statistics")
        for t in range(len(x.params)):
            for name in ("momenta", "second_moments", "diagonals"):
                close(getattr(x, name)[t], getattr(y, name)[t], 1e-6, name)
            if into_out:
                close(steps[t], plain_steps[t], rounding(x.params[t], 3e-5), f"step of {tuple(x.params[t].shape)}")
                assert torch.equal(x.params[t], before[t])
            else:
                unit = torch.finfo(x.params[t].dtype).eps
                largest = float((y.params[t].double() - before[t].double()).abs().max()) if before[t].numel() else 0.0
                close(x.params[t], y.params[t], unit, "parameters", rounding(y.params[t], 3e-5) * largest)
        x = y


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_follow_the_plain_ones(kernels, family):
    compare(case([*SHAPES, (130,), (33, 70), (70, 33), (2, 9000), (9000, 2), (4100,)], family))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["transposed", "every second", "channels last"])
def test_parameters_of_any_strides(kernels, family, layout):
    compare(case([*SHAPES, (40, 33)], family, layout=layout))


@pytest.mark.parametrize("p_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("g_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_in_any_mix(kernels, p_dtype, g_dtype):
    compare(case([(7,), (5, 9), (33, 70), (8, 4, 3, 3)], p_dtype=p_dtype, g_dtype=g_dtype))


@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-20, 1e-10, 0.05, 900.0, 1e4, 1e10, 1e20])
@pytest.mark.parametrize("family", FAMILIES)
def test_extreme_gradients(kernels, family, size):
    compare(case([(), (7,), (5, 9), (33, 70)], family, size=size))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_numbers_are_read_and_rounded_as_in_torch(kernels, dtype):
    """A network of zeros whose only output is its last bias: the step is the scale, whatever the inputs."""
    layers = [torch.zeros(1, *size) for size in ((30, 4), (4, 4), (4, 2), (4,), (4,), (2,))]
    layers[-1][0, 0] = 1.0

    def apply(x: Case, scale: Tensor) -> None:
        arguments = (layers[:3], layers[3:], scale, torch.zeros(len(scale)), 1e-3, torch.tensor(False), ())
        _ops.apply_network(*x.common(x.factors()), *arguments)

    # Every number, from memory and back.
    p = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    p = p[p.isfinite()]
    x = case([p.shape])
    x.params = [p.clone()]
    apply(x, torch.zeros(1))
    assert torch.equal(x.params[0], p)

    # Numbers in between, with those at the edges of the formats.
    values = torch.randn(200, generator=x.generator) * torch.logspace(-9, 4.9, 200)
    values = torch.cat([values, torch.tensor([65519.0, 65520.0, 2.0**-25, 3 * 2.0**-25, -(2.0**-24), 1e-30])])
    x = case([(1,)] * len(values), p_dtype=dtype)
    for p in x.params:
        p.zero_()
    apply(x, -values)
    assert torch.equal(torch.cat(x.params), values.to(dtype))


axis_sizes = st.sampled_from([1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 64, 100])


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    shapes=st.lists(
        st.one_of(
            st.just(()),
            st.tuples(st.integers(1, 2500)),
            st.tuples(axis_sizes, axis_sizes),
            st.tuples(axis_sizes, st.integers(1, 4), axis_sizes),
            st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4)),
        ),
        min_size=1,
        max_size=4,
    ),
    family=st.sampled_from(list(FAMILIES)),
    p_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    g_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    layout=st.sampled_from(["contiguous", "transposed", "every second", "channels last"]),
    size=st.sampled_from([0.0, 1e-20, 1e-4, 0.1, 1.0, 300.0, 5e3]),
    order=st.sampled_from(["torch", "jax"]),
    name=st.sampled_from(instruction_sets() or ["none"]),
    seed=st.integers(0, 5),
)
def test_kernels_follow_the_plain_ones_anywhere(shapes, family, p_dtype, g_dtype, layout, size, order, name, seed):
    with instruction_set(name):
        compare(case(shapes, family, p_dtype, g_dtype, layout, size, seed, order))


# ---- against float64 --------------------


def reference_step(x: Case, f, weights, biases, scale: float) -> list[Tensor]:
    """The network's step in float64, written from the formulas, for tensors of rank 2."""
    steps, names = [], x.features.names
    for t, (a, b) in enumerate(x.axes):
        g = x.grads[t].double().clamp(-x.features.clip, x.features.clip)
        m = torch.stack([d * m + (1 - d) * g for d, m in zip(DECAYS.momentum, x.momenta[t].double(), strict=True)])
        (c,) = DECAYS.second_moment
        v = c * x.second_moments[t].double() + (1 - c) * g * g
        q = (v + x.features.second_eps).rsqrt()
        row, row_factor = (y[t].double().unsqueeze(a + 1) for y in (f.rows, f.row_factors))
        col, col_factor = (y[t].double().unsqueeze(b + 1) for y in (f.cols, f.col_factors))
        whole = torch.ones_like(m)
        columns = {
            "g": g[None],
            "clip_g": g[None].clamp(-0.1, 0.1),
            "p": x.params[t].double()[None],
            "m": m,
            "v": v,
            "m_rsqrt_v": m * q,
            "rsqrt_v": q,
            "fac_g": g * row_factor * col_factor,
            "g_rsqrt_v": g * q,
            "row": row * whole,
            "col": col * whole,
            "rsqrt_row": (row + 1e-8).rsqrt() * whole,
            "rsqrt_col": (col + 1e-8).rsqrt() * whole,
            "fac_m": m * row_factor * col_factor,
        }
        z = torch.cat([columns[name] for name in names]).movedim(0, -1)
        for i, (w, bias) in enumerate(zip(weights, biases, strict=True)):
            z = (z.relu() if i else z) @ w[t].double() + bias[t].double()
        steps.append(scale * z[..., 0] * torch.exp(1e-3 * z[..., 1]))
    return steps


@pytest.mark.parametrize("family", FAMILIES)
def test_as_close_to_float64_as_the_plain_kernel(kernels, family):
    x = case([(300, 200), (200, 300)], family, size=0.3)
    f = x.factors()
    with _ops.plain():
        weights, biases = x.network(_ops.feature_sums(*x.common(f)))
    want = reference_step(x, f, weights, biases, 1e-3)
    errors = []
    for context in (contextlib.nullcontext(), _ops.plain()):
        y = copy.deepcopy(x)
        out = [torch.empty(p.shape) for p in y.params]
        arguments = (weights, biases, torch.full((2,), 1e-3), torch.zeros(2), 1e-3, torch.tensor(False))
        with context:
            _ops.apply_network(*y.common(f), *arguments, out)
        error = torch.cat([(a - b).flatten() for a, b in zip(out, want, strict=True)])
        errors.append((float(error.square().mean().sqrt()), float(error.abs().max())))
    (rms, worst), (plain_rms, plain_worst) = errors
    assert rms <= 1.1 * plain_rms and worst <= 1.5 * plain_worst
    assert worst <= 1e-5 * max(float(s.abs().max()) for s in want)


# ---- what must be the same, bit by bit --------------------


def everything(x: Case) -> list[Tensor]:
    """All results of a step and the next step's first pass."""
    x = copy.deepcopy(x)
    out = [*x.first_pass(False)[0], *x.first_pass(False)[1], x.first_pass(True)[2]]
    f = x.factors()
    sums = _ops.feature_sums(*x.common(f))
    x.generator.manual_seed(1)
    weights, biases = x.network(sums)
    one, no = torch.ones(len(x.params), device=x.device), torch.tensor(False, device=x.device)
    out += [
        sums,
        *_ops.apply_network(*x.common(f), weights, biases, one * 1e-3, one * 0, 1e-3, no, ()),
    ]
    return [*out, *x.params, *x.momenta, *x.second_moments, *x.diagonals]


@pytest.mark.parametrize("family", FAMILIES)
def test_bits_do_not_depend_on_the_number_of_threads(kernels, family):
    shapes = [(), (7,), (9000,), (33, 70), (500, 130), (130, 500), (4, 20000), (8, 4, 3, 3)] + [(3, 2)] * 100
    x = case(shapes, family, size=0.5)
    results = []
    for count in (1, 2, 3, 2):
        with threads(count):
            results.append(everything(x))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_of_an_update_are_those_of_the_next_first_pass(kernels, dtype):
    """So a run that resumes from a checkpoint goes on bit by bit like one that was not interrupted."""
    x = case([(), (7,), (9000,), (33, 70), (500, 130), (8, 4, 3, 3)], p_dtype=dtype, g_dtype=dtype)
    f = x.factors()
    weights, biases = x.network(_ops.feature_sums(*x.common(f)))
    one = torch.ones(len(x.params))
    _, stats = _ops.apply_network(*x.common(f), weights, biases, one * 1e-3, one * 0, 1e-3, torch.tensor(False), ())
    again = x.first_pass(True)[2]
    assert torch.equal(stats[:, 2:], again[:, 2:])


def test_skip_changes_nothing(kernels):
    x = case(SHAPES)
    f = x.factors()
    weights, biases = x.network(_ops.feature_sums(*x.common(f)))
    before = copy.deepcopy((x.params, x.momenta, x.second_moments, x.diagonals))
    one = torch.ones(len(x.params))
    _ops.apply_network(*x.common(f), weights, biases, one, one, 1e-3, torch.tensor(True), ())
    for old, new in zip(before, (x.params, x.momenta, x.second_moments, x.diagonals), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))


def test_non_finite_gradients_are_counted(kernels):
    x = case([(33, 70), (5,), ()])
    x.grads[0][3, 4], x.grads[0][30, 69], x.grads[1][2] = math.nan, math.inf, -math.inf
    assert x.first_pass(False)[2][:, 0].tolist() == [2, 1, 0]


# ---- Adam --------------------


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "every second"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adam_follows_the_plain_one(kernels, dtype, layout):
    x = case([*SHAPES, (70, 333)], p_dtype=dtype, g_dtype=dtype, layout=layout, size=700.0)
    x.momenta = [m[:1].clone() for m in x.momenta]
    count, results = len(x.params), []
    for context in (contextlib.nullcontext(), _ops.plain()):
        y = copy.deepcopy(x)
        with context:
            sums = _ops.adam_step(
                *(y.params, y.grads, y.momenta, y.second_moments, 0.9, 0.95, 1000.0),
                *(torch.linspace(1e-3, 2e-3, count), torch.full((count,), 0.01)),
                *(torch.tensor(1.5), torch.tensor(2.5), 1e-10, 1e-8, torch.tensor(False)),
            )
        results.append((y, sums))
    (got, sums), (want, plain_sums) = results
    close(sums, plain_sums, 1e-5, "Σ step²")
    for t in range(count):
        close(got.params[t], want.params[t], torch.finfo(dtype).eps, "parameters")
        close(got.momenta[t], want.momenta[t], 1e-6, "momentum")
        close(got.second_moments[t], want.second_moments[t], 1e-6, "second moment")


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "every second"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_descend_follows_the_plain_one(kernels, dtype, layout):
    x = case([*SHAPES, (70, 333), (0, 3)], p_dtype=dtype, layout=layout)
    steps = [strided(torch.randn(p.shape, generator=x.generator), layout) for p in x.params]
    count = len(steps)
    lr, decay = torch.linspace(0.1, 0.2, count), torch.linspace(3.0, 0.1, count)
    want = [
        p.double() * (1 - lr[t].double() * decay[t].double()) - steps[t].double() * lr[t]
        for t, p in enumerate(x.params)
    ]
    before = [p.clone() for p in x.params]
    _ops.descend(x.params, steps, lr, decay, None, None, 0.0, (), torch.tensor(True))
    assert all(torch.equal(p, q) for p, q in zip(x.params, before, strict=True))
    _ops.descend(x.params, steps, lr, decay, None, None, 0.0, (), torch.tensor(False))
    for p, w in zip(x.params, want, strict=True):
        torch.testing.assert_close(p.double(), w, rtol=torch.finfo(dtype).eps, atol=1e-6)


# ---- factored accumulators --------------------


@pytest.mark.parametrize("order", ["torch", "jax"])
@pytest.mark.parametrize("numbers", ["tensor", "slice"])
def test_descend_brings_slices_to_a_mean_square_of_one(kernels, order, numbers):
    descend_by_slices(order, numbers)


def descend_by_slices(order: str, numbers: str) -> None:
    """Against float64; for several implementations."""
    x = case([*SHAPES, (70, 33), (2, 3, 20, 9)], order=order, sliced=True)
    steps = [torch.randn(p.shape, generator=x.generator) for p in x.params]
    parts = x.slices(steps)
    squares = torch.stack([p.double().square().sum() for p in parts])
    numel = torch.tensor([p.numel() for p in parts], dtype=torch.float64)
    count = len(parts) if numbers == "slice" else len(steps)
    lr, decay = torch.linspace(0.1, 0.2, count), torch.linspace(3.0, 0.1, count)
    tensor_of = [t for t, p in enumerate(x.params) for _ in range(len(Case.slices(only(x, t), [p])))]
    want = []
    for i, (p, step) in enumerate(zip(x.slices(x.params), parts, strict=True)):
        place = i if numbers == "slice" else tensor_of[i]
        unit = step.double() / (squares[i] / numel[i] + 1e-3).sqrt()
        want.append(p.double() - lr[place].double() * (unit + decay[place].double() * p.double()))
    _ops.descend(x.params, steps, lr, decay, squares, numel, 1e-3, x.slice_axes, torch.tensor(False))
    for p, w in zip(x.slices(x.params), want, strict=True):
        torch.testing.assert_close(p.double(), w, rtol=1e-6, atol=1e-6)


def only(x: Case, t: int) -> Case:
    return dataclasses.replace(x, slice_axes=x.slice_axes[2 * t : 2 * t + 2])


@pytest.mark.parametrize("order", ["torch", "jax"])
def test_factored_accumulators_follow_float64(kernels, order):
    x = case([*SHAPES, (70, 333), (700, 3, 3)], order=order)
    a, b = (list(axes) for axes in zip(*x.axes, strict=True))
    row_sums, col_sums, _ = x.first_pass(False)
    sizes = [[p.shape[k] if k >= 0 else 1 for p, k in zip(x.params, axes, strict=True)] for axes in (a, b)]
    nothing = [torch.empty(0)] * len(x.params)
    x.rows = [strided(r, "transposed") for r in x.rows]
    got = _ops.update_factored(x.rows, x.cols, row_sums, col_sums, nothing, *sizes, a, b, DECAYS.factored)
    keep = torch.tensor(DECAYS.factored, dtype=torch.float32)
    add = (1 - keep).double()
    for t, g in enumerate(x.grads):
        if a[t] < 0:
            assert all(part[t].numel() == 0 for part in got)
            continue
        k, square = keep.double().view(3, *[1] * (g.dim() - 1)), g.double().square()
        row = k * x.rows[t].double() + add.view_as(k) * (square.mean(a[t]) + 1e-30)
        col = k * x.cols[t].double() + add.view_as(k) * (square.mean(b[t]) + 1e-30)
        mean = row.mean(b[t] + 1 if b[t] < a[t] else b[t], keepdim=True)
        factors = ((row / (mean + 1e-9)).clamp_min(1e-9).rsqrt(), col.clamp_min(1e-9).rsqrt())
        for part, want in zip(got, (row, col, *factors), strict=True):
            torch.testing.assert_close(part[t].double(), want, rtol=2e-6, atol=1e-30)
    # Half of the axis B, whose mean then comes from outside.
    i = SHAPES.index((5, 9)) if order == "torch" else SHAPES.index((9, 5))
    mean = got[0][i].mean(1, keepdim=True)
    rows, sums = x.rows[i][:, :2], row_sums[i][:2]
    part = _ops.update_factored(
        [rows], [x.cols[i]], [sums], [col_sums[i]], [mean], [9], [5], [a[i]], [b[i]], keep.tolist()
    )
    torch.testing.assert_close(part[2][0], got[2][i][:, :2])
