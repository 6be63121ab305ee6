"""Lists of tensors that the compiled library knows by a number, so that a call need not pass each tensor.

To bring a list through PyTorch's dispatcher costs more than most of what is done with a small tensor, and so does
Python's object for each result. What is kept are the tensors themselves: a call finds the data that they have by then.
"""

from __future__ import annotations

import atexit
import collections
import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


# A subclass may be a stand-in for another tensor, which a library cannot keep.
_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_ON = {"cpu": operator.attrgetter("is_cpu"), "cuda": operator.attrgetter("is_cuda")}
_numbers = itertools.count(1)
FEW = 8  # shorter lists are passed faster than they are held
# Whose libraries hold lists.
DEVICES = frozenset(("cpu", "cuda"))


@functools.cache
def any_on(device: torch.device) -> Tensor:
    """A tensor without elements, by which the dispatcher knows the device of a call whose lists are all held."""
    return torch.empty(0, dtype=torch.float32, device=device)


class _Number:
    """What a list is called in the library, which keeps it for as long as this object lives."""

    at_end = False  # of the process, when operators go before the last lists do

    def __init__(self, device: torch.device):
        self.value, self._like = next(_numbers), any_on(device)
        self._release: Callable[[Tensor, int], None] = torch.ops.hf_lopt.release.default

    def __del__(self) -> None:
        if not self.at_end:
            self._release(self._like, self.value)


@atexit.register
def _end() -> None:
    _Number.at_end = True


class HeldList(tuple[Tensor, ...]):
    """Tensors that are passed to many calls and stay the same."""

    _number: _Number | None = None
    number = 0  # by which the library knows it now, 0 while it does not

    @functools.cached_property
    def can_be_held(self) -> bool:
        """Whether it is worth it, and all of them are real tensors."""
        return len(self) >= FEW and _PLAIN.issuperset(map(type, self))

    @functools.cached_property
    def dtypes(self) -> frozenset[torch.dtype]:
        """Those that occur; a list is made anew when a tensor of it is converted."""
        return frozenset(x.dtype for x in self)

    @functools.cached_property
    def spare(self) -> dict[tuple[str, int], list[_Number]]:
        """By operator and place, numbers of results of calls with this list that nobody needs any more."""
        return collections.defaultdict(list)

    @property
    def numbers(self) -> list[int]:
        """What the library calls the list; none where it cannot be held."""
        if self._number is None:
            if not self.can_be_held:
                return []
            number = _Number(self[0].device)
            torch.ops.hf_lopt.hold.default(list(self), number.value)
            self._number, self.number = number, number.value
        return [self._number.value]

    @property
    def rest(self) -> Sequence[Tensor]:
        """What a call still has to pass."""
        return () if self._number is not None else self

    def let_go(self) -> None:
        """Have the library keep the list no longer, until it is passed again."""
        self._number, self.number = None, 0

    def all_on(self, kind: str) -> bool:
        """Whether all tensors are by now on a type of device, "cpu" or "cuda"."""
        return all(map(_ON[kind], self))

    def __reduce__(self) -> tuple[type[HeldList], tuple[list[Tensor]]]:  # a copy is another list
        return HeldList, (list(self),)


class Kinds:
    """Shapes, types and devices of the tensors of held lists, of some also layouts and strides, as they were first."""

    def __init__(self, device: torch.device):
        self._like, self._number = any_on(device), _Number(device)

    def same(self, lists: Iterable[HeldList], strided: Iterable[HeldList] = ()) -> bool:
        """Whether they are as in the first call, those of ``strided`` also in their strides.

        All have to be on the type of device of the first call: what is held elsewhere is not known there.
        """
        try:
            numbers = [[number for x in part for number in x.numbers] for part in (lists, strided)]
        except NotImplementedError:  # of a sparse tensor, for example, no library holds anything
            return False
        return bool(torch.ops.hf_lopt.same_kinds.default(self._like, *numbers, self._number.value))


class HeldResults(Sequence[Tensor]):
    """Float32 tensors that one call leaves in the library for another; made Python's when somebody looks at them.

    Once nobody needs them, and if nobody has looked at them, the next such call may write over them: ``spare`` gets
    their number, and is where a number comes from if it has one.
    """

    dtypes = frozenset((torch.float32,))
    rest: Sequence[Tensor] = ()

    def __init__(self, device: torch.device, count: int, spare: list[_Number]):
        self.device, self._count, self._spare = device, count, spare
        self._number = spare.pop() if spare else _Number(device)

    def __del__(self) -> None:
        if "_tensors" not in vars(self):
            self._spare.append(self._number)

    @property
    def numbers(self) -> list[int]:
        return [self._number.value]

    @functools.cached_property
    def _tensors(self) -> list[Tensor]:
        found: list[Tensor] = torch.ops.hf_lopt.fetch.default(any_on(self.device), self._number.value)
        return found

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: Any) -> Any:
        return self._tensors[place]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._tensors)


class Joined(Sequence[Tensor]):
    """Several lists one after the other, without making one of them."""

    def __init__(self, *parts: Sequence[Tensor]):
        self.parts = parts

    @functools.cached_property
    def _held(self) -> list[list[int]]:
        """Those of the lists at the beginning that are held: the library has them before those that are passed."""
        parts: tuple[Any, ...] = self.parts
        numbers = (x.numbers if type(x) in WITH_DTYPES else [] for x in parts)
        return list(itertools.takewhile(bool, numbers))

    @property
    def numbers(self) -> list[int]:
        return [number for (number,) in self._held]

    @property
    def rest(self) -> Sequence[Tensor]:
        return [x for part in self.parts[len(self._held) :] for x in part]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, place: Any) -> Any:
        return list(self)[place]

    def __iter__(self) -> Iterator[Tensor]:
        return itertools.chain.from_iterable(self.parts)


# By type itself: to ask whether something is an instance of an abstract class takes longer.
WITH_DTYPES = frozenset((HeldList, HeldResults))
HELD = frozenset((HeldList, HeldResults, Joined))
