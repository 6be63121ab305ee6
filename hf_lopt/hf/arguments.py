"""From ``TrainingArguments`` to the class and the keywords of a learned optimizer."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from hf_lopt import rules
from hf_lopt.hf import limits
from hf_lopt.hf.policy import choose_run
from hf_lopt.optimizer import LearnedOptimizer
from hf_lopt.optimizers import OPTIMIZERS
from hf_lopt.param_groups import param_groups
from hf_lopt.rules.base import Rule


if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainingArguments

SCHEDULE = "schedule"
BASE_WIDTH = "base_width"
OVERRIDES = "overrides"
# branch:PATTERN=adam is an item of the overrides of hf_lopt.param_groups.
_BRANCH = "branch:"
LOG_LAYERS = "log_layers"
_LEFT_OPEN = "min_param_scale"  # a number, or "auto" for the default of None
_SCHEDULES = ("auto", "keep")
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def optim_name(args: TrainingArguments) -> str:
    """``args.optim`` as plain text."""
    return str(getattr(args.optim, "value", args.optim))


def parse_optim_args(text: str | None) -> dict[str, str]:
    """``"a=1, b=2"`` as a dict. Spaces within a value stay, so that a path may hold them, and a path's equals signs.

    Raises:
        ValueError: for an item that is not ``key=value``, or a key given twice.
    """
    found: dict[str, str] = {}
    for item in text.split(",") if text and text.strip() else []:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not (key and equals and value):
            raise ValueError(f"optim_args must read key=value,key=value; got {item!r} in {text!r}")
        if "=" in value and not _is_path(value):
            raise ValueError(f"optim_args: a comma is missing in {item!r}; it must read key=value,key=value")
        if key in found:
            raise ValueError(f"optim_args gives {key} twice: {text!r}")
        found[key] = value
    return found


def _is_path(value: str) -> bool:
    """Whether a value with an equals sign is a path such as ``/runs/lr=3/velo``, and not two items."""
    return re.match(r"[^=]*[/\\]", value) is not None and re.search(r"\s\w+\s*=", value) is None


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
    default = 0.0 if key in (BASE_WIDTH, _LEFT_OPEN) else rule.defaults[key]
    if key == _LEFT_OPEN and value == "auto":
        return None
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

    ``base_width`` and ``overrides`` among them are of :func:`hf_lopt.param_groups`; the latter is a dict, of the items
    ``branch:PATTERN=BRANCH`` in their order. A pattern may hold neither a comma nor an equals sign.

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
    overrides = {key: given.pop(key) for key in list(given) if key.startswith(_BRANCH) and "branch" in rule.per_group}
    unknown = [key for key in given if key not in valid]
    if unknown:
        valid += [SCHEDULE, LOG_LAYERS, *([f"{_BRANCH}PATTERN"] if "branch" in rule.per_group else [])]
        raise ValueError(f"optim_args: {rule.name} takes no {', '.join(unknown)}; it takes {', '.join(valid)}")
    keywords = {key: _convert(rule, key, value) for key, value in given.items()}
    if overrides:
        keywords[OVERRIDES] = {key.removeprefix(_BRANCH): branch for key, branch in overrides.items()}
    return keywords, schedule


class OptimizerKeywords(dict[str, Any]):
    """Keywords for the class of an optimizer, and the parameter groups under "params", where Trainer looks for them.

    Trainer takes "params" out before it calls the class. A subclass that makes its own groups calls
    ``cls(groups, **keywords)`` with all that it got, as it may with AdamW. So "params" can be asked for and taken out,
    and is no item of its own: unpacking leaves it out.
    """

    def __init__(self, keywords: dict[str, Any], params: list[dict[str, Any]] | None):
        super().__init__(keywords)
        self._params = params

    def __contains__(self, key: object) -> bool:
        return (key == "params" and self._params is not None) or super().__contains__(key)

    def __missing__(self, key: str) -> Any:
        if key in self:
            return self._params
        raise KeyError(key)

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default

    def pop(self, key: str, *default: Any) -> Any:
        if key != "params" or self._params is None:
            return super().pop(key, *default)
        params, self._params = self._params, None
        return params


def optimizer_class_and_arguments(
    args: TrainingArguments, model: nn.Module | None
) -> tuple[type[LearnedOptimizer], dict[str, Any]]:
    """The optimizer that ``args.optim`` names, as Trainer wants it.

    A class and keywords. Their "params" are groups that know the model (:mod:`hf_lopt.param_groups`), which Trainer
    takes instead of its own two; weight decay is split in the same way. Without a model there are none.

    Raises:
        ValueError: for optim_args that the rule does not take, and for ways of training that
            :mod:`hf_lopt.hf.limits` refuses.
    """
    rule = rules.get(optim_name(args))
    limits.check_arguments(rule.class_name, args)
    given, schedule = read_optim_args(rule, args.optim_args)
    base_width, overrides = given.pop(BASE_WIDTH, None), given.pop(OVERRIDES, None)
    spec = given.pop("weights", rule.defaults["weights"])
    weights = rule.load_weights(spec, **(dict(rule.defaults) | given))
    policy = choose_run(args, rule, weights, model, given, schedule)
    given |= {key: choice.value for key, choice in policy.settings.items()}
    groups = None
    if model is not None:
        per_group = {key: given[key] for key in rule.per_group if key in given}
        decay = policy.weight_decay.value
        groups = param_groups(
            model, rule.name, weight_decay=decay, base_width=base_width, overrides=overrides, **per_group
        )
    return OPTIMIZERS[rule.name], OptimizerKeywords({**given, "lr": policy.lr.value, "weights": weights}, groups)
