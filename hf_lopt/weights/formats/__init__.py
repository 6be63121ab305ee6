"""The file formats in which learned optimizers are published, read and written.

Everything becomes a `Theta`: a dict from the tree path of the JAX reference (`rnn_params/linear/w`) to a float32 CPU
tensor, weights oriented (in, out). Nothing here executes code from a file: msgpack and safetensors are plain data, and
pickles are never opened. What is written is made in memory and returned as bytes; the same theta gives the same bytes.

A format of named tensors is one file here, with its reader and its writer, and one entry of `FORMATS`. Flax files and
safetensors files with theta paths carry the tree itself and need no entry.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from hf_lopt.weights.formats import celo2, flax, safetensors_file, small_fc, velo_split
from hf_lopt.weights.formats.format import Format
from hf_lopt.weights.formats.theta import Theta, content_sha256, flatten, some_of
from hf_lopt.weights.formats.velo_split import STORED_BANK_SCALE


__all__ = [
    "FORMATS",
    "STORED_BANK_SCALE",
    "Format",
    "Theta",
    "content_sha256",
    "flatten",
    "lacks_other_half",
    "read",
    "write_published",
]

THETA_STATE = "theta.state"
SAFETENSORS = "model.safetensors"
CONFIG = "config.json"
# Beside the weights: rule, origin, and what the format of the weights has no room for.
PROVENANCE = "hf_lopt.json"

FORMATS: tuple[Format, ...] = (velo_split.FORMAT, small_fc.FORMAT, celo2.FORMAT)


def read(contents: Mapping[Path, bytes], *, bank_scale: float = 100.0) -> tuple[Theta, Format | None]:
    """Read one set of meta-weights from the contents of its files (several files together make one set).

    Args:
        contents: of `*.safetensors` or flax msgpack files (any other name).
        bank_scale: the factor that the optimizer will put on the mean over its bank of networks. The two-folder VeLO
            format stores the bank for a factor of 100; it is rescaled so that bank_scale * bank is what it means.

    Returns:
        theta, and the format of named tensors, if it is one: some leaves may be absent in it, and the caller fills
        them.

    Raises:
        ValueError: a file is damaged, or it is in no known format. The message names the file.
    """
    where = " + ".join(map(str, contents))
    if len(contents) == 1:
        ((file, content),) = contents.items()
        if file.suffix != ".safetensors":
            return flax.read(file, content), None
    tensors: Theta = {}
    for file, content in contents.items():
        for name, tensor in safetensors_file.read(file, content).items():
            if name in tensors:
                raise ValueError(
                    f"{where}: both files hold a tensor {name!r}, so they are not the two halves of one set."
                )
            tensors[name] = tensor
    if any("/" in name for name in tensors):
        return tensors, None
    format_ = next((f for f in FORMATS if f.marks <= tensors.keys()), None)
    if format_ is None:
        names = ", ".join(f.name for f in FORMATS)
        raise ValueError(
            f"{where}: the tensors {some_of(tensors)} belong to no known format (flax theta.state, theta paths, "
            f"{names}). Convert the file to a mapping from theta path to array and pass that."
        )
    try:
        return format_.read(tensors, bank_scale), format_
    except ValueError as error:
        raise ValueError(f"{where} ({format_.name}): {error}") from error


def lacks_other_half(file: Path, content: bytes) -> bool:
    """Whether a file is one of the two files of a split network, without the other.

    Raises:
        ValueError: the file is damaged.
    """
    return file.suffix == ".safetensors" and velo_split.is_half(safetensors_file.read(file, content))


def write_published(
    theta: Mapping[str, torch.Tensor], *, bank_scale: float = 100.0
) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """Theta in the folder format of its architecture: relative path -> content, and the leaves that it cannot carry.

    Args:
        bank_scale: the factor that the optimizer puts on the mean over its bank; the two-folder VeLO format stores the
            bank for a factor of 100. Unless the two are equal, a value may change in its last bit.

    Raises:
        ValueError: no folder format fits; the message names those there are.
    """
    format_ = next((f for f in FORMATS if f.fits(theta)), None)
    if format_ is None:
        names = ", ".join(f.name for f in FORMATS)
        raise ValueError(
            f"the leaves {some_of(theta)} fit no published folder format ({names}). Use format='theta_state' or "
            "'safetensors', which hold any tree."
        )
    files = {}
    for folder, (tensors, config) in format_.write(theta, bank_scale).items():
        prefix = f"{folder}/" if folder else ""
        files[prefix + SAFETENSORS] = safetensors_file.write(tensors)
        files[prefix + CONFIG] = json.dumps(config, indent=2, sort_keys=True).encode()
    return files, format_.absent
