"""Files of named float tensors (`.safetensors`). A format says which names it uses; theta paths hold any theta."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_of
from safetensors.torch import save as safetensors_bytes

from hf_lopt.weights.formats.theta import Theta, as_float32
from hf_lopt.weights.reading import MAX_JSON_BYTES, parse_json


_MAX_TENSORS = 4096
_MAX_RANK = 8
_METADATA = "__metadata__"
# Name of a dtype -> bytes of an element.
_DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def read(file: Path, content: bytes) -> Theta:
    """Read named float tensors.

    Args:
        file: for messages.
        content: of the file. It is never mapped: a mapped file that is shortened kills the process.

    Raises:
        ValueError: the file is damaged, or holds anything but floating-point tensors.
    """
    try:
        _check_header(content)
        return {name: as_float32(name, tensor) for name, tensor in tensors_of(content).items()}
    except (SafetensorError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"{file}: damaged, or not a safetensors file of floating-point tensors: {error}. "
            "Download or copy it again, or use another file."
        ) from error


def _check_header(content: bytes) -> None:
    """The header within limits, and every byte of the data in exactly one tensor; ValueError otherwise.

    The library checks most of it too, but takes the last of two tensors of one name, and reads a header of any size.
    """
    size = int.from_bytes(content[:8], "little")
    if len(content) < 8 or size > min(MAX_JSON_BYTES, len(content) - 8):
        raise ValueError(f"the header would have {size} bytes of {len(content)}; at most {MAX_JSON_BYTES} are read")
    header = parse_json(content[8 : 8 + size])
    if not isinstance(header, dict):
        raise ValueError(f"the header is {type(header).__name__} instead of an object")
    header.pop(_METADATA, None)
    if len(header) > _MAX_TENSORS:
        raise ValueError(f"more than {_MAX_TENSORS} tensors")
    end = 0
    for first, last, name in sorted(_span(name, entry) + (name,) for name, entry in header.items()):
        if first != end:
            raise ValueError(f"the data of the tensor {name[:80]!r} begins at {first}; the one before ends at {end}")
        end = last
    if end != len(content) - 8 - size:
        raise ValueError(f"the tensors have {end} bytes, the file has {len(content) - 8 - size} of data")


def _span(name: str, entry: Any) -> tuple[int, int]:
    """First and last byte of the data of a tensor, if its entry of the header is right."""
    where = f"the tensor {name[:80]!r}"
    if not (isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}):
        raise ValueError(f"{where} is not stored as dtype, shape and data_offsets")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (isinstance(dtype, str) and dtype in _DTYPES):
        raise ValueError(f"{where} has dtype {str(dtype)[:40]!r}, which is not one of {', '.join(_DTYPES)}")
    if not (isinstance(shape, list) and len(shape) <= _MAX_RANK and all(type(n) is int and n > 0 for n in shape)):
        raise ValueError(f"{where} has a bad shape: {str(shape)[:80]}")
    if not (isinstance(span, list) and len(span) == 2 and all(type(n) is int and n >= 0 for n in span)):
        raise ValueError(f"{where} has bad offsets: {str(span)[:80]}")
    want = math.prod(shape) * _DTYPES[dtype]
    if span[1] - span[0] != want:
        raise ValueError(f"{where} needs {want} bytes for its shape and dtype, but has {span[1] - span[0]}")
    return span[0], span[1]


def write(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Named tensors as the content of a `.safetensors` file, float32; the same tensors give the same bytes."""
    return safetensors_bytes({name: as_float32(name, tensors[name]) for name in sorted(tensors)})
