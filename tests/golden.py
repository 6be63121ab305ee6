"""Reads the reference trajectories in tests/golden, and replays them."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch


FOLDER = Path(__file__).parent / "golden"
# Reference files with published weights lie outside the repository, where there are any.
OUTSIDE = Path(__file__).resolve().parents[2] / "shared" / "golden"


@dataclass
class Golden:
    """A trajectory. Keys of ``raw`` are those of the file: p<t>/<name>, g<t>/<name>, s<t>/<key>, loss, f64/...."""

    names: list[str]
    steps: int
    num_steps: int
    loss: np.ndarray
    theta: dict[str, np.ndarray]
    raw: dict[str, np.ndarray]
    meta: dict

    def param(self, t: int, name: str) -> np.ndarray | None:
        return self.raw.get(f"p{t}/{name}")

    def grad(self, t: int, name: str) -> np.ndarray:
        return self.raw[f"g{t}/{name}"]

    def state(self, t: int) -> dict[str, np.ndarray]:
        prefix = f"s{t}/"
        return {key[len(prefix) :]: value for key, value in self.raw.items() if key.startswith(prefix)}


def find(name: str) -> Path | None:
    """The file, in the repository or else outside; None where it is in neither."""
    return next((folder / name for folder in (FOLDER, OUTSIDE) if (folder / name).is_file()), None)


def read(name: str) -> Golden:
    path = find(name)
    with np.load(path, allow_pickle=False) as archive:
        raw = dict(archive)
    meta = json.loads(str(raw["meta"]))
    return Golden(meta["names"], meta["steps"], int(raw["num_steps"]), raw["loss"], theta(name), raw, meta)


def theta(name: str) -> dict[str, np.ndarray]:
    """The weights of a trajectory alone: copies, because a file of hundreds of leaves takes long to read and is read
    once."""
    return {leaf: value.copy() for leaf, value in _theta(name).items()}


@functools.cache
def _theta(name: str) -> dict[str, np.ndarray]:
    with np.load(find(name), allow_pickle=False) as archive:
        source = json.loads(str(archive["meta"]))["theta"]
        if isinstance(source, dict):
            return _generate(source, archive)
        if source.startswith("same theta as "):
            return _theta(source.removeprefix("same theta as "))
        return {key[len("theta/") :]: archive[key] for key in archive.files if key.startswith("theta/")}


def _generate(recipe: dict, raw: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights that are too large to store: drawn again from their seed and compared with the stored sums."""
    rng = np.random.default_rng(recipe["seed"])
    theta = {}
    for leaf, shape, loc, scale in recipe["leaves"]:
        theta[leaf] = (loc + scale * rng.standard_normal(shape)).astype(np.float32)
        total, *first = raw[f"theta_check/{leaf}"]
        np.testing.assert_allclose(theta[leaf].sum(dtype=np.float64), total, rtol=1e-9, atol=1e-9, err_msg=leaf)
        assert theta[leaf].ravel()[: len(first)].tolist() == first[: theta[leaf].size], leaf
    return theta


def to_layout(x: np.ndarray, axis_order: str, leading: int = 0) -> np.ndarray:
    """An array of the files, whose axes are in JAX order, as a torch module would hold it; ``leading`` axes stay."""
    rank = x.ndim - leading
    if axis_order == "jax" or rank < 2:
        return x
    axes = [rank - 1, rank - 2, *range(rank - 2)]  # (*kernel, in, out) -> (out, in, *kernel)
    return np.ascontiguousarray(np.transpose(x, [*range(leading), *(leading + axis for axis in axes)]))


def from_layout(x: np.ndarray, axis_order: str) -> np.ndarray:
    if axis_order == "jax" or x.ndim < 2:
        return x
    return np.transpose(x, [*range(2, x.ndim), 1, 0])


def parameters(
    golden: Golden, axis_order: str, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[torch.nn.Parameter]:
    arrays = (to_layout(golden.raw[f"p0/{name}"], axis_order) for name in golden.names)
    return [torch.nn.Parameter(torch.tensor(x, dtype=dtype, device=device)) for x in arrays]


def set_gradients(golden: Golden, t: int, params: list[torch.nn.Parameter], axis_order: str) -> None:
    for p, name in zip(params, golden.names, strict=True):
        p.grad = torch.tensor(to_layout(golden.grad(t, name), axis_order), dtype=p.dtype, device=p.device)
