"""The operators on small arrays: Newton-Schulz on batches of matrices, the decision about a step, the scheduler, the
networks of a step, and what is stored.

Compared with the plain kernels and with float64 on every backend that has a kernel for them.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from hf_lopt.kernels import dispatch, ops
from hf_lopt.kernels.arguments import Assign, Orthogonalize, SpecializeNetworks, ZeroNan
from hf_lopt.kernels.reference import newton_schulz
from kernel_backends import BACKENDS, CPU_BACKENDS, CUDA_BACKENDS, Backend, threads
from kernel_cases import strided
from kernel_comparisons import equal, outcome, plain_outcome
from kernel_samples import COEFFICIENTS, advance, arguments_on, lstm, specialize


pytestmark = pytest.mark.skipif(not dispatch.loaded(), reason="the kernels are not compiled here")


def active(request):
    with request.param.active():
        yield request.param


cpu = pytest.fixture(params=CPU_BACKENDS)(active)
cuda = pytest.fixture(params=CUDA_BACKENDS)(active)
backend = pytest.fixture(params=BACKENDS)(active)


def on(backend: Backend, arguments):
    """The arguments with their tensors on the backend's device."""
    return arguments_on(arguments, backend.device)


def check(backend: Backend, arguments, tolerance: float) -> list[torch.Tensor]:
    """Results and changed arguments are those of the plain kernel; returns them."""
    arguments = on(backend, arguments)
    assert backend.supports(arguments)
    got, want = outcome(arguments).tensors(), plain_outcome(arguments).tensors()
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
    return got


# ---- orthogonal matrices --------------------

# Square, tall and wide; sides beside the widths of vectors and of tiles; one row, one column, one number.
MATRICES = [(1, 1), (1, 7), (9, 1), (3, 2), (8, 8), (9, 17), (16, 10), (64, 16), (33, 31), (64, 64), (300, 63)]


def orthogonalize(x, norm_eps=1e-9, dtype=torch.float32):
    return ops.orthogonalize(Orthogonalize(x, dtype, COEFFICIENTS, 5, 1e-8, norm_eps))


def exact(x, norm_eps):
    """By singular values in float64: each goes its own way through the polynomial."""
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    a, b, c = COEFFICIENTS
    s = s / (s.square().sum(-1, keepdim=True).sqrt() + 1e-8)
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    y = u @ torch.diag_embed(s) @ v
    return y if norm_eps is None else y / (y.square().mean((-2, -1), keepdim=True) + norm_eps).sqrt()


@pytest.mark.parametrize("norm_eps", [None, 1e-9])
@pytest.mark.parametrize("shape", MATRICES)
def test_orthogonalize_is_its_polynomial(cpu, shape, norm_eps):
    """No further from float64 than the plain kernel, and at most 1e-4."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, *shape, generator=generator) * torch.tensor([1e-6, 1e-2, 1.0, 30.0, 1e4]).view(-1, 1, 1)
    (got, mean_squares), want = orthogonalize(x, norm_eps), exact(x, norm_eps)
    with ops.plain():
        plain, _ = orthogonalize(x, norm_eps)
    assert got.shape == x.shape and got.is_contiguous() and got.dtype == torch.float32
    torch.testing.assert_close(mean_squares.double(), exact(x, None).square().mean((-2, -1)), rtol=1e-4, atol=1e-6)
    error = (plain - want).abs().max()
    assert (got - want).abs().max() <= min(1e-4, 5 * float(error) + 1e-5), (error, (got - want).abs().max())


def spectrum(kind, rows, columns):
    """A matrix (rows, columns) float64: random, of singular values down to a millionth, or almost of low rank."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    if kind == "random":
        return x
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = (
        torch.logspace(0, -6, len(s), dtype=torch.float64)
        if kind == "falling"
        else 1e-5 + (s > s[len(s) // 8]).double()
    )
    return u @ torch.diag_embed(s) @ v


@pytest.mark.parametrize("kind", ["random", "falling", "low rank"])
@pytest.mark.parametrize("shape", [(130, 130), (150, 140), (130, 300), (300, 130), (64, 2000)])
def test_large_matrices_are_as_exact_as_in_the_plain_form(shape, kind):
    """Symmetric products and the iteration of A, against float64; 5e-5 of the norm, one at a time and in a batch."""
    x = spectrum(kind, *shape)
    want = exact(x, None)
    arguments = Orthogonalize(x.float(), torch.float32, COEFFICIENTS, 5, 1e-8, None)
    error = (want - newton_schulz.orthogonalize(arguments)[0]).norm() / want.norm()
    plain = newton_schulz._by_three_products(x.float().unsqueeze(0), arguments)[0]
    assert error < 4 * (want - plain).norm() / want.norm() + 2e-6 and error < 5e-5
    batch = newton_schulz._normalised(x.float().expand(2, *shape), 1e-8)
    for y in newton_schulz._iterate(batch, COEFFICIENTS, 5):
        assert (want - y).norm() / want.norm() < 5e-5


def test_factors_of_ten_bits_are_enough_for_long_matrices(monkeypatch):
    """TF32, by rounding what a product is made of: closer than the plain form in bfloat16."""

    def rounded(x):
        return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    matmul = torch.matmul
    monkeypatch.setattr(torch, "matmul", lambda a, b, out: out.copy_(matmul(rounded(a), rounded(b))))
    for kind in ("random", "falling", "low rank"):
        x = spectrum(kind, 96, 288)
        want = exact(x, None)
        y = newton_schulz._iterate(newton_schulz._normalised(x.float().unsqueeze(0), 1e-8), COEFFICIENTS, 5)[0]
        half = newton_schulz._by_three_products(
            x.float().unsqueeze(0), Orthogonalize(x.float(), torch.bfloat16, COEFFICIENTS, 5, 1e-8, None)
        )
        error = (want - y).norm() / want.norm()
        assert 1e-4 < error < 4e-2 and error < (want - half).norm() / want.norm()


def test_orthogonalize_takes_stacks_zeros_and_any_strides(cpu):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 20, 12, generator=generator)
    x[1, 1] = 0.0
    got, _ = orthogonalize(x)
    assert torch.equal(got[1, 1], torch.zeros(20, 12))
    for layout in ("transposed", "every second"):
        assert torch.equal(orthogonalize(strided(x, layout))[0], got)
    assert torch.equal(orthogonalize(x[1])[0], got[1]) and torch.equal(orthogonalize(x[1, 0])[0], got[1, 0])
    with threads(2):
        assert torch.equal(orthogonalize(x)[0], got)
    torch.testing.assert_close(orthogonalize(x.mT)[0], got.mT, rtol=1e-4, atol=1e-5)
    assert orthogonalize(x[:, :0])[0].shape == (2, 0, 20, 12)
    x[0, 0, 3, 3] = float("nan")
    broken, _ = orthogonalize(x)
    assert broken[0, 0].isnan().any() and torch.equal(broken[1], got[1])


def test_what_the_plain_kernel_keeps():
    """Other types, matrices that a library is as fast with, and all of them on a GPU."""
    x = torch.randn(70, 80, generator=torch.Generator().manual_seed(2))

    def supports(x, dtype=torch.float32, device="cpu"):
        return dispatch.supports(Orthogonalize(x, dtype, COEFFICIENTS, 5, 1e-8, None), device)

    assert supports(x[:64]) and not supports(x) and not supports(torch.empty(8, 1 << 14))
    assert not supports(x[:8], torch.bfloat16) and not supports(x[:8], device="cuda")
    half, _ = orthogonalize(x[:8], dtype=torch.bfloat16)
    arguments = Orthogonalize(x[:8], torch.bfloat16, COEFFICIENTS, 5, 1e-8, 1e-9)
    assert half.dtype == torch.float32 and torch.equal(half, newton_schulz.orthogonalize(arguments)[0])


# ---- the networks of a step --------------------


@pytest.mark.parametrize("outputs", [1, 2, 3])
@pytest.mark.parametrize("constants", [None, (11,), (3, 11)])
@pytest.mark.parametrize("rows", [1, 3])
def test_specialize_networks(backend, rows, constants, outputs):
    for sizes in ((8, 4, 3), (8, 8, 3)):
        check(backend, specialize(rows, constants, outputs, sizes), 1e-6 if backend.kind == "cpu" else 1e-5)


def test_a_specialized_network_by_hand():
    """Two inputs, of which the second is a constant, one hidden unit, one output of two: all numbers are exact."""
    arguments = SpecializeNetworks(
        networks=torch.tensor([[2.0, 3.0, 0.5, 1.0, 4.0, 0.25, 8.0]]),  # w (2, 1), b (1,), w (1, 2), b (2,)
        sizes=(2, 1, 2),
        outputs=1,
        constants=torch.tensor([10.0]),
        sums=torch.tensor([[60.0]], dtype=torch.float64),
        numel=torch.tensor([4.0], dtype=torch.float64),
        norm_eps=1.0,
        lr=torch.tensor([0.5]),
        weight_decay=torch.tensor([0.125]),
        factors=[torch.tensor([4.0])],
        floor=None,
        step_mult=2.0,
        p_column=-1,
    )
    for got, scale, decay in (
        plain_outcome(arguments).results,
        torch.ops.hf_lopt.specialize_networks(**vars(arguments)),
    ):
        assert got.tolist() == [[2.0 / 4.0, 0.5 + 3.0 * 10.0, 1.0, 0.25]]  # 1 / sqrt(60 / 4 + 1) = 1 / 4
        assert scale.tolist() == [0.5 * 4.0 * 2.0] and decay.tolist() == [0.0625]


def test_step_sizes_without_networks(backend):
    nothing = {"sizes": (), "floor": None, "p_column": -1, "sums": torch.empty(0), "networks": torch.empty(0)}
    arguments = replace(specialize(), step_mult=0.5, **nothing)
    flat, scale, decay = check(backend, arguments, 1e-6)[:3]
    assert flat.shape == (3, 0)
    lr, factor = arguments.lr.to(scale), arguments.factors[0].to(scale)
    torch.testing.assert_close(scale, lr * factor * factor[0] * 0.5)


# ---- the decision about a step, and the scheduler --------------------


@pytest.mark.parametrize("loss, nonfinite", [(1.5, 0.0), (math.nan, 0.0), (2.0, 1.0)])
@pytest.mark.parametrize("inputs", [True, False])
def test_advance(backend, loss, nonfinite, inputs):
    arguments = advance(loss, nonfinite, inputs)
    for step in range(4):  # each from where the one before has ended
        arguments = replace(on(backend, arguments), loss=torch.tensor(loss + step, device=backend.device))
        skip = check(backend, arguments, 2e-6)[0]
        assert bool(skip) == (math.isnan(loss) or nonfinite > 0)
        arguments = outcome(arguments).arguments


@pytest.mark.parametrize("units, controls, softmax", [(512, 256, False), (64, 1, True), (40, 7, True), (64, 0, True)])
@pytest.mark.parametrize("skip", [False, True])
def test_scheduler(backend, units, controls, softmax, skip):
    pool, step = lstm(units, controls, softmax, skip)
    check(backend, pool, 1e-5)
    check(backend, step, 1e-5)
    after = outcome(on(backend, step)).arguments
    assert equal([x.cpu() for x in (*after.hidden, *after.cell)], [*step.hidden, *step.cell]) == skip


@pytest.mark.parametrize("softmax", [False, True])
def test_scheduler_on_the_cpu_is_bit_by_bit_the_plain_one(cpu, softmax):
    """Its elementary functions and products are PyTorch's own; NaN comes through."""
    pool, step = lstm(40, 7, softmax, False)
    pool.mixed[1, 3] = math.nan
    for arguments in (pool, step):
        for a, b in zip(outcome(arguments).tensors(), plain_outcome(arguments).tensors(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# ---- what is stored --------------------


@pytest.mark.parametrize("skip", [False, True])
def test_assign(backend, skip):
    generator = torch.Generator().manual_seed(0)
    shapes = [(), (7,), (33, 70), (0, 3), (600,)]
    targets, values = ([torch.randn(s, generator=generator) for s in shapes] for _ in range(2))
    after = on(backend, Assign(targets, values, torch.tensor(skip)))
    stored = outcome(after).arguments.targets
    assert equal([x.cpu() for x in stored], targets if skip else values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_nan(cuda, dtype):
    xs = [torch.tensor([math.nan, -math.inf, 1.5, math.inf, math.nan], dtype=dtype), torch.ones(300, 7, dtype=dtype)]
    xs[1][299, 3] = math.nan
    small, large = outcome(on(cuda, ZeroNan(xs))).arguments.tensors
    assert small.tolist() == [0.0, -math.inf, 1.5, math.inf, 0.0]
    assert large[299, 3] == 0 and large.sum() == 2099
