"""From ``TrainingArguments`` to the class and the keywords of a learned optimizer.

Trainer's defaults are AdamW's: a learning rate of 5e-5 that decays linearly. A rule with a schedule of its own needs
neither, so arguments left at their class's default become the rule's own multiplier and a constant schedule. Trainer
builds the scheduler, and every logger reads the arguments, after the optimizer has been made: changing them here is
enough, and shows everywhere.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from hf_lopt import rules
from hf_lopt.hf import limits
from hf_lopt.optimizer import PUBLIC_CLASSES, LearnedOptimizer
from hf_lopt.param_groups import param_groups
from hf_lopt.rules.base import Rule
from hf_lopt.weights import Weights


if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainingArguments

SCHEDULE = "schedule"
BASE_WIDTH = "base_width"
LOG_LAYERS = "log_layers"
_SCHEDULES = ("auto", "keep")
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
# What was written into the arguments, so that a later train() does not take it for the user's choice.
_WRITTEN = "_hf_lopt_written"
_HARDLY_MOVES = 1e-3
# The size that a relative step assumes for a tensor of an adapter at least. With embedded weights the step is then
# about that of AdamW at 6e-4; at 0.01, LoRA on a 135M language model learned a third as much in as many steps.
_ADAPTER_SCALE = 0.1

_T = TypeVar("_T")


@dataclass(frozen=True)
class Choice(Generic[_T]):
    """A value that was chosen, and the words for it.

    Attributes:
        value: what will be used.
        reason: what to tell the user about it; "" where there is nothing to tell. Nothing is decided by it.
    """

    value: _T
    reason: str = ""


def optim_name(args: TrainingArguments) -> str:
    """``args.optim`` as plain text."""
    return str(getattr(args.optim, "value", args.optim))


def parse_optim_args(text: str | None) -> dict[str, str]:
    """``"a=1, b=2"`` as a dict. Spaces within a value stay, so that a path may hold them.

    Raises:
        ValueError: for an item that is not ``key=value``, or a key given twice.
    """
    found: dict[str, str] = {}
    for item in text.split(",") if text and text.strip() else []:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not (key and equals and value):
            raise ValueError(f"optim_args must read key=value,key=value; got {item!r} in {text!r}")
        if key in found:
            raise ValueError(f"optim_args gives {key} twice: {text!r}")
        found[key] = value
    return found


def _boolean(key: str, text: str) -> bool:
    if text.lower() not in _BOOLEANS:
        raise ValueError(f"optim_args: {key} must be true or false, got {text!r}")
    return _BOOLEANS[text.lower()]


def wants_layers(text: str | None) -> bool:
    """Whether ``args.optim_args`` ask for numbers of every tensor in the logs.

    Raises:
        ValueError: for a value that is neither true nor false.
    """
    return _boolean(LOG_LAYERS, parse_optim_args(text).get(LOG_LAYERS, "false"))


def _convert(rule: Rule, key: str, value: str) -> Any:
    """``value`` in the type of the constructor argument's default."""
    default = 0.0 if key == BASE_WIDTH else rule.defaults[key]
    if isinstance(default, str):
        return value
    if isinstance(default, bool):
        return _boolean(key, value)
    if isinstance(default, float):
        kind, convert = "a number", float
    else:  # a default of None stands for a number of steps or units
        kind, convert = "a whole number", int
    try:
        return convert(value)
    except ValueError:
        raise ValueError(f"optim_args: {key} must be {kind}, got {value!r}") from None


def read_optim_args(rule: Rule, text: str | None) -> tuple[dict[str, Any], str]:
    """Keywords of ``rule`` and of its parameter groups from ``args.optim_args``; and the schedule, "auto" or "keep".

    Raises:
        ValueError: for an unknown key or a value of the wrong kind; the message names the valid ones.
    """
    given = parse_optim_args(text)
    schedule = given.pop(SCHEDULE, "auto")
    _boolean(LOG_LAYERS, given.pop(LOG_LAYERS, "false"))
    if schedule not in _SCHEDULES:
        raise ValueError(f"optim_args: {SCHEDULE} must be one of {', '.join(_SCHEDULES)}, got {schedule!r}")
    if "weight_decay" in given:
        raise ValueError(
            "optim_args: weight_decay is set by TrainingArguments(weight_decay=...), which leaves biases and norms out"
        )
    valid = [key for key in rule.defaults if key != "weight_decay"]
    valid += [BASE_WIDTH] if "step_scale" in rule.per_group else []
    unknown = [key for key in given if key not in valid]
    if unknown:
        valid += [SCHEDULE, LOG_LAYERS]
        raise ValueError(f"optim_args: {rule.name} takes no {', '.join(unknown)}; it takes {', '.join(valid)}")
    return {key: _convert(rule, key, value) for key, value in given.items()}, schedule


def has_adapters(model: nn.Module | None) -> bool:
    """Whether ``model`` trains PEFT adapters, which start from random numbers and zeros on top of frozen weights."""
    modules = [] if model is None else model.modules()
    return any(getattr(m, "peft_config", None) or getattr(m, "_hf_peft_config_loaded", False) for m in modules)


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


def own_multiplier(rule: Rule, weights: Weights, model: nn.Module | None) -> Choice[float]:
    """The lr that ``rule`` wants by itself; the reason is why that is not the default of its class."""
    lr = rule.defaults["lr"]
    name = pretrained_name(model)
    if weights.finetune_lr is None or name is None:
        return Choice(lr)
    reason = "the embedded weights take steps for training from scratch, which wreck pretrained parameters"
    return Choice(weights.finetune_lr, f"{reason} (this model: {name}); {lr:g} would be the value from scratch")


def own_settings(rule: Rule, weights: Weights, model: nn.Module | None) -> dict[str, Choice[float]]:
    """Settings that embedded weights want for this kind of model."""
    if weights.finetune_lr is not None and pretrained_name(model) is not None:
        settings, why = weights.finetune_settings, "which suits embedded weights on a pretrained model"
    elif weights.origin == "bundled" and "min_param_scale" in rule.defaults and has_adapters(model):
        settings = {"min_param_scale": _ADAPTER_SCALE}
        why = "because adapters start with matrices of zeros, to whose size the step is relative"
    else:
        return {}
    return {key: Choice(value, f"{key} is {value:g}, {why}") for key, value in settings.items()}


def _untouched(args: TrainingArguments, field: str) -> bool:
    """Whether ``field`` has its class's default or what was written here. TRL's defaults differ from transformers'."""
    value = getattr(args, field)
    return value == type(args).__dataclass_fields__[field].default or value == getattr(args, _WRITTEN, {}).get(field)


def _choose_lr(args: TrainingArguments, rule: Rule, given: float | None, default: Choice[float]) -> Choice[float]:
    """The lr: that of optim_args, that of the arguments, or the rule's own."""
    name = rule.class_name
    if given is not None:
        written = getattr(args, _WRITTEN, {}).get("learning_rate")
        if _untouched(args, "learning_rate") or args.learning_rate in (given, written):
            return Choice(given)
        return Choice(given, f"learning_rate={args.learning_rate:g} gave way to lr={given:g} of optim_args")
    if not _untouched(args, "learning_rate"):
        lr = args.learning_rate
        if rule.own_schedule and 0 < lr < _HARDLY_MOVES and not hasattr(args, _WRITTEN):  # once
            meant = f"which is meant for {default.value:g}"
            why = f"it multiplies {name}'s own step size, {meant}: training will hardly move"
            return Choice(lr, f"learning_rate={lr:g} is kept, but {why}")
        return Choice(lr)
    lr = default.value
    if lr == args.learning_rate:
        return Choice(lr)
    meaning = f"a multiplier of {name}'s own step size" if rule.own_schedule else f"what {name} is used with"
    said = f"learning_rate was not set ({args.learning_rate:g}) and is now {lr:g}, {meaning}"
    return Choice(lr, f"{said}, because {default.reason}" if default.reason else said)


def _choose_schedule(args: TrainingArguments, rule: Rule, schedule: str) -> Choice[str]:
    """The scheduler type."""
    current = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if not rule.own_schedule or schedule == "keep" or not _untouched(args, "lr_scheduler_type"):
        return Choice(current)
    # Asked with a large number, a ratio of the steps counts as well.
    wanted = "constant_with_warmup" if args.get_warmup_steps(1_000_000) > 0 else "constant"
    if wanted == current:
        return Choice(wanted)
    why = f"{rule.class_name} decides the course of the step size itself"
    return Choice(wanted, f"lr_scheduler_type was not set ({current}) and is now {wanted}, because {why}")


def _choose_weight_decay(args: TrainingArguments, rule: Rule) -> Choice[float]:
    """The decay of the parameters that decay."""
    default = rule.defaults["weight_decay"]
    if not _untouched(args, "weight_decay") or args.weight_decay == default:
        return Choice(args.weight_decay)
    said = f"weight_decay was not set ({args.weight_decay:g}) and is now {default:g}"
    return Choice(default, f"{said}, what {rule.class_name} is used with")


def _tell(args: TrainingArguments, rule: Rule, choices: Iterable[Choice[Any]]) -> None:
    said = [choice.reason for choice in choices if choice.reason]
    if not said or not getattr(args, "should_log", True):  # one process speaks for all
        return
    rest = "Whatever you set stays; optim_args='lr=...,schedule=keep' overrides."
    if args.max_grad_norm:
        rest += f" max_grad_norm={args.max_grad_norm:g} still clips gradients before the optimizer sees them."
    warnings.warn(f"optim={rule.name!r}: {'; '.join(said)}. {rest}", stacklevel=4)


def optimizer_class_and_arguments(
    args: TrainingArguments, model: nn.Module | None
) -> tuple[type[LearnedOptimizer], dict[str, Any]]:
    """The optimizer that ``args.optim`` names, as Trainer wants it.

    A class and keywords. Their "params" are groups that know the model (:mod:`hf_lopt.param_groups`), which Trainer
    takes instead of its own two; weight decay is split in the same way. Writes the chosen ``learning_rate``,
    ``lr_scheduler_type`` and ``weight_decay`` into ``args``.

    Raises:
        ValueError: for optim_args that the rule does not take, and for ways of training that
            :mod:`hf_lopt.hf.limits` refuses.
    """
    rule = rules.get(optim_name(args))
    limits.check_arguments(rule.class_name, args)
    given, schedule = read_optim_args(rule, args.optim_args)
    base_width = given.pop(BASE_WIDTH, None)
    spec = given.pop("weights", rule.defaults["weights"])
    weights = rule.load_weights(spec, **(dict(rule.defaults) | given))

    lr = _choose_lr(args, rule, given.pop("lr", None), own_multiplier(rule, weights, model))
    settings = {key: choice for key, choice in own_settings(rule, weights, model).items() if key not in given}
    given |= {key: choice.value for key, choice in settings.items()}
    scheduler = _choose_schedule(args, rule, schedule)
    weight_decay = _choose_weight_decay(args, rule)
    _tell(args, rule, [lr, *settings.values(), scheduler, weight_decay])
    written = {"learning_rate": lr.value, "lr_scheduler_type": type(args.lr_scheduler_type)(scheduler.value)}
    written["weight_decay"] = weight_decay.value
    changed = {field: value for field, value in written.items() if getattr(args, field) != value}
    # A value written before may be replaced too, for another model or other weights.
    setattr(args, _WRITTEN, getattr(args, _WRITTEN, {}) | changed)
    for field, value in changed.items():
        setattr(args, field, value)
    keywords = {**given, "lr": lr.value, "weights": weights}
    if model is not None:
        per_group = {key: given[key] for key in rule.per_group if key in given}
        keywords["params"] = param_groups(
            model, rule.name, weight_decay=weight_decay.value, base_width=base_width, **per_group
        )
    return PUBLIC_CLASSES[rule.name], keywords
