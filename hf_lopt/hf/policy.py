"""One place that decides a run: lr, schedule, floor, horizon and weight decay, each with its reason.

Trainer's defaults are AdamW's: a learning rate of 5e-5 that decays linearly. A rule with a schedule of its own needs
neither. What the user set stays; what was left at the default of its class is decided here, from the rule, the
weights and the model. Nothing is written into the ``TrainingArguments``, which serve other runs and optimizers too:
:mod:`hf_lopt.hf.group_settings` brings lr and settings into the parameter groups, :mod:`hf_lopt.hf.scheduler` makes
the scheduler, and :mod:`hf_lopt.hf.callback` sets the horizon and tells the user.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from hf_lopt.given_settings import least_multiplier
from hf_lopt.live_modules import pretrained_name
from hf_lopt.rules.base import Rule
from hf_lopt.weights import Weights


if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainingArguments

_CONSTANT = ("constant", "constant_with_warmup")

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


@dataclass
class RunPolicy:
    """What was decided for one run of one optimizer.

    Attributes:
        rule: name of the rule.
        named: whether ``args.optim`` names the rule, so that the arguments, ``optim_args`` included, are meant for it.
        lr: of the parameter groups; groups in a ratio to each other keep the ratio.
        default_lr: what ``lr`` would be if nobody had set it.
        schedule: the type of the scheduler. Where the user passes a scheduler, its class.
        settings: further settings of the groups that suit the weights and the model, by name.
        weight_decay: of the parameters that decay.
        lr_is_chosen: whether somebody chose the lr. Then it does not follow the length of the run.
        horizon: length of the run in optimizer steps; 0 until training begins, and for rules that need none.
        length_multiplier: what lr counts because of that length.
        new_layers: what lr counts of tensors that the checkpoint of a pretrained model lacks.
        conflicts: what the groups hold and should not, a sentence each.
    """

    rule: str
    named: bool
    lr: Choice[float]
    default_lr: Choice[float]
    schedule: Choice[str]
    settings: dict[str, Choice[float]]
    weight_decay: Choice[float]
    lr_is_chosen: bool = True
    horizon: Choice[int] = Choice(0)
    length_multiplier: Choice[float] = Choice(1.0)
    new_layers: Choice[float] = Choice(1.0)
    conflicts: list[str] = field(default_factory=list)

    def reasons(self) -> list[str]:
        """What there is to tell about the choices, in one order; conflicts apart."""
        choices: list[Choice[Any]] = [self.lr, self.new_layers, self.length_multiplier]
        choices += [*self.settings.values(), self.schedule, self.weight_decay]
        return [choice.reason for choice in choices if choice.reason]

    def summary(self) -> dict[str, float | str]:
        """What was used, by name, for reports."""
        values = {"lr": self.lr.value, "lr_scheduler_type": self.schedule.value}
        values |= {"weight_decay": self.weight_decay.value, "num_training_steps": self.horizon.value}
        values["length_multiplier"] = self.length_multiplier.value
        values |= {"new_layers": self.new_layers.value} if self.new_layers.value != 1.0 else {}
        return values | {key: choice.value for key, choice in self.settings.items()}


# ---- the model ------------------------------------------------------------------------------------------------------


def own_multiplier(rule: Rule, weights: Weights, model: nn.Module | None) -> Choice[float]:
    """The lr that ``rule`` wants by itself; the reason is why that is not the default of its class."""
    lr, name = rule.defaults["lr"], pretrained_name(model)
    if name is None:
        return Choice(lr)
    finetune_lr, _ = rule.fine_tuning(weights)
    reason = "steps for training from scratch wreck pretrained parameters"
    return Choice(finetune_lr, f"{reason} (this model: {name}); {lr:g} would be the value from scratch")


def own_settings(rule: Rule, weights: Weights, model: nn.Module | None) -> dict[str, Choice[float]]:
    """Settings that ``rule`` wants for this kind of model."""
    if pretrained_name(model) is None:
        return {}
    _, settings = rule.fine_tuning(weights)
    why = "which suits a pretrained model"
    return {key: Choice(value, f"{key} is {value:g}, {why}") for key, value in settings.items()}


# ---- the arguments --------------------------------------------------------------------------------------------------


def untouched(args: TrainingArguments, name: str) -> bool:
    """Whether the argument ``name`` has its class's default. TRL's defaults differ from transformers'."""
    return getattr(args, name) == type(args).__dataclass_fields__[name].default


def _choose_lr(
    args: TrainingArguments, rule: Rule, model: nn.Module | None, given: float | None, default: Choice[float]
) -> Choice[float]:
    """The lr: that of optim_args, that of the arguments, or the rule's own."""
    name = rule.class_name
    if given is not None:
        if untouched(args, "learning_rate") or args.learning_rate == given:
            return Choice(given)
        return Choice(given, f"learning_rate={args.learning_rate:g} gives way to lr={given:g} of optim_args")
    if not untouched(args, "learning_rate"):
        lr = args.learning_rate
        if 0 < lr < least_multiplier(rule, model):
            meant = f"which is meant for {default.value:g}"
            why = f"it multiplies {name}'s own step size, {meant}: training will hardly move"
            return Choice(lr, f"learning_rate={lr:g} is kept, but {why}")
        return Choice(lr)
    lr = default.value
    if lr == args.learning_rate:
        return Choice(lr)
    meaning = f"a multiplier of {name}'s own step size" if rule.own_schedule else f"what {name} is used with"
    said = f"learning_rate was not set ({args.learning_rate:g}): lr is {lr:g}, {meaning}"
    return Choice(lr, f"{said}, because {default.reason}" if default.reason else said)


def _choose_schedule(args: TrainingArguments, rule: Rule, schedule: str) -> Choice[str]:
    """The type of the scheduler that Trainer makes."""
    current = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if not rule.own_schedule:
        return Choice(current)
    if schedule == "keep" or not untouched(args, "lr_scheduler_type"):
        said = f"the {current} scheduler comes on top of {rule.class_name}'s own schedule"
        return Choice(current, "" if current in _CONSTANT else said)
    # Asked with a large number, a ratio of the steps counts as well.
    wanted = "constant_with_warmup" if args.get_warmup_steps(1_000_000) > 0 else "constant"
    if wanted == current:
        return Choice(wanted)
    why = f"{rule.class_name} decides the course of the step size itself"
    return Choice(wanted, f"lr_scheduler_type was not set ({current}): the scheduler is {wanted}, because {why}")


def schedule_of(scheduler: Any, rule: Rule) -> Choice[str]:
    """The schedule of a run whose scheduler is not of Trainer's making."""
    name = type(scheduler).__name__
    # The constant ones of transformers are LambdaLR, with functions that say so.
    constant = name == "ConstantLR" or "constant" in str(getattr(scheduler, "lr_lambdas", ""))
    silent = not rule.own_schedule or constant
    return Choice(name, "" if silent else f"the {name} comes on top of {rule.class_name}'s own schedule")


def _choose_weight_decay(args: TrainingArguments, rule: Rule) -> Choice[float]:
    """The decay of the parameters that decay."""
    default = rule.defaults["weight_decay"]
    if not untouched(args, "weight_decay") or args.weight_decay == default:
        return Choice(args.weight_decay)
    said = f"weight_decay was not set ({args.weight_decay:g}): it is {default:g}"
    return Choice(default, f"{said}, what {rule.class_name} is used with")


def choose_run(
    args: TrainingArguments,
    rule: Rule,
    weights: Weights,
    model: nn.Module | None,
    given: Mapping[str, Any],
    schedule: str = "auto",
    named: bool = True,
) -> RunPolicy:
    """Decide a run.

    Args:
        args: as the user made them; not changed.
        rule: the update rule.
        weights: of the rule.
        model: what is trained; None while it is not known, as for a subclass that asks Trainer for a class only.
        given: settings that the user chose for the optimizer, in ``optim_args`` or in its constructor.
        schedule: "auto", or "keep" for the arguments' scheduler.
        named: see :class:`RunPolicy`. Without it ``learning_rate`` and ``weight_decay`` are not asked.
    """
    default = own_multiplier(rule, weights, model)
    if named:
        lr = _choose_lr(args, rule, model, given.get("lr"), default)
        chosen = "lr" in given or not untouched(args, "learning_rate")
        weight_decay = _choose_weight_decay(args, rule)
    else:
        chosen = "lr" in given
        lr = Choice(given["lr"]) if chosen else _of_the_class(rule, default)
        weight_decay = Choice(given.get("weight_decay", rule.defaults["weight_decay"]))
    # New layers start from random numbers, as those of a model from scratch (benchmarks/new_layers.py).
    new_layers = Choice(rule.lr_of_new_layers / default.value if default.reason and not chosen else 1.0)
    settings = {key: choice for key, choice in own_settings(rule, weights, model).items() if key not in given}
    scheduler = _choose_schedule(args, rule, schedule)
    return RunPolicy(rule.name, named, lr, default, scheduler, settings, weight_decay, chosen, new_layers=new_layers)


def _of_the_class(rule: Rule, default: Choice[float]) -> Choice[float]:
    """The lr of an optimizer that was made without one."""
    if not default.reason:
        return default
    said = f"lr was not set ({rule.defaults['lr']:g}): it is {default.value:g}, because {default.reason}"
    return Choice(default.value, said)


def in_short(policy: RunPolicy) -> list[str]:
    """The choices without their reasons, as one text for a short warning."""
    lr, others = policy.lr, [f"{key}={choice.value:g}" for key, choice in policy.settings.items() if choice.reason]
    if lr.reason:
        others.insert(0, f"lr={lr.value:g}" + (" hardly moves" if "hardly move" in lr.reason else ""))
    if policy.new_layers.reason:
        others.insert(1, f"new layers {policy.lr.value * policy.new_layers.value:.3g}")
    if policy.length_multiplier.reason:
        others.append(f"length_multiplier={policy.length_multiplier.value:.3g}")
    others += [f"{policy.schedule.value} schedule"] if policy.schedule.reason else []
    others += [f"weight_decay={policy.weight_decay.value:g}"] if policy.weight_decay.reason else []
    return [f"optim={policy.rule}: {', '.join(others)}"] if others else []


def told(policy: RunPolicy, max_grad_norm: float | None) -> Iterator[str]:
    """The texts for the user: one for what was chosen, and one for what conflicts with it."""
    start = f"optim={policy.rule!r}"
    reasons = policy.reasons()
    if reasons:
        rest = "Whatever you set stays"
        rest += "; optim_args='lr=...,schedule=keep' overrides." if policy.named else "."
        if max_grad_norm:
            rest += f" max_grad_norm={max_grad_norm:g} still clips gradients before the optimizer sees them."
        yield f"{start}: {'; '.join(reasons)}. {rest}"
    if policy.conflicts:
        yield f"{start}: {'; '.join(policy.conflicts)}."
