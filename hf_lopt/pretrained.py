"""What a pretrained model is made of: tensors that were loaded, and layers that its checkpoint did not have.

``from_pretrained`` of transformers from 5 on marks what it has loaded, so that it does not initialise it again
(``_is_hf_initialized``). What has no mark, in a model that has some, starts from random numbers: the head for a new
task, most of the time. A pooler in front of a new head was trained for another head, or for none: it lies between
what is new and what was loaded. FSDP2 puts other tensors in the place of the marked ones, so what is found is kept for
the modules, which stay.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from hf_lopt.live_modules import models_of, pretrained_name
from hf_lopt.lr_scales import KEY
from hf_lopt.parameters import describe


_MARK = "_is_hf_initialized"
# More than this share of a model is no head: its tensors were replaced by others, which have no marks.
_LARGEST_SHARE = 0.5
_POOLER = "pooler"  # as encoders of transformers call it
# At 1 a MiniLM learns faster (benchmarks/new_layers.py), and is overconfident in its second epoch.
OF_POOLER = 0.5
_SAME = 1e-6  # relative: of an lr, and of a product that was made to be it
# Module -> name of each of its own parameters that are new -> how far.
_noted: WeakKeyDictionary[nn.Module, dict[str, float]] = WeakKeyDictionary()


class New(NamedTuple):
    """A tensor that is new.

    Attributes:
        name: as in ``named_parameters``.
        share: 1, or 0.5 of a pooler that was loaded.
    """

    name: str
    share: float


def note(model: nn.Module | None) -> None:
    """Remember which parameters of a model are new, while the marks are there."""
    if model is None or pretrained_name(model) is None:
        return
    for outermost in _loaded_models(model):
        new = _without_mark(outermost)
        for module in outermost.modules():
            own = {name: new[id(p)] for name, p in module.named_parameters(recurse=False) if id(p) in new}
            if own or module in _noted:
                _noted[module] = own


def new_tensors(model: nn.Module) -> dict[int, New]:
    """By id every parameter that is new, as the model has them now."""
    note(model)
    found = {}
    for path, module in model.named_modules():
        for name, share in _noted.get(module, {}).items():
            p = module._parameters.get(name)
            if p is not None:
                found[id(p)] = New(f"{path}.{name}" if path else name, share)
    return found


def set_scales(
    groups: Iterable[dict[str, Any]], new: Mapping[int, New], of_new: float, of_others: float = 1.0
) -> None:
    """Give every group its ``lr_scales``: one number for new tensors, one for the others, for poolers their geometric
    mean. ``new``: by id, see :func:`new_tensors`."""

    def number(p: Tensor) -> float:
        return _between(of_others, of_new, new[id(p)].share if id(p) in new else 0.0)

    for group in groups:
        group[KEY] = tuple(map(number, group["params"]))


def stretch(groups: Iterable[dict[str, Any]], of_loaded: float, known: Sequence[float], wanted: float) -> bool:
    """Give new tensors another lr, where theirs, that of their group times their number, is one that they got here.

    Args:
        of_loaded: the lr of what was loaded. Poolers lie between it and that of new tensors, as in :func:`set_scales`.
        known: lrs that new tensors may have.
        wanted: the lr that they get.

    Returns:
        whether anything changed: numbers that somebody else chose stay.
    """
    moves = [
        (_between(of_loaded, lr, share), _between(of_loaded, wanted, share))
        for lr, share in itertools.product(known, (1.0, OF_POOLER))
        if lr != wanted
    ]

    def moved(x: float, lr: float) -> float:
        return next((after / lr for before, after in moves if math.isclose(x * lr, before, rel_tol=_SAME)), x)

    changed = False
    for group in groups if moves else ():
        scales, lr = tuple(group.get(KEY, ())), float(group.get("initial_lr", group["lr"]))  # a warm-up begins at 0
        if lr and (after := tuple(moved(x, lr) for x in scales)) != scales:
            group[KEY], changed = after, True
    return changed


def _between(of_loaded: float, of_new: float, share: float) -> float:
    """Of a tensor that is new so far: 0 the one, 1 the other, 0.5 their geometric mean."""
    return of_new if share == 1.0 else of_loaded * (of_new / of_loaded) ** share


def model_of(params: Sequence[Tensor]) -> nn.Module | None:
    """The live model that owns most of ``params``, if it is a pretrained one and any of them were loaded with it.

    Cheap unless there are marks.
    """
    if not any(getattr(p, _MARK, False) for p in params):
        return None
    model = next(iter(models_of(params)), None)
    return None if pretrained_name(model) is None else model


def new_among(params: Sequence[Tensor], others: Sequence[Tensor]) -> Mapping[int, New] | None:
    """The new tensors of the pretrained model that ``params`` are of; None where they are of none.

    A head alone has no marks: there ``others`` of the same model tell.
    """
    model = model_of(params)
    if model is not None:
        return new_tensors(model)
    model = model_of([*others, *params])
    new = {} if model is None else new_tensors(model)
    return new if new and all(id(p) in new for p in params) else None


def _loaded_models(model: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules that were loaded by name and have marks."""
    if getattr(getattr(model, "config", None), "_name_or_path", None):
        if any(hasattr(p, _MARK) for p in model.parameters()):
            yield model
        return
    for child in model.children():
        yield from _loaded_models(child)


def _without_mark(model: nn.Module) -> dict[int, float]:
    """How far each new parameter is new, by its id.

    Embeddings count as loaded: they may have been resized, which makes other tensors.
    """
    params: list[Tensor] = list(model.parameters())
    new = {id(p): p.numel() for p in params if not getattr(p, _MARK, False)}
    if sum(new.values()) > _LARGEST_SHARE * sum(p.numel() for p in params):
        return {}
    if not any(p.requires_grad for p in params):
        return {}
    embeddings = {id(p.tensor) for p in describe(model) if p.role == "embedding"}
    found = dict.fromkeys(new.keys() - embeddings, 1.0)
    if found:
        poolers = (module for name, module in model.named_modules() if name.rpartition(".")[2] == _POOLER)
        found = {id(p): OF_POOLER for module in poolers for p in module.parameters()} | found
    return found
