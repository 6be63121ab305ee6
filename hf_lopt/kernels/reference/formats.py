"""The formats that accumulators and parameters are stored in, in plain PyTorch: bfloat16 and 8-bit codes.

Whatever is stored in fewer bits is rounded at random, up or down so that the expected value is the number itself: an
average with a decay of 0.999 moves by a thousandth of its difference from the gradient, which rounding to nearest
would always take back. The random numbers are hashes of a tensor, a row and a column of it, and a place for each
accumulator of an element. From step to step they go on by the golden section of their range (a low-discrepancy
sequence), so that they are evenly spread over the steps of each element, and errors cancel over steps instead of
adding up like those of independent numbers. Nothing is drawn from a generator: the numbers depend neither on threads
nor on shards.

8-bit codes come in blocks of :data:`BLOCK` neighbours of a row, each with a scale, float32. A momentum is ``c |c| s``
with a code c from -127 to 127; the root of a second moment is ``c² s`` with c from 0 to 255. Squares are dense near
zero, where most numbers are, and take one product. A second moment that is not zero has a code of at least 1: what is
divided by its root must not meet a zero that was none.

A row is what lies behind the second of the two factored axes, that one included, joined: the rows that kernels read.

Axes: D decays of an accumulator, C columns of a row, B blocks of a row.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


BLOCK = 256
MOMENTUM_CODES, SECOND_CODES = 127, 255  # the largest
# Blocks whose largest number is smaller are zero: the inverse of their scale would not be finite.
LEAST_SIZE = 2.0**-110
# Places of the random numbers of an element: momenta, then second moments, and the parameter.
PARAMETER_SLOT = 10
GOLDEN = 0x9E37  # 2^16 over the golden ratio
_HASH_STEP, _LOWER = 0x9E3779B9, 0xFFFFFFFF
_RUN_SEED = 0  # the same in all runs, so that ranks need not agree on one

Store = Callable[[Tensor, Tensor], None]
Index = tuple[slice, ...]


def mix(x: Tensor | int) -> Tensor | int:
    """The finaliser of MurmurHash3 (Appleby 2011) of 32-bit numbers in int64: every bit depends on all."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _LOWER
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _LOWER
    return x ^ (x >> 16)


def _follow(x: Tensor) -> Tensor:
    """The next hash of an element."""
    x = (x * 0xC2B2AE35) & _LOWER
    return x ^ (x >> 15)


def tensor_key(number: int) -> int:
    """Of the parameter with this number among all parameters of an optimizer."""
    return int(mix((int(mix(_RUN_SEED + 1)) + (number + 1) * _HASH_STEP) & _LOWER))


class Place(NamedTuple):
    """Where a local tensor lies in the whole one.

    Attributes:
        key: its :func:`tensor_key`.
        row_axis: the axes from this one on are the columns of a row.
        starts: its first index along each axis of the whole tensor.
        sizes: lengths of the axes of the whole tensor.
    """

    key: int
    row_axis: int
    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    def of_slice(self, index: Index) -> Place:
        """Of a part of the tensor."""
        moved = [start + (s.start or 0) for start, s in zip(self.starts, index, strict=False)]
        return self._replace(starts=(*moved, *self.starts[len(moved) :]))


def read_places(numbers: Sequence[int], params: Sequence[Tensor]) -> list[Place]:
    """The places of parameters from one list: key, row axis, starts and sizes of each; none from an empty one."""
    places, at = [], 0
    for p in params if numbers else ():
        n = p.dim()
        starts, sizes = numbers[at + 2 : at + 2 + n], numbers[at + 2 + n : at + 2 + 2 * n]
        places.append(Place(numbers[at], numbers[at + 1], tuple(starts), tuple(sizes)))
        at += 2 + 2 * n
    return places


class Noise:
    """The random numbers of one block of a tensor.

    Args:
        place: of the tensor.
        index: of the block in it.
        shape: of the block.
        step: number of the step, 0-d int64.
    """

    def __init__(self, place: Place, index: Index, shape: Sequence[int], step: Tensor):
        place = place.of_slice(index)
        # The same turn in both halves of a hash.
        self._turn = ((step * GOLDEN) & 0xFFFF) * 0x10001
        split = place.row_axis
        rows = self._flat(place, range(split), shape, step.device)
        columns = self._flat(place, range(split, len(shape)), shape, step.device)
        x = ((mix(place.key ^ mix(rows & _LOWER)) + columns) * 0x85EBCA6B) & _LOWER
        self._hashes = [_follow(x ^ (x >> 16))]

    @staticmethod
    def _flat(place: Place, axes: range, shape: Sequence[int], device: torch.device) -> Tensor:
        """Row-major indices along some axes of the whole tensor, broadcasting over the others."""
        flat = torch.zeros([1] * len(shape), dtype=torch.int64, device=device)
        for axis in axes:
            view = [-1 if i == axis else 1 for i in range(len(shape))]
            start = place.starts[axis]
            along = torch.arange(start, start + shape[axis], dtype=torch.int64, device=device).view(view)
            flat = flat * place.sizes[axis] + along
        return flat

    def __call__(self, slot: int) -> Tensor:
        """Numbers from 0 to 65,535, int64, for one place of every element."""
        while len(self._hashes) <= slot // 2:
            self._hashes.append(_follow(self._hashes[-1]))
        return ((self._hashes[slot // 2] + self._turn) >> (16 * (slot % 2))) & 0xFFFF


def round_to_bfloat16(x: Tensor, noise: Tensor) -> Tensor:
    """``x`` float32 rounded at random to a number of bfloat16. NaN stays."""
    bits = x.contiguous().view(torch.int32)
    rounded = ((bits + noise.to(torch.int32)) & -65536).view(torch.float32)
    return torch.where(x.isnan(), x, rounded).to(torch.bfloat16)


def block_count(columns: int) -> int:
    """Blocks of a row."""
    return -(-columns // BLOCK)


def _blocks(x: Tensor, row_axis: int) -> Tensor:
    """``x`` (D, *block) as (D, *rows, B, BLOCK), filled up with zeros."""
    flat = x.flatten(row_axis + 1)
    missing = block_count(flat.shape[-1]) * BLOCK - flat.shape[-1]
    return functional.pad(flat, (0, missing)).unflatten(-1, (-1, BLOCK))


def encode(x: Tensor, row_axis: int, signed: bool, noise: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Codes of ``x`` (D, *block), float32, of the same shape, int8 or uint8; and the scales of its blocks
    (D, *rows, B), float32. ``noise``: random numbers (*block) of each of the D.

    Momenta (``signed``) are int8, second moments uint8. The block begins at the beginning of a block of codes.
    """
    levels = MOMENTUM_CODES if signed else SECOND_CODES
    largest = _blocks(x, row_axis).abs().amax(-1)
    largest = torch.where(largest < LEAST_SIZE, 0.0, largest)
    scale = (largest if signed else largest.sqrt()) / float(levels * levels)
    inverse = torch.where(scale > 0.0, scale.reciprocal(), 0.0)
    spread = inverse.repeat_interleave(BLOCK, -1)[..., : math.prod(x.shape[row_axis + 1 :])].view(x.shape)
    y = (x.abs() if signed else x.sqrt()) * spread  # the square of the code
    code = y.sqrt().floor_().clamp_max_(levels)
    below, width = code * code, 2.0 * code + 1.0
    rest = y - below
    if not signed:  # so that the expected second moment is right, and not the expected root
        width, rest = width * (2.0 * below + width), rest * (y + below)
    draws = torch.stack(list(noise)).to(torch.float32).add_(0.5).mul_(1.0 / 65536.0)
    code = (code + (draws * width < rest)).clamp_max_(levels)
    if signed:
        return torch.where(x < 0.0, -code, code).to(torch.int8), scale
    return torch.where(y > 0.0, code.clamp_min_(1.0), code).to(torch.uint8), scale


def decode(codes: Tensor, scale: Tensor, row_axis: int) -> Tensor:
    """The numbers, float32, behind ``codes`` (D, *block)."""
    signed = codes.dtype == torch.int8
    c = _blocks(codes.to(torch.float32), row_axis)
    x = c * (c.abs() if signed else c) * scale.unsqueeze(-1)
    x = (x if signed else x * x).flatten(-2)
    return x[..., : math.prod(codes.shape[row_axis + 1 :])].reshape(codes.shape)


class Accumulator:
    """An accumulator of one tensor, (D, *shape), as it is stored.

    Args:
        values: float32, bfloat16, or codes.
        scale: of the codes, (D, *rows, B); empty or None for other formats.
    """

    def __init__(self, values: Tensor, scale: Tensor | None = None):
        self.values = values
        self.scale = scale if scale is not None and scale.dim() > 1 else None
        # Codes have a row axis: the scales have all axes before it, the decays in front and the blocks at the end.
        self.row_axis = self.scale.dim() - 2 if self.scale is not None else None

    def slices(self, indices: Sequence[Index]) -> Iterator[Accumulator]:
        """Parts of it, as views."""
        for index in indices:
            yield Accumulator(self._part(index), self._scale_part(index))

    def _part(self, index: Index) -> Tensor:
        return self.values[(slice(None), *index)] if index else self.values

    def _scale_part(self, index: Index) -> Tensor | None:
        if self.scale is None or self.row_axis is None:
            return None
        if not index:
            return self.scale
        inner = math.prod(self.values.shape[self.row_axis + 2 :])
        along = index[self.row_axis] if len(index) > self.row_axis else slice(None)
        start, stop, _ = along.indices(self.values.shape[self.row_axis + 1])
        blocks = slice(start * inner // BLOCK, block_count(stop * inner))
        return self.scale[
            (slice(None), *index[: self.row_axis], *[slice(None)] * (self.row_axis - len(index)), blocks)
        ]

    def load(self, index: Index = ()) -> Tensor:
        """A block of it, float32; a view where that is how it is stored."""
        values = self._part(index)
        if self.scale is None or self.row_axis is None:
            return values.float()
        scale = self._scale_part(index)
        assert scale is not None
        return decode(values, scale, self.row_axis)

    def put(self, index: Index, new: Tensor, store: Store, noise: Noise | None, slot: int) -> Tensor:
        """Stores a block, float32, and returns what is then stored. ``slot``: the first of its random numbers."""
        values = self._part(index)
        if noise is None or values.dtype == torch.float32:
            store(values, new)
            return new
        scale = self._scale_part(index)
        draws = [noise(slot + d) for d in range(len(new))]
        if scale is None or self.row_axis is None:
            rounded = round_to_bfloat16(new, torch.stack(draws))
            store(values, rounded)
            return rounded.float()
        codes, new_scale = encode(new, self.row_axis, values.dtype == torch.int8, draws)
        store(values, codes)
        store(scale, new_scale)
        return decode(codes, new_scale, self.row_axis)


def accumulators(values: Sequence[Tensor], scales: Sequence[Tensor]) -> list[Accumulator]:
    """Those of a list of tensors; no scales where none has codes."""
    return list(map(Accumulator, values, scales or itertools.repeat(None)))


def convert(values: Tensor, scale: Tensor | None, dtype: torch.dtype, row_axis: int) -> tuple[Tensor, Tensor | None]:
    """A whole accumulator (D, *shape) in another format, to nearest; some rows at a time, without a float32 copy.

    Args:
        values, scale: see :class:`Accumulator`.
        dtype: of the result: float32, bfloat16, int8 or uint8.
        row_axis: of the parameter.
    """
    out = torch.empty_like(values, dtype=dtype, memory_format=torch.contiguous_format)
    old, new = Accumulator(values, scale), Accumulator(out)
    if dtype in (torch.int8, torch.uint8):
        blocks = block_count(math.prod(values.shape[row_axis + 1 :]))
        shape = (*values.shape[: row_axis + 1], blocks)
        new = Accumulator(out, torch.empty(shape, dtype=torch.float32, device=values.device))
    half = torch.full((), 1 << 15, dtype=torch.int64, device=values.device)
    for index in _leading_blocks(values.shape[1:]):
        x = old.load(index)
        part = new._scale_part(index)
        if part is None:
            new._part(index).copy_(x)
            continue
        codes, found = encode(x, row_axis, dtype == torch.int8, [half.expand(x.shape[1:])] * len(x))
        new._part(index).copy_(codes)
        part.copy_(found)
    return out, new.scale


def _leading_blocks(shape: Sequence[int]) -> Iterator[Index]:
    """Index tuples that cut a tensor along its first axis."""
    if not shape:
        yield ()
        return
    length = max(1, (1 << 18) // max(1, math.prod(shape[1:])))
    for i in range(0, shape[0], length):
        yield (slice(i, i + length),)
