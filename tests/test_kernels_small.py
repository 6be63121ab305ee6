"""The compiled CPU kernels on small arrays: Newton-Schulz on batches of matrices, and the networks of a step.

Compared with float64 and with the plain kernels, for each instruction set of this processor.
"""

from __future__ import annotations

import pytest
import torch

from hf_lopt import _load, _ops, _plain_scheduler, _plain_steps
from kernel_cases import instruction_set, instruction_sets, strided, threads


pytestmark = pytest.mark.skipif(not _load.loaded(), reason="the kernels are not compiled here")

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# Square, tall and wide; sides beside the widths of vectors and of tiles; one row, one column, one number.
MATRICES = [(1, 1), (1, 7), (9, 1), (3, 2), (8, 8), (9, 17), (16, 10), (64, 16), (33, 31), (64, 64), (300, 63)]


@pytest.fixture(params=instruction_sets())
def kernels(request):
    with instruction_set(request.param):
        yield request.param


def orthogonalize(x, norm_eps=1e-9, steps=5, dtype=torch.float32):
    return _ops.orthogonalize(x, dtype, COEFFICIENTS, steps, 1e-8, norm_eps)[0]


def exact(x, norm_eps, steps=5):
    """By singular values in float64: each goes its own way through the polynomial."""
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    a, b, c = COEFFICIENTS
    s = s / (s.square().sum(-1, keepdim=True).sqrt() + 1e-8)
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    y = u @ torch.diag_embed(s) @ v
    return y if norm_eps is None else y / (y.square().mean((-2, -1), keepdim=True) + norm_eps).sqrt()


@pytest.mark.parametrize("norm_eps", [None, 1e-9])
@pytest.mark.parametrize("shape", MATRICES)
def test_orthogonalize_is_its_polynomial(kernels, shape, norm_eps):
    """No further from float64 than the plain kernel, and at most 1e-4."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, *shape, generator=generator) * torch.tensor([1e-6, 1e-2, 1.0, 30.0, 1e4]).view(-1, 1, 1)
    got, want = orthogonalize(x, norm_eps), exact(x, norm_eps)
    with _ops.plain():
        plain = orthogonalize(x, norm_eps)
    assert got.shape == x.shape and got.is_contiguous() and got.dtype == torch.float32
    mean_squares = _ops.orthogonalize(x, torch.float32, COEFFICIENTS, 5, 1e-8, norm_eps)[1]
    torch.testing.assert_close(mean_squares.double(), exact(x, None).square().mean((-2, -1)), rtol=1e-4, atol=1e-6)
    error = (plain - want).abs().max()
    assert (got - want).abs().max() <= min(1e-4, 5 * float(error) + 1e-5), (error, (got - want).abs().max())


def test_orthogonalize_takes_stacks_zeros_and_any_strides(kernels):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 20, 12, generator=generator)
    x[1, 1] = 0.0
    got = orthogonalize(x)
    assert torch.equal(got[1, 1], torch.zeros(20, 12))
    for layout in ("transposed", "every second"):
        assert torch.equal(orthogonalize(strided(x, layout)), got)
    assert torch.equal(orthogonalize(x[1]), got[1]) and torch.equal(orthogonalize(x[1, 0]), got[1, 0])
    with threads(2):
        assert torch.equal(orthogonalize(x), got)
    torch.testing.assert_close(orthogonalize(x.mT), got.mT, rtol=1e-4, atol=1e-5)
    assert orthogonalize(x[:, :0]).shape == (2, 0, 20, 12)
    x[0, 0, 3, 3] = float("nan")
    broken = orthogonalize(x)
    assert broken[0, 0].isnan().any() and torch.equal(broken[1], got[1])


def test_what_the_plain_kernel_keeps():
    """Other types, and matrices that a library is as fast with."""
    x = torch.randn(70, 80, generator=torch.Generator().manual_seed(2))
    covers = _load.CALLS["orthogonalize"][1]
    assert covers(x[:64], torch.float32) and not covers(x, torch.float32)
    assert not covers(torch.empty(8, 1 << 14), torch.float32) and not covers(x[:8], torch.bfloat16)
    half = orthogonalize(x[:8], dtype=torch.bfloat16)
    plain, _ = _plain_steps.orthogonalize(x[:8], torch.bfloat16, COEFFICIENTS, 5, 1e-8, 1e-9)
    assert half.dtype == torch.float32 and torch.equal(half, plain)
    with pytest.raises(RuntimeError, match="matrices"):
        torch.ops.hf_lopt.orthogonalize(x[0], torch.float32, COEFFICIENTS, 5, 1e-8, None)
    with pytest.raises(RuntimeError, match="coefficients"):
        torch.ops.hf_lopt.orthogonalize(x, torch.float32, (1.0,), 5, 1e-8, None)


@pytest.mark.parametrize("norm_eps", [None, 1e-9])
def test_opcheck_of_orthogonalize(norm_eps):
    arguments = (torch.randn(2, 6, 5), torch.float32, COEFFICIENTS, 5, 1e-8, norm_eps)
    torch.library.opcheck(torch.ops.hf_lopt.orthogonalize.default, arguments)


def networks(count, sizes):
    generator = torch.Generator().manual_seed(3)
    width = sum((a + 1) * b for a, b in zip(sizes, sizes[1:], strict=False))
    return torch.randn(count, width, generator=generator), generator


@pytest.mark.parametrize("outputs", [1, 2, 3])
@pytest.mark.parametrize("constants", [None, (11,), (3, 11)])
@pytest.mark.parametrize("rows", [1, 3])
def test_fold_network(rows, constants, outputs):
    sizes = (30 + (11 if constants else 0), 8, 4, 3)
    flat, generator = networks(rows, sizes)
    lr, decay, factor = (torch.rand(3, generator=generator) for _ in range(3))
    arguments = (
        *(flat, sizes, outputs, torch.randn(constants, generator=generator) if constants else None),
        torch.rand(3, 30, generator=generator, dtype=torch.float64) * 10,
        *(torch.tensor([1.0, 20.0, 300.0], dtype=torch.float64), 1e-5, lr, decay, [factor, factor[:1].expand(3)]),
        *(torch.tensor([0.0, 10.0, 0.1]), 0.001, 2),
    )
    got = torch.ops.hf_lopt.fold_network(*arguments)
    for a, b in zip(got, _plain_scheduler.fold_network(*arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    torch.library.opcheck(torch.ops.hf_lopt.fold_network.default, arguments)


def test_a_folded_network_by_hand():
    """Two inputs, of which the second is a constant, one hidden unit, one output of two: all numbers are exact."""
    flat = torch.tensor([[2.0, 3.0, 0.5, 1.0, 4.0, 0.25, 8.0]])  # w (2, 1), b (1,), w (1, 2), b (2,)
    got, scale, decay = torch.ops.hf_lopt.fold_network(
        *(flat, (2, 1, 2), 1, torch.tensor([10.0])),
        *(torch.tensor([[60.0]]).double(), torch.tensor([4.0]).double(), 1.0),
        *(torch.tensor([0.5]), torch.tensor([0.125]), [torch.tensor([4.0])], None, 2.0, -1),
    )
    assert got.tolist() == [[2.0 / 4.0, 0.5 + 3.0 * 10.0, 1.0, 0.25]]  # 1 / sqrt(60 / 4 + 1) = 1 / 4
    assert scale.tolist() == [0.5 * 4.0 * 2.0] and decay.tolist() == [0.0625]


def test_no_networks_and_what_does_not_fit():
    flat, _ = networks(1, (30, 8, 4, 3))
    lr, nothing = torch.rand(6), torch.empty(0)
    empty, scale, _ = torch.ops.hf_lopt.fold_network(
        *(nothing, (), 2, None, nothing, torch.ones(2).double(), 0.0, lr, lr, [], None, 0.5, -1)
    )
    assert empty.shape == (2, 0) and torch.equal(scale, lr * 0.5)  # numbers of slices, without any networks
    sums, numel = torch.ones(6, 30).double(), torch.ones(6).double()

    def fold(flat=flat, sums=sums, numel=numel):
        torch.ops.hf_lopt.fold_network(flat, (30, 8, 4, 3), 2, None, sums, numel, 0.0, lr, lr, [], None, 1.0, -1)

    fold()
    for wrong, message in (
        ({"flat": flat[:, 1:]}, "299.*298"),
        ({"flat": flat.repeat(2, 1)}, "2 rows.*6"),
        ({"sums": sums[:, 1:]}, "30.*29"),
        ({"numel": numel[:5]}, "5 sizes.*6"),
    ):
        with pytest.raises(RuntimeError, match=message):
            fold(**wrong)
