"""Which living modules own some tensors, and where those come from: an optimizer is given no more than tensors."""

from __future__ import annotations

import gc
from collections.abc import Iterable

from torch import Tensor, nn


def models_of(params: Iterable[Tensor]) -> list[nn.Module]:
    """The outermost live modules that own any of ``params``, the one with most of them first.

    Modules that Python's garbage collector does not list (``gc.freeze``) are not found.
    """
    wanted = {id(p) for p in params}
    # type(), because asking a lazy module or a dead weak proxy for its class has effects; a set, because there are
    # many objects.
    classes = _with_subclasses(nn.Module)
    modules = [x for x in gc.get_objects() if type(x) in classes and "_modules" in vars(x)]
    children = {id(child) for module in modules for child in vars(module)["_modules"].values()}
    owned = [
        (sum(id(p) in wanted for p in module.parameters()), i)
        for i, module in enumerate(modules)
        if id(module) not in children
    ]
    return [modules[i] for count, i in sorted(owned, reverse=True) if count]


def _with_subclasses(cls: type) -> set[type]:
    found, todo = {cls}, [cls]
    while todo:
        new = set(type.__subclasses__(todo.pop())) - found
        found |= new
        todo += new
    return found


def has_adapters(model: nn.Module | None) -> bool:
    """Whether ``model`` trains PEFT adapters, which start from random numbers and zeros on top of frozen weights."""
    modules = [] if model is None else model.modules()
    return any(getattr(m, "peft_config", None) or getattr(m, "_hf_peft_config_loaded", False) for m in modules)


def trains_adapters(params: Iterable[Tensor]) -> bool:
    """Whether the model that owns most of ``params`` has adapters."""
    return has_adapters(next(iter(models_of(params)), None))


def pretrained_name(model: nn.Module | None) -> str | None:
    """The checkpoint that ``model`` was loaded from; None for training from scratch, and of adapters.

    ``from_pretrained`` leaves its argument in ``config._name_or_path``. Submodules count, as in sentence-transformers
    or under DDP. A random model built from a *configuration* that was loaded by name cannot be told apart.
    """
    if has_adapters(model):
        return None
    modules = [] if model is None else model.modules()
    names = (getattr(getattr(m, "config", None), "_name_or_path", None) for m in modules)
    return next((str(name) for name in names if name), None)
