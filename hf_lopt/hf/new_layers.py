"""New layers of a pretrained model under Trainer: found before anything is sharded, agreed on by all ranks, told."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_lopt import distributed
from hf_lopt.hf.policy import Choice
from hf_lopt.lr_scales import KEY
from hf_lopt.pretrained import OF_POOLER, New, new_tensors, note


_NAMED = 4  # of new tensors in a text


def noting(original: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """``original`` that makes a model, and :func:`note` of it."""

    @functools.wraps(original)
    def make(*args: Any, **kwargs: Any) -> nn.Module:
        model = original(*args, **kwargs)
        note(model)
        return model

    return make


def on_any_rank(model: nn.Module, params: Sequence[Tensor]) -> dict[int, New]:
    """By id those of ``params`` that are new on this rank or on another. A collective.

    Where FSDP loads on one rank only, the others mark everything as loaded.
    """
    found = new_tensors(model)
    if distributed.world_size() == 1:
        return found
    here = [found[id(p)].share if id(p) in found else 0.0 for p in params]
    flags = torch.tensor([[share == 1.0, 0.0 < share < 1.0] for share in here], dtype=torch.float32)
    (flags,) = distributed.sum_over([(flags, distributed.world_groups(()))])
    shares = [1.0 if whole else OF_POOLER if part else 0.0 for whole, part in flags.tolist()]
    names = {id(p): name for name, p in model.named_parameters()}
    return {id(p): New(names.get(id(p), ""), share) for p, share in zip(params, shares, strict=True) if share}


def choice(groups: Sequence[Mapping[str, Any]], model: nn.Module | None, lr: float) -> Choice[float]:
    """What the lr of new layers is in units of that of the others, by the ``lr_scales`` of ``groups``; with the words.

    Args:
        lr: of the others.
    """
    pairs = [pair for group in groups for pair in zip(group["params"], group.get(KEY, ()), strict=False)]
    least = min((x for _, x in pairs), default=0.0)
    pairs = [(p, x / least) for p, x in pairs if x > least > 0.0]
    if not pairs:
        return Choice(1.0)
    largest = max(x for _, x in pairs)
    names = {id(p): name for name, p in model.named_parameters()} if model is not None else {}
    some = ", ".join(names.get(id(p), "?") for p, _ in pairs[:_NAMED]) + (", …" if len(pairs) > _NAMED else "")
    what = f"new layers and their poolers, {len(pairs)} tensor{'s' * (len(pairs) > 1)} ({some})"
    return Choice(largest, f"{what}, take up to {lr * largest:.3g}, because they start from random numbers")
