"""Files of named float tensors (`.safetensors`). A format says which names it uses; theta paths hold any theta."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes

from hf_lopt.weights.formats.theta import Theta, as_float32


def read(file: Path) -> Theta:
    """Read named float tensors; ValueError naming the file when it is damaged."""
    try:
        return {name: as_float32(name, tensor) for name, tensor in load_file(file).items()}
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"{file}: damaged, or not a safetensors file of floating-point tensors: {error}. "
            "Download or copy it again, or use another file."
        ) from error


def write(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Named tensors as the content of a `.safetensors` file, float32; the same tensors give the same bytes."""
    return safetensors_bytes({name: as_float32(name, tensors[name]) for name in sorted(tensors)})
