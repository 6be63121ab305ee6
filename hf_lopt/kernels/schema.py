"""Types of operator arguments, and the schema that PyTorch needs, made from the fields of a dataclass."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor

from hf_lopt.kernels.held import HeldResults


class SchemaType(NamedTuple):
    """How an argument is written in an operator's schema."""

    name: str
    written: bool = False  # the operator changes it in place


Tensors = Annotated[Sequence[Tensor], SchemaType("Tensor[]")]
WrittenTensors = Annotated[Sequence[Tensor], SchemaType("Tensor[]", written=True)]
OneTensor = Annotated[Tensor, SchemaType("Tensor")]
WrittenTensor = Annotated[Tensor, SchemaType("Tensor", written=True)]
MaybeTensor = Annotated[Tensor | None, SchemaType("Tensor?")]
Names = Annotated[Sequence[str], SchemaType("str[]")]
Integers = Annotated[Sequence[int], SchemaType("int[]")]
Integer = Annotated[int, SchemaType("int")]
Numbers = Annotated[Sequence[float], SchemaType("float[]")]
Number = Annotated[float, SchemaType("float")]
MaybeNumber = Annotated[float | None, SchemaType("float?")]
Flag = Annotated[bool, SchemaType("bool")]
ScalarType = Annotated[torch.dtype, SchemaType("ScalarType")]


@dataclass(frozen=True)
class Arguments:
    """Base of the arguments of one operator.

    Attributes:
        OPERATOR: the operator's name.
        RETURNS: its results, as in a schema.
        DEVICE_OF: the field, a tensor or a list of them, that tells the device.
        HOLDS: whether lists may be held by the library (:mod:`hf_lopt.kernels.held`): the operator then takes a tensor
            by which the dispatcher knows the device, and the numbers of these lists (``csrc/held_lists.h``).
    """

    OPERATOR: ClassVar[str]
    RETURNS: ClassVar[str]
    DEVICE_OF: ClassVar[str]
    HOLDS: ClassVar[bool] = False

    @property
    def device(self) -> torch.device:
        found = getattr(self, self.DEVICE_OF)
        return (found if isinstance(found, Tensor) or type(found) is HeldResults else found[0]).device

    @classmethod
    @functools.cache
    def schema(cls) -> str:
        """The schema as PyTorch reads it; arguments that are changed carry a mark, ``(a!)`` for the first."""
        marks = iter("abcdefgh")
        fields = []
        hints: dict[str, Any] = get_type_hints(cls, include_extras=True)
        for name in (field.name for field in dataclasses.fields(cls)):
            kind: SchemaType = get_args(hints[name])[1]
            base, rest = kind.name[:6], kind.name[6:]
            fields.append(f"{base}({next(marks)}!){rest} {name}" if kind.written else f"{kind.name} {name}")
        fields += ["Tensor? like=None", "int[] held=[]"] if cls.HOLDS else []
        return f"({', '.join(fields)}) -> {cls.RETURNS}"
