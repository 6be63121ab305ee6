"""``optim="velo"`` in transformers: the names, the handlers, the callback, the loss.

transformers has no entry point for optimizers, so four of its tables are extended, and methods of its Trainer
(:mod:`hf_lopt.hf.scheduler` says why) and of Accelerate (:mod:`hf_lopt.hf.loss_feed`) are wrapped. All of it happens
when the module in question is imported, by the user or by another library; none of it changes what other optimizers
do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from enum import EnumMeta
from types import ModuleType
from typing import Any

from packaging.version import Version

from hf_lopt import notices
from hf_lopt.hf import lightning, loss_feed, momentum, provenance
from hf_lopt.hf.import_hook import when_imported
from hf_lopt.hf.scheduler import wrap_create_scheduler
from hf_lopt.hf.wrapping import wrap_once
from hf_lopt.optimizers import OPTIMIZERS


# Trainer divides the loss by the accumulation steps there, and so does the Accelerator that it builds.
_DIVIDES_TWICE = (Version("5.2.0"), Version("5.6.0"))


class _PlainText:
    """``__reduce_ex__`` of a member that pickles as text: training_args.bin has to open where hf_lopt is missing."""

    def __init__(self, value: str):
        self._value = value

    def __call__(self, protocol: int) -> tuple[type[str], tuple[str]]:
        return str, (self._value,)


def extend_enum(enum: EnumMeta, value: str) -> Any:
    """The member of the string enumeration ``enum`` with ``value``, made if there is none.

    The new member is a real one: lookups by value and name, iteration, ``isinstance`` and command-line choices include
    it.
    """
    if value in enum._value2member_map_:
        return enum._value2member_map_[value]
    name = value.upper()
    member = str.__new__(enum, value)
    member._name_, member._value_, member.__objclass__ = name, value, enum
    member._sort_order_ = len(enum._member_names_)
    member.__reduce_ex__ = _PlainText(value)
    type.__setattr__(enum, name, member)  # EnumMeta.__setattr__ guards members
    enum._member_names_.append(name)
    enum._member_map_[name] = enum._value2member_map_[value] = member
    return member


def _check_accumulation(args: Any) -> None:
    import transformers

    version = Version(transformers.__version__)
    if args.gradient_accumulation_steps > 1 and _DIVIDES_TWICE[0] <= version < _DIVIDES_TWICE[1]:
        notices.warn(
            f"transformers {version} divides gradients by gradient_accumulation_steps "
            f"({args.gradient_accumulation_steps}) twice, for every optimizer. 5.6 and later, and 5.1 and earlier, do "
            "it once: change the version, or set gradient_accumulation_steps=1.",
        )


def optimizer_handler(context: Any) -> tuple[Any, dict[str, Any]]:
    """Entry of transformers' table of optimizer handlers; ``context`` is its ``OptimizerContext``.

    Raises:
        ValueError: see :func:`hf_lopt.hf.arguments.optimizer_class_and_arguments`.
    """
    from hf_lopt.hf.arguments import optimizer_class_and_arguments

    _check_accumulation(context.args)
    return optimizer_class_and_arguments(context.args, context.model)


def _extend_names(module: Any) -> None:
    for name in OPTIMIZERS:
        extend_enum(module.OptimizerNames, name)


def _add_handlers(module: Any) -> None:
    for name in OPTIMIZERS:
        if module._OPTIMIZER_HANDLERS.setdefault(name, optimizer_handler) is not optimizer_handler:
            notices.warn(f"optim={name!r} is already taken in transformers; hf_lopt leaves it as it is")


def _with_rules(original: Callable[..., Any]) -> Callable[..., Any]:
    """transformers before 5.2 has no table of handlers, only this method with a long ``if``."""

    @functools.wraps(original)
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:
        from hf_lopt.hf.arguments import optim_name, optimizer_class_and_arguments

        if optim_name(args) in OPTIMIZERS:
            return optimizer_class_and_arguments(args, model)
        return original(args, model)

    return get_optimizer_cls_and_kwargs


def _with_parser(handlers: Mapping[str, Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """transformers parses ``optim_args`` before it asks one of the ``handlers``, and fails on what it cannot unpack.

    A learned optimizer reads the text itself, with errors that say what is wrong.
    """

    @functools.wraps(original)
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:
        from hf_lopt.hf.arguments import optim_name, parse_optim_args

        if handlers.get(optim_name(args)) is optimizer_handler:
            parse_optim_args(args.optim_args)
        return original(args, model)

    return get_optimizer_cls_and_kwargs


def _extend_trainer(module: Any) -> None:
    from hf_lopt.hf import new_layers
    from hf_lopt.hf.callback import LearnedOptimizerCallback

    handlers = getattr(module, "_OPTIMIZER_HANDLERS", None)
    choose = _with_rules if handlers is None else functools.partial(_with_parser, handlers)
    wrap_once(module.Trainer, "get_optimizer_cls_and_kwargs", choose)
    wrap_once(module.Trainer, "create_scheduler", wrap_create_scheduler)
    wrap_once(module.Trainer, "call_model_init", new_layers.noting)
    if LearnedOptimizerCallback not in module.DEFAULT_CALLBACKS:
        module.DEFAULT_CALLBACKS.append(LearnedOptimizerCallback)


def _never_breaking(action: Callable[[Any], None]) -> Callable[[ModuleType], None]:
    """``action`` whose failure is a warning: a version with other internals must not make its import fail."""

    @functools.wraps(action)
    def guarded(module: ModuleType) -> None:
        try:
            action(module)
        except Exception as error:
            notices.warn(
                f"hf_lopt could not attach to {module.__name__} ({type(error).__name__}: {error}): its optim= names "
                "and the delivery of losses do not work with these versions of transformers and accelerate. The "
                "optimizer classes do; give them their loss with observe_loss(loss).",
            )

    return guarded


_ACTIONS = tuple(
    (name, _never_breaking(action))
    for name, action in (
        ("transformers.training_args", _extend_names),
        ("transformers.trainer_optimizer", _add_handlers),
        ("transformers.trainer", _extend_trainer),
        ("transformers.modelcard", provenance.name_the_optimizer),
        ("torch.optim.lr_scheduler", momentum.name_the_argument),
        ("accelerate.accelerator", loss_feed.patch_accelerator),
        ("accelerate.optimizer", loss_feed.patch_optimizer),
        *lightning.PATCHES,
    )
)


def register() -> None:
    """Make every name of :func:`hf_lopt.available` an ``optim=`` choice of transformers; deliver losses in Accelerate.

    ``import hf_lopt`` calls it. It imports neither library: what is not imported yet is extended on import. Calling it
    again does nothing.
    """
    for name, action in _ACTIONS:
        when_imported(name, action)
