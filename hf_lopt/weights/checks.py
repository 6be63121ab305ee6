"""Whether meta-weights are those that a rule needs: their leaves, the shapes of these, and finite values."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch


# Leaf -> shape. A dimension is a size, a symbol ("H") or a multiple of one ("4H").
Shapes = Mapping[str, tuple[int | str, ...]]

# The most that a symbol is taken to stand for in a file: four times what was ever published.
_MAX_UNITS = 2048
# Names, shapes and offsets; and the scratch space that some published files hold.
_MAX_HEADER_BYTES = 1 << 20


def check(theta: Mapping[str, torch.Tensor], shapes: Shapes | None, rule: str, source: str) -> None:
    """Compare ``theta`` with what a rule needs.

    Args:
        shapes: of the leaves; a symbol has one size throughout. None: any leaves will do.
        rule, source: for the message.

    Raises:
        ValueError: naming the first thing that is wrong.
    """
    where = f"weights {source!r} for the rule {rule!r}"
    if shapes is not None:
        missing = sorted(shapes.keys() - theta.keys())
        extra = sorted(theta.keys() - shapes.keys())
        if missing or extra:
            raise ValueError(
                f"{where}: missing leaves {missing or 'none'}, unexpected leaves {extra or 'none'}. "
                "They belong to another rule, or the file is incomplete; pass this rule's, or weights='bundled'."
            )
        _check_shapes(theta, shapes, where)
    for name, leaf in theta.items():
        if not torch.isfinite(leaf).all():
            count = int((~torch.isfinite(leaf)).sum())
            raise ValueError(
                f"{where}: leaf {name!r} has {count} values that are NaN or infinite. Get the file again, or use "
                "weights='bundled'."
            )


def largest_file(shapes: Shapes) -> int:
    """Bytes of the largest file that holds leaves of such shapes: all symbols at their most, in float64."""
    dims = {dim for shape in shapes.values() for dim in shape if isinstance(dim, str)}
    sizes = {re.sub(r"^\d+", "", dim): _MAX_UNITS for dim in dims}
    return 8 * sum(math.prod(_size(dim, sizes) for dim in shape) for shape in shapes.values()) + _MAX_HEADER_BYTES


def _check_shapes(theta: Mapping[str, torch.Tensor], shapes: Shapes, where: str) -> None:
    sizes: dict[str, int] = {}
    bound_by: dict[str, str] = {}
    for name, shape in shapes.items():
        for dim, size in zip(shape, theta[name].shape, strict=False):
            if isinstance(dim, str) and dim.isalpha() and dim not in sizes:
                sizes[dim], bound_by[dim] = size, name
    for name, shape in shapes.items():
        want = tuple(_size(dim, sizes) for dim in shape)
        got = tuple(theta[name].shape)
        if got != want or 0 in got:
            symbols = sorted({re.sub(r"^\d+", "", dim) for dim in shape if isinstance(dim, str)})
            why = ", ".join(f"{s} = {sizes.get(s)} from {bound_by.get(s)!r}" for s in symbols)
            raise ValueError(
                f"{where}: leaf {name!r} has shape {got}, wanted {want}{f' ({why})' if why else ''}. "
                "They belong to another rule or size; pass weights of this rule, or weights='bundled'."
            )


def _size(dim: int | str, sizes: Mapping[str, int]) -> int:
    if isinstance(dim, int):
        return dim
    factor, symbol = re.fullmatch(r"(\d*)([A-Za-z]+)", dim).groups()
    return int(factor or 1) * sizes.get(symbol, -1)
