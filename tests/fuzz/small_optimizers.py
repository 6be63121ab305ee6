"""Small optimizers of every rule, their tensors, and what may be asked of these after any call."""

from __future__ import annotations

import copy
import io
import warnings
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from hf_lopt import LearnedOptimizer, rules


SHAPES: tuple[tuple[int, ...], ...] = (
    (6, 4),
    (4, 6),
    (6, 4),
    (5,),
    (24,),
    (),
    (3, 2, 2, 2),
    (1, 7),
    (2, 3, 4),
    (0, 3),
)
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16)
# Averages of squares, which no step can make negative.
SQUARES = ("second_moment", "factored_row", "factored_col", "factored_diag")


def parameters(random: Random, count: int, dtype: torch.dtype | None = None) -> list[nn.Parameter]:
    """A few parameters of one dtype, a random one unless it is given."""
    dtype = random.choice(DTYPES) if dtype is None else dtype
    generator = torch.Generator().manual_seed(random.randrange(1 << 32))
    shapes = [random.choice(SHAPES) for _ in range(count)]
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def settings(random: Random, name: str) -> dict[str, Any]:
    """Settings for the constructor of the rule ``name``."""
    defaults = rules.get(name).defaults
    found: dict[str, Any] = {"weights": "bundled", "weight_decay": random.choice((0.0, 0.0, 0.01))}
    if rules.get(name).needs_horizon:
        found["num_training_steps"] = random.choice((3, 20, 1000))
    choices: dict[str, tuple[Any, ...]] = {
        "max_training_steps": (0, 0, 10),
        "axis_order": ("torch", "torch", "jax"),
        "branch": ("auto", "auto", "network"),
        "max_nonfinite_steps": (10, 2),
        "min_param_scale": (0.0, 0.1),
    }
    return found | {key: random.choice(values) for key, values in choices.items() if key in defaults}


def groups_of(random: Random, params: list[nn.Parameter]) -> list[dict[str, Any]]:
    """The parameters in one group or in two, the second with a weight decay of its own."""
    cut = random.choice((0, 0, 1)) if len(params) > 1 else 0
    if not cut:
        return [{"params": params}]
    return [{"params": params[:cut]}, {"params": params[cut:], "weight_decay": 0.1}]


def give_gradients(random: Random, params: list[nn.Parameter]) -> None:
    """Every parameter gets a gradient."""
    generator = torch.Generator().manual_seed(random.randrange(1 << 32))
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def quiet_step(optimizer: LearnedOptimizer, *loss: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step(*loss)


def everything(params: list[nn.Parameter], optimizer: LearnedOptimizer) -> bytes:
    """Parameters and state dict, bit by bit."""
    buffer = io.BytesIO()
    torch.save(([p.detach() for p in params], optimizer.state_dict()), buffer)
    return buffer.getvalue()


def tensors(params: list[nn.Parameter], optimizer: LearnedOptimizer) -> dict[str, Tensor]:
    """Parameters, state and what belongs to the run, copied."""
    saved = optimizer.state_dict()
    found: dict[str, Any] = {f"parameter {i}": p.detach() for i, p in enumerate(params)}
    found |= {f"{key} of {i}": x for i, state in saved["state"].items() for key, x in state.items()}
    found |= {
        f"{key} of group {g}": x
        for g, group in enumerate(saved["param_groups"])
        for key, x in group.items()
        if isinstance(x, (Tensor, int, float))
    }
    return {key: copy.deepcopy(torch.as_tensor(x)) for key, x in found.items()}


def unsound(found: dict[str, Tensor]) -> str:
    """What in :func:`tensors` cannot be right whatever the gradients were, "" if nothing."""
    for key, x in found.items():
        # An update that takes several calls is skipped by the last of them.
        gathered = key.startswith(("gradient_sum", "accumulated_loss"))
        if x.is_floating_point() and not gathered and not torch.isfinite(x).all():
            return f"{key} is not finite"
        if key.startswith(SQUARES) and x.numel() and x.min() < 0:
            return f"{key} is negative"
    return ""
