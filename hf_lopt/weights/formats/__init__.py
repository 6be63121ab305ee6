"""The file formats in which learned optimizers are published, read and written.

Everything becomes a `Theta`: a dict from the tree path of the JAX reference (`rnn_params/linear/w`) to a float32 CPU
tensor, weights oriented (in, out). Nothing here executes code from a file: msgpack and safetensors are plain data, and
pickles are never opened. What is written is made in memory and returned as bytes; the same theta gives the same bytes.

A format of named tensors is one file here, with its reader and its writer, and one entry of `FORMATS`. Flax files and
safetensors files with theta paths carry the tree itself and need no entry.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from hf_lopt.weights.formats import celo2, flax, safetensors_file, small_fc, velo_split
from hf_lopt.weights.formats.format import Format
from hf_lopt.weights.formats.theta import Theta, content_sha256, flatten, some_of


__all__ = ["FORMATS", "Format", "Theta", "content_sha256", "flatten", "read", "write_published"]

THETA_STATE = "theta.state"
SAFETENSORS = "model.safetensors"
CONFIG = "config.json"
# Beside the weights: rule, origin, and what the format of the weights has no room for.
PROVENANCE = "hf_lopt.json"

FORMATS: tuple[Format, ...] = (velo_split.FORMAT, small_fc.FORMAT, celo2.FORMAT)


def read(files: Sequence[Path], *, bank_scale: float = 100.0) -> tuple[Theta, tuple[str, ...]]:
    """Read one set of meta-weights from `files` (several files together make one set).

    Args:
        files: existing files, `*.safetensors` or flax msgpack (any other name).
        bank_scale: the factor that the optimizer will put on the mean over its bank of networks. The two-folder VeLO
            format stores the bank for a factor of 100; it is rescaled so that bank_scale * bank is what it means.

    Returns:
        theta, and the leaves that this format cannot carry (the caller fills them).

    Raises:
        ValueError: a file is damaged, or it is in no known format. The message names the file.
    """
    where = " + ".join(str(f) for f in files)
    if len(files) == 1 and files[0].suffix != ".safetensors":
        return flax.read(files[0]), ()
    tensors: Theta = {}
    for file in files:
        for name, tensor in safetensors_file.read(file).items():
            if name in tensors:
                raise ValueError(
                    f"{where}: both files hold a tensor {name!r}, so they are not the two halves of one set."
                )
            tensors[name] = tensor
    if any("/" in name for name in tensors):
        return tensors, ()
    format_ = next((f for f in FORMATS if f.marks <= tensors.keys()), None)
    if format_ is None:
        names = ", ".join(f.name for f in FORMATS)
        raise ValueError(
            f"{where}: the tensors {some_of(tensors)} belong to no known format (flax theta.state, theta paths, "
            f"{names}). Convert the file to a mapping from theta path to array and pass that."
        )
    try:
        return format_.read(tensors, bank_scale), format_.absent
    except ValueError as error:
        raise ValueError(f"{where} ({format_.name}): {error}") from error


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
