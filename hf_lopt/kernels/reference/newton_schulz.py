"""Plain-PyTorch Newton-Schulz iteration: matrices with their singular values moved to about 1.

A matrix X of R rows and C columns is taken in the form that needs the fewest multiplications. With A = X X^T of the
shorter side and P(A) = c0 + c1 A + c2 A², a step is X <- P(A) X. All that is made of A alone is symmetric, so half of
it is enough; and of long matrices only A is iterated, A <- P A P, together with the product Q of all P.

Axes: R rows and C columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_lopt.kernels.arguments import Orthogonalize
from hf_lopt.kernels.small_matrices import SIDE, is_small


# From this ratio of the sides on the iteration is one of A. It loses the directions whose singular values are so small
# that their squares vanish beside the largest one. So it begins anew with the X that it has reached, after this many
# steps: then these have grown 41 times, and no more is lost than in the iteration of X (measured in the tests).
LONG, AGAIN = 2.0, 3


def orthogonalize(arguments: Orthogonalize) -> tuple[Tensor, Tensor]:
    """Matrices (..., R, C) with their singular values moved to about 1, float32, by a quintic iteration in ``dtype``.

    x <- x / (|x| + eps), and ``steps`` times x <- c0 x + (c1 A + c2 A²) x with A = x x^T, of the shorter side. At the
    end each matrix gets a mean square of 1 (``norm_eps`` is added to what it was), unless ``norm_eps`` is None.
    Returns the matrices, contiguous, and what their mean squares were, (...).
    """
    x, shape = arguments.x, arguments.x.shape
    x = x.reshape(-1, *shape[-2:])
    if arguments.dtype != torch.float32 or is_small(shape):
        x = _by_three_products(x, arguments)
    elif x.device.type == "cpu":
        out = torch.empty(x.shape, dtype=torch.float32)
        for matrix, into in zip(x, out, strict=True):
            into.copy_(_iterate(_normalised(matrix, arguments.eps), arguments.coefficients, arguments.steps))
        x = out
    else:
        x = _iterate(_normalised(x, arguments.eps), arguments.coefficients, arguments.steps)
    mean_squares = x.square().mean((1, 2))
    if arguments.norm_eps is not None:
        x = x * (mean_squares + arguments.norm_eps).rsqrt().view(-1, 1, 1)
    x = x.reshape(shape)
    return x if x.is_contiguous() else x.clone(memory_format=torch.contiguous_format), mean_squares.view(shape[:-2])


def _normalised(x: Tensor, eps: float) -> Tensor:
    return x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + eps)


def _by_three_products(x: Tensor, arguments: Orthogonalize) -> Tensor:
    """Batches of any dtype; three batched matrix products and a sum in each step."""
    tall = x.shape[-2] > x.shape[-1]
    x = _normalised(x.mT if tall else x, arguments.eps).to(arguments.dtype)
    c0, c1, c2 = arguments.coefficients
    for _ in range(arguments.steps):
        a = x @ x.mT
        x = torch.baddbmm(x, torch.add(a @ a, a, alpha=c1 / c2), x, beta=c0, alpha=c2)
    return (x.mT if tall else x).float()


def _iterate(x: Tensor, coefficients: Sequence[float], steps: int) -> Tensor:
    """Matrices (R, C) or (N, R, C) after the iteration, in which ``x`` is lost."""
    rows, columns = x.shape[-2:]
    n, is_tall = min(rows, columns), rows > columns
    is_long = max(rows, columns) >= LONG * n
    y = torch.empty_like(x)
    a, p, q, other = x.new_empty(4, *x.shape[:-2], n, n).unbind()

    def gram(x: Tensor) -> None:
        pair = (x.mT, x) if is_tall else (x, x.mT)
        symmetric_product(*pair, a)

    def times(x: Tensor, q: Tensor, out: Tensor) -> None:
        torch.matmul(*((x, q) if is_tall else (q, x)), out=out)

    gram(x)
    for k in range(steps):
        _polynomial(a, coefficients, p)
        first = k == 0 or not is_long or k == AGAIN
        if first:
            p, q = q, p
        else:
            symmetric_product(p, q, other)
            q, other = other, q
        if k + 1 == steps or not is_long or k + 1 == AGAIN:
            times(x, q, y)
            x, y = y, x
            if k + 1 < steps:
                gram(x)
        else:
            of_this = q if first else p
            symmetric_product(a, of_this, other)
            symmetric_product(of_this, other, a)
    return x


def _polynomial(a: Tensor, coefficients: Sequence[float], out: Tensor) -> None:
    """c0 + c1 A + c2 A²."""
    c0, c1, c2 = coefficients
    symmetric_product(a, a, out)
    torch.add(out.mul_(c2), a, alpha=c1, out=out)
    out.diagonal(dim1=-2, dim2=-1).add_(c0)


def symmetric_product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """``left @ right``, which is known to be symmetric: on a CPU, for two matrices, little more than half is computed.

    Elsewhere each of the smaller products would be a launch.
    """
    n = left.shape[-2]
    block = max(SIDE, -(-n // 8))
    if left.dim() > 2 or left.device.type != "cpu" or n < 2 * block:
        torch.matmul(left, right, out=out)
        return
    for start in range(0, n, block):
        stop = min(start + block, n)
        torch.mm(left[start:], right[:, start:stop], out=out[start:, start:stop])
        out[start:stop, stop:] = out[stop:, start:stop].mT
