"""Checkpoints of version 0.1.0, one per rule in ``checkpoints/``. They are never rewritten: what one of them holds has
to load, and to go on as it did, in every later version.

A file is what ``torch.save`` made of ``{"optimizer": state_dict(), "before": parameters, "after": parameters,
"machine": ..., "kernels": ...}``: the state and the parameters after three steps, the parameters after three more, and
where they were computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import frozen_kernels
import frozen_runs as runs
import hf_lopt


FOLDER = runs.FOLDER / "checkpoints"
MODEL = [((6,), torch.float32), ((9, 5), torch.float32), ((3, 4), torch.bfloat16), ((4, 3, 2, 2), torch.float32)]
BEFORE, AFTER = range(3), range(3, 6)
TOLERANCE = 1e-6


def train(optimizer: hf_lopt.LearnedOptimizer, params: Sequence[Tensor], steps: range) -> list[Tensor]:
    """Take steps; copies of the parameters after them."""
    for t in steps:
        for i, p in enumerate(params):
            p.grad = runs.numbers(p.shape, 6, t, i).to(p.dtype)
        optimizer.step(runs.loss_of(t))
    return [p.detach().clone() for p in params]


def resume(saved: dict[str, Any], rule: str) -> list[Tensor]:
    """The parameters after the checkpoint was loaded into a new optimizer and went on."""
    params = [nn.Parameter(p.clone()) for p in saved["before"]]
    optimizer = runs.make(rule, params, weights="bundled")
    optimizer.load_state_dict(saved["optimizer"])
    return train(optimizer, params, AFTER)


def write(rule: str, file: Path) -> None:
    """Make a new checkpoint.

    Raises:
        FileExistsError: if there is one.
    """
    if file.exists():
        raise FileExistsError(f"{file} is a checkpoint of 0.1.0, which is never rewritten")
    params = [nn.Parameter((0.3 * runs.numbers(shape, 5, i)).to(d)) for i, (shape, d) in enumerate(MODEL)]
    optimizer = runs.make(rule, params)
    before = train(optimizer, params, BEFORE)
    state = optimizer.state_dict()
    # Copies, as the optimizer goes on with its own tensors.
    state["state"] = {i: {key: x.clone() for key, x in one.items()} for i, one in state["state"].items()}
    state["param_groups"] = [
        {key: x.clone() if isinstance(x, Tensor) else x for key, x in group.items()} for group in state["param_groups"]
    ]
    after = train(optimizer, params, AFTER)
    kept = {"optimizer": state, "before": before, "after": after}
    torch.save(kept | {"machine": runs.machine(), "kernels": frozen_kernels.current()}, file)
