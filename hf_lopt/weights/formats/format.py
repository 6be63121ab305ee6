"""What a published format of named tensors is, and what such formats have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hf_lopt.weights.formats.theta import Theta, some_of


# Subfolder ("" is the folder itself) -> the tensors of its file and the content of its configuration.
Folders = dict[str, tuple[Theta, dict[str, Any]]]


@dataclass(frozen=True)
class Format:
    """One format of named tensors, in both directions.

    Attributes:
        name: what the format is called in messages.
        marks: tensor names that identify it; all of them must be there.
        read: (tensors, bank_scale) -> theta; ValueError for tensors that are not as the format has them.
        fits: whether theta is of the architecture that the format was made for.
        write: (theta, bank_scale) -> folders; theta fits.
        absent: leaves of theta that the format cannot carry.
        scales: whether the bank is stored for a factor of its own, so that ``bank_scale`` changes what is read.
    """

    name: str
    marks: frozenset[str]
    read: Callable[[Theta, float], Theta]
    fits: Callable[[Mapping[str, torch.Tensor]], bool]
    write: Callable[[Mapping[str, torch.Tensor], float], Folders]
    absent: tuple[str, ...] = ()
    scales: bool = False


def from_names(tensors: Theta, leaves: Mapping[str, str]) -> Theta:
    """Theta from a table {tensor name: leaf}. Names that end in ".weight" are torch's (out, in) and are transposed.

    Raises:
        ValueError: for missing and unexpected tensors, and a weight that is no matrix.
    """
    require(tensors, leaves)
    return {
        leaf: transpose(name, tensors[name]).contiguous() if name.endswith(".weight") else tensors[name]
        for name, leaf in leaves.items()
    }


def transpose(name: str, weight: torch.Tensor) -> torch.Tensor:
    """A matrix, or a stack of matrices, with its last two axes exchanged; ValueError naming it for a vector."""
    if weight.ndim < 2:
        raise ValueError(f"the weight {name} has shape {tuple(weight.shape)}; a matrix is needed")
    return weight.mT


def require(tensors: Theta, names: Iterable[str], *, ignored: Iterable[str] = ()) -> None:
    """ValueError unless the tensors have the names ``names``; those in ``ignored`` may be there as well."""
    missing = sorted(set(names) - tensors.keys())
    extra = sorted(tensors.keys() - set(names) - set(ignored))
    if missing or extra:
        raise ValueError(
            f"missing tensors: {some_of(missing)}; unexpected tensors: {some_of(extra)}. "
            "The file is of another architecture than the published one, or incomplete."
        )


def to_names(theta: Mapping[str, torch.Tensor], leaves: Mapping[str, str]) -> Theta:
    """The inverse of `from_names`."""
    return {
        name: theta[leaf].mT.contiguous() if name.endswith(".weight") else theta[leaf] for name, leaf in leaves.items()
    }
