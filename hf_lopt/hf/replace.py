"""``--replace AdamW=velo``: a learned optimizer wherever a script constructs a class of another one.

A raw loop names its optimizer in code, so there is no argument to change. While the script runs, constructing the
named class gives the learned optimizer instead, under whatever name and however early the script has imported it: all
of it goes through ``Optimizer.__new__`` (:mod:`hf_lopt.hf.constructor`). The script's parameter groups and weight
decay are taken over. Its learning rate, betas and epsilon belong to the class that it named and are not.

A rule that decides the course of its own step size gets a constant lr: schedulers built on it become
:class:`hf_lopt.hf.schedules.ConstantSchedule`. What the script told them of the length of the run is its horizon.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim import Optimizer

from hf_lopt import pretrained, rules
from hf_lopt.hf import constructor, new_layers, schedules
from hf_lopt.hf.arguments import OVERRIDES, read_optim_args
from hf_lopt.hf.import_hook import when_imported
from hf_lopt.hf.loss_feed import unwrap
from hf_lopt.hf.messages import say
from hf_lopt.hf.policy import own_multiplier, own_settings
from hf_lopt.live_modules import models_of
from hf_lopt.optimizer import LearnedOptimizer
from hf_lopt.optimizers import OPTIMIZERS
from hf_lopt.param_groups import branch_of, overridden
from hf_lopt.parameters import describe
from hf_lopt.rules.base import Rule


# What bitsandbytes, torchao and others call a class of the same arguments: AdamW8bit, PagedAdamW32bit, AdamWFp8.
_VARIANT = r"(?:Paged)?{}(?:\d+bit|Fp8)?"
_TAKEN = ("params", "lr", "weight_decay")
# A larger share of every parameter, taken in each step, is told: AdamW's at lr 1e-3 and weight decay 0.1 is 1e-4.
_STRONG_DECAY = 2e-4


@dataclass
class Options:
    """What the command line says.

    Attributes:
        replacements: name of a class -> ``optim=`` name.
        steps: length of the run in optimizer steps; None: what the script's scheduler is told.
        lr: of the learned optimizer; None: its own.
        optim_args: as in ``TrainingArguments``.
    """

    replacements: dict[str, str] = field(default_factory=dict)
    steps: int | None = None
    lr: float | None = None
    optim_args: str | None = None

    def add(self, text: str) -> None:
        """Read ``AdamW=velo``.

        Raises:
            ValueError: for another form, an unknown optimizer, and a class that cannot be found.
        """
        name, equals, optim = text.partition("=")
        if not (name and equals and optim):
            raise ValueError(f"--replace reads CLASS=OPTIMIZER, such as AdamW=velo; got {text!r}")
        if optim not in OPTIMIZERS:
            raise ValueError(f"--replace {text}: no optimizer {optim!r}; there are {', '.join(sorted(OPTIMIZERS))}")
        _check_class(name)
        self.replacements[name.rpartition(".")[2]] = optim

    def check(self) -> None:
        """See that every rule takes the ``optim_args``.

        Raises:
            ValueError: if one does not.
        """
        for optim in self.replacements.values():
            read_optim_args(rules.get(optim), self.optim_args)


def _check_class(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    known = sorted(
        key for key, value in vars(torch.optim).items() if isinstance(value, type) and issubclass(value, Optimizer)
    )
    if not module:
        if any(re.fullmatch(_VARIANT.format(key), name) for key in known):
            return
        raise ValueError(
            f"--replace {name}=...: torch.optim has no {name}. It has {', '.join(known)}; of each, variants such as "
            "AdamW8bit count too. For a class of another library give its module: lion_pytorch.Lion=..."
        )
    try:
        found = getattr(import_module(module), attribute, None)
    except ImportError as error:
        raise ValueError(f"--replace {name}=...: {error}") from None
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise ValueError(f"--replace {name}=...: {module} has no optimizer class {attribute}")


@dataclass
class Script:
    """What a script's call of the class that it named says.

    Attributes:
        name: of the class.
        groups: parameter groups with params, and lr and weight_decay where the script sets them.
        lr: the base learning rate; None where the class has none.
        weight_decay: None unless the script gives one.
        ignored: names of arguments that the script gives and no learned optimizer takes.
    """

    name: str
    groups: list[dict[str, Any]]
    lr: float | None
    weight_decay: float | None
    ignored: list[str]

    @staticmethod
    def read(cls: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Script:
        """From the arguments of ``cls``, in whatever order the class has them."""
        signature = inspect.signature(cls.__init__)
        itself, first, *_ = signature.parameters
        given = dict(signature.bind(None, *args, **kwargs).arguments)
        for name, parameter in signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                given |= given.pop(name, {})
        default = signature.parameters["lr"].default if "lr" in signature.parameters else None
        params = list(given[first])
        in_groups = bool(params) and isinstance(params[0], dict)
        groups: list[dict[str, Any]] = [dict(x) for x in params] if in_groups else [{"params": params}]
        for group in groups:
            tensors = group["params"]
            tensors = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
            # torch takes (name, parameter) too.
            group["params"] = [x[1] if isinstance(x, tuple) else x for x in tensors]
        ignored = [key for key in given if key not in (itself, first, *_TAKEN)]
        ignored += [key for group in groups for key in group if key not in (*_TAKEN, "name", "group_name")]
        lr = given.get("lr", default)
        lr = float(lr) if isinstance(lr, (int, float, torch.Tensor)) else None
        return Script(cls.__name__, groups, lr, given.get("weight_decay"), list(dict.fromkeys(ignored)))

    def relative_lr(self, group: Mapping[str, Any]) -> float:
        """The group's learning rate in units of the base one."""
        return float(group["lr"]) / self.lr if self.lr and "lr" in group else 1.0


def learned_groups(
    script: Script,
    rule: Rule,
    model: nn.Module | None,
    lr: float,
    given: Mapping[str, Any],
    overrides: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """The script's groups, each divided by what ``model`` says of axes and branches; with lr and weight decay."""
    found = {id(p.tensor): p for p in describe(model)} if model is not None else {}
    chosen = overridden(rule, list(found.values()), overrides)
    groups = []
    for group in script.groups:
        own = {"lr": lr * script.relative_lr(group)}
        if "weight_decay" in group:
            own["weight_decay"] = group["weight_decay"]
        parts: dict[tuple[str, ...], dict[str, Any]] = {}
        for p in group["params"]:
            known: dict[str, str] = {}
            if id(p) in found and "axis_order" in rule.per_group and "axis_order" not in given:
                known["axis_order"] = found[id(p)].axis_order
            if id(p) in found and rule.defaults.get("branch") == "auto" and "branch" not in given:
                known["branch"] = branch_of(found[id(p)])
            if id(p) in found and found[id(p)].name in chosen:
                known["branch"] = chosen[found[id(p)].name]
            parts.setdefault(tuple(known.values()), {"params": [], **own, **known})["params"].append(p)
        groups += parts.values()
    return groups


class Replacer:
    """While entered, constructing one of the named classes gives a learned optimizer."""

    def __init__(self, options: Options):
        self.options = options
        self.runs: WeakKeyDictionary[LearnedOptimizer, schedules.Run] = WeakKeyDictionary()
        self._replaced: list[schedules.Run] = []
        self._others: set[str] = set()
        self._schedules = schedules.Patches(self.run_of)

    def run_of(self, optimizer: Any) -> schedules.Run | None:
        """What is kept about an optimizer, or one in a wrapper, that took the place of another."""
        learned = unwrap(optimizer)
        return None if learned is None else self.runs.get(learned)

    def optim_name(self, cls: type) -> str | None:
        """The learned optimizer for ``cls``, if it is to be replaced."""
        matching = (x for x in self.options.replacements.items() if re.fullmatch(_VARIANT.format(x[0]), cls.__name__))
        return next((optim for _, optim in matching), None)

    def new(self, cls: type, *args: Any, **kwargs: Any) -> Any:
        """``Optimizer.__new__`` while this is entered."""
        if not (args or kwargs) or issubclass(cls, LearnedOptimizer):  # copying and unpickling give no arguments
            return object.__new__(cls)
        optim = self.optim_name(cls)
        if optim is not None:
            # Not an instance of cls, so Python does not call cls.__init__ on it.
            return self.construct(cls, rules.get(optim), args, kwargs)
        if not any(isinstance(x, Optimizer) for x in (*args, *kwargs.values())):  # wrappers
            self._others.add(cls.__name__)
        return object.__new__(cls)

    def __enter__(self) -> Replacer:
        constructor.intercept(Optimizer, self.new)
        self._schedules.apply()
        when_imported("accelerate.optimizer", self._watch_accelerate)
        return self

    def __exit__(self, *exception: Any) -> None:
        constructor.release(Optimizer)
        self._schedules.remove()
        if exception[0] is None or exception[0] is SystemExit:
            self._conclude()

    def _watch_accelerate(self, module: Any) -> None:
        """accelerator.backward delivers the loss of an optimizer that Accelerate has wrapped."""
        original = module.AcceleratedOptimizer.__init__

        def init(wrapper: Any, *args: Any, **kwargs: Any) -> None:
            original(wrapper, *args, **kwargs)
            run = self.run_of(wrapper)
            if run is not None:
                run.stop_feeding()

        self._schedules.restore(module.AcceleratedOptimizer, "__init__", original)
        module.AcceleratedOptimizer.__init__ = init

    def construct(self, cls: type, rule: Rule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> LearnedOptimizer:
        """The optimizer of ``rule`` for what ``cls`` was given; says in one line what was decided."""
        script = Script.read(cls, args, kwargs)
        given, schedule = read_optim_args(rule, self.options.optim_args)
        overrides = given.pop(OVERRIDES, None)
        given = {key: value for key, value in given.items() if key != "base_width"}
        params = [p for group in script.groups for p in group["params"]]
        model = next(iter(models_of(params)), None)
        spec = given.pop("weights", rule.defaults["weights"])
        weights = rule.load_weights(spec, **(dict(rule.defaults) | given))
        multiplier = own_multiplier(rule, weights, model)
        lr, why = given.pop("lr", None), "as given"
        lr = self.options.lr if self.options.lr is not None else lr
        lr_is_chosen = lr is not None
        scale = rule.lr_of_new_layers / multiplier.value if lr is None else 1.0  # of new layers
        if lr is None:
            lr, why = multiplier.value, multiplier.reason or f"{rule.class_name}'s own"
        given = {key: choice.value for key, choice in own_settings(rule, weights, model).items()} | given
        if script.weight_decay is not None:
            given["weight_decay"] = script.weight_decay
        if rule.needs_horizon and self.options.steps is not None:
            given["num_training_steps"] = self.options.steps

        groups = learned_groups(script, rule, model, lr, given, overrides)
        optimizer = OPTIMIZERS[rule.name](groups, lr=lr, weights=weights, **given)
        optimizer.lr_is_chosen, optimizer.is_fine_tuning = lr_is_chosen, bool(multiplier.reason)
        optimizer._checks_length = True
        if scale != 1.0 and model is not None and {group["lr"] for group in groups} == {lr}:
            pretrained.set_scales(optimizer.param_groups, pretrained.new_tensors(model), scale)
            why = "; ".join(filter(None, (why, new_layers.choice(optimizer.param_groups, model, lr).reason)))
        constant = rule.own_schedule and schedule == "auto"
        run = schedules.Run(script.name, rule, lr, script.lr, constant, [g["lr"] for g in optimizer.param_groups])
        if rule.needs_loss:
            run.feed(optimizer)
        self.runs[optimizer] = run
        self._replaced.append(run)
        optimizer.register_step_pre_hook(run.before_step)
        self._tell(script, rule, lr, why, constant, optimizer)
        return optimizer

    def _tell(self, script: Script, rule: Rule, lr: float, why: str, constant: bool, optimizer: Optimizer) -> None:
        parts = [f"{script.name} is {rule.class_name}, lr {lr:g} ({why}) in place of {script.lr or 0:g}"]
        parts.append("constant, whatever scheduler the script builds" if constant else "times the script's schedule")
        decay = max(group["weight_decay"] for group in optimizer.param_groups)
        parts.append(f"weight_decay {decay:g}")
        if decay * lr > _STRONG_DECAY:
            before = decay * (script.lr or 0)
            parts[-1] += f" (in each step {decay * lr:.2g} of a parameter; of {script.name}'s it was {before:.2g})"
        if script.ignored:
            parts.append(f"ignored: {', '.join(script.ignored)}")
        say("; ".join(parts))

    def _conclude(self) -> None:
        wanted = ", ".join(self.options.replacements)
        if not self._replaced:
            others = f" It constructed {', '.join(sorted(self._others))}." if self._others else ""
            say(f"the script constructed no {wanted}, so nothing was replaced.{others}")
        for run in self._replaced:
            if run.length_mismatch:
                say(run.length_mismatch)
