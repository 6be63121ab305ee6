"""Which matrices stay in the cache of one core, where a kernel of our own beats a library's products.

Compiled kernels and their plain specification take the same ones: the iterations differ in their last bits.
"""

from __future__ import annotations

from collections.abc import Sequence


# The shorter side, and the number of elements, at most.
SIDE, ELEMENTS = 64, 1 << 16


def is_small(shape: Sequence[int]) -> bool:
    """Whether matrices (..., R, C) are small."""
    rows, columns = shape[-2:]
    return min(rows, columns) <= SIDE and rows * columns <= ELEMENTS
