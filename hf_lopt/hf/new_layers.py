"""Which tensors of a pretrained model its checkpoint did not have: the head for a new task, most of the time.

``from_pretrained`` of transformers from 5 on marks what it has loaded, so that it does not initialise it again
(``_is_hf_initialized``). What has no mark, in a model that has some, starts from random numbers. A pooler in front of
a new head counts as new, too: it was trained for another head, or for none. FSDP2 puts other tensors in the place of
the marked ones, so what is found is kept for the modules, which stay.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hf_lopt import distributed
from hf_lopt.hf.policy import Choice
from hf_lopt.live_modules import pretrained_name
from hf_lopt.lr_scales import KEY
from hf_lopt.parameters import describe


_MARK = "_is_hf_initialized"
# More than this share of a model is no head: its tensors were replaced by others, which have no marks.
_LARGEST_SHARE = 0.5
_POOLER = "pooler"  # as encoders of transformers call it
_NAMED = 4  # of new tensors in a text
# Module -> names of those of its own parameters that are new.
_noted: WeakKeyDictionary[nn.Module, frozenset[str]] = WeakKeyDictionary()


def note(model: nn.Module | None) -> None:
    """Remember which parameters of a model are new, while the marks are there."""
    if model is None or pretrained_name(model) is None:
        return
    for outermost in _loaded_models(model):
        new = _without_mark(outermost)
        for module in outermost.modules():
            own = frozenset(name for name, p in module.named_parameters(recurse=False) if id(p) in new)
            if own or module in _noted:
                _noted[module] = own


def noting(original: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """``original`` that makes a model, and :func:`note` of it."""

    @functools.wraps(original)
    def make(*args: Any, **kwargs: Any) -> nn.Module:
        model = original(*args, **kwargs)
        note(model)
        return model

    return make


def new_tensors(model: nn.Module) -> dict[int, str]:
    """id -> name of every parameter that is new, as the model has them now."""
    note(model)
    found = {}
    for path, module in model.named_modules():
        for name in _noted.get(module, ()):
            p = module._parameters.get(name)
            if p is not None:
                found[id(p)] = f"{path}.{name}" if path else name
    return found


def on_any_rank(model: nn.Module, params: Sequence[Tensor]) -> set[int]:
    """ids of those of ``params`` that are new on this rank or on another. A collective.

    Where FSDP loads on one rank only, the others mark everything as loaded.
    """
    found = new_tensors(model)
    flags = torch.tensor([float(id(p) in found) for p in params])
    if distributed.world_size() > 1:
        (flags,) = distributed.sum_over([(flags, distributed.world_groups(()))])
    return {id(p) for p, flag in zip(params, flags.tolist(), strict=True) if flag}


def set_scales(groups: Iterable[dict[str, Any]], new: Container[int], scale: float) -> None:
    """Give every group its numbers: ``scale`` for the tensors whose ids are in ``new``, 1 for the others."""
    for group in groups:
        group[KEY] = tuple(scale if id(p) in new else 1.0 for p in group["params"])


def choice(groups: Sequence[Mapping[str, Any]], model: nn.Module | None, lr: float) -> Choice[float]:
    """The largest of the numbers for single parameters in ``groups``, with the words for those that are not 1.

    Args:
        lr: what the numbers multiply.
    """
    pairs = [(p, x) for group in groups for p, x in zip(group["params"], group.get(KEY, ()), strict=False) if x != 1]
    if not pairs:
        return Choice(1.0)
    largest = max(x for _, x in pairs)
    names = {id(p): name for name, p in model.named_parameters()} if model is not None else {}
    some = ", ".join(names.get(id(p), "?") for p, _ in pairs[:_NAMED]) + (", …" if len(pairs) > _NAMED else "")
    what = f"new layers and their poolers, {len(pairs)} tensor{'s' * (len(pairs) > 1)} ({some})"
    return Choice(largest, f"{what}, take {lr * largest:g}, because they start from random numbers")


def _loaded_models(model: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules that were loaded by name and have marks."""
    if getattr(getattr(model, "config", None), "_name_or_path", None):
        if any(hasattr(p, _MARK) for p in model.parameters()):
            yield model
        return
    for child in model.children():
        yield from _loaded_models(child)


def _without_mark(model: nn.Module) -> set[int]:
    """ids of new parameters. Embeddings count as loaded: they may have been resized, which makes other tensors."""
    params: list[Tensor] = list(model.parameters())
    new = {id(p): p.numel() for p in params if not getattr(p, _MARK, False)}
    if sum(new.values()) > _LARGEST_SHARE * sum(p.numel() for p in params):
        return set()
    if not any(p.requires_grad for p in params):
        return set()
    embeddings = {id(p.tensor) for p in describe(model) if p.role == "embedding"}
    found = new.keys() - embeddings
    if found:
        poolers = (module for name, module in model.named_modules() if name.rpartition(".")[2] == _POOLER)
        found |= {id(p) for module in poolers for p in module.parameters()}
    return found
