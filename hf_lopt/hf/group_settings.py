"""Bring what was decided for a run into the parameter groups, by whatever door they came.

``Trainer(optim="velo")`` makes groups that fit from the start. A subclass that overrides ``create_optimizer``, an
optimizer that was passed in, groups with learning rates of their own: all of these were written for AdamW, and
nobody chose the 5e-5 that their groups hold. So, after the groups exist and before a scheduler or a checkpoint relies
on them, what nobody chose is set, and what somebody chose and conflicts is named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hf_lopt import lr_scales, pretrained
from hf_lopt.given_settings import least_multiplier
from hf_lopt.hf import new_layers
from hf_lopt.hf.arguments import BASE_WIDTH, OVERRIDES, optim_name, read_optim_args
from hf_lopt.hf.policy import Choice, RunPolicy, choose_run, own_multiplier, schedule_of, untouched
from hf_lopt.optimizer import LearnedOptimizer
from hf_lopt.param_groups import param_groups


if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainingArguments

# What the modules of a model tell about a tensor, see hf_lopt.param_groups.
_OF_THE_MODEL = ("axis_order", "branch", "step_scale")
# Times the lr for a pretrained model: more than that is the lr of training from scratch, or a part of it.
_TOO_LARGE = 5.0


def settle(optimizer: LearnedOptimizer, args: TrainingArguments, model: nn.Module | None, scheduler: Any) -> RunPolicy:
    """Decide the run of ``optimizer``, set its groups accordingly, and keep the decision as ``optimizer.run_policy``.

    Calling it again changes nothing more.

    Args:
        scheduler: that of the run, if there is one already. Then the groups stay as many as they are, and their lr is
            that of whoever made the scheduler.
    """
    rule = optimizer.rule
    named = optim_name(args) == rule.name
    if named:
        given, schedule = read_optim_args(rule, args.optim_args)
    else:
        given, schedule = _chosen_in_constructor(optimizer), "auto"
    for_groups = {key: given.pop(key) for key in (BASE_WIDTH, OVERRIDES) if key in given}
    policy = choose_run(args, rule, optimizer.weights, model, given, schedule, named)
    if scheduler is not None:
        policy.schedule = schedule_of(scheduler, rule)
    if scheduler is not None and optimizer._fine_tunes:
        optimizer._fine_tunes = ""  # the optimizer has decided by itself, and there are schedules that start from that
    else:
        optimizer._forget_fine_tuning()
        _settle_lr(optimizer, policy, args, model, free=scheduler is None and not optimizer.state_was_loaded)
    optimizer.lr_is_chosen, optimizer.is_fine_tuning = policy.lr_is_chosen, bool(policy.default_lr.reason)
    for key, choice in policy.settings.items():
        _settle_setting(optimizer, policy, key, choice.value)
    if model is not None and any(p.requires_grad for p in model.parameters()):
        _settle_by_model(optimizer, policy, model, for_groups, given, free=scheduler is None and not optimizer.state)
    _settle_new_layers(optimizer, policy, model, free=scheduler is None)
    optimizer.run_policy = policy
    return policy


def _chosen_in_constructor(optimizer: LearnedOptimizer) -> dict[str, Any]:
    """Settings that whoever made the optimizer gave it."""
    rule, defaults = optimizer.rule, optimizer.defaults
    keys = [key for key in rule.defaults if key not in ("weights", "num_training_steps")]
    chosen = {k for k in keys if k in optimizer.explicit_settings or defaults[k] != rule.defaults[k]}
    if optimizer.lr_is_chosen is False:  # hf_lopt.launch gives every optimizer that it makes an lr
        chosen -= {"lr"}
    return {key: defaults[key] for key in keys if key in chosen}


def _first_lr(group: Mapping[str, Any]) -> float:
    """The lr that schedules start from."""
    return float(group.get("initial_lr", group["lr"]))


def _settle_lr(
    optimizer: LearnedOptimizer, policy: RunPolicy, args: TrainingArguments, model: nn.Module | None, free: bool
) -> None:
    """Give the groups the lr that was decided, where theirs is a default; name what conflicts."""
    rule, groups, wanted = optimizer.rule, optimizer.param_groups, policy.lr.value
    lrs = [_first_lr(group) for group in groups]
    # lrs that nobody chose: the arguments' own, and those that Trainer's keywords or the class have by default.
    defaults = [args.learning_rate] if policy.named or untouched(args, "learning_rate") else []
    if policy.named:
        defaults += [own_multiplier(rule, optimizer.weights, m).value for m in (None, model)]
    elif "lr" not in optimizer.explicit_settings:
        defaults.append(rule.defaults["lr"])
    base = next((lr for lr in defaults if lr in lrs), wanted) if wanted not in lrs else wanted
    if base != wanted and free:
        for group, lr in zip(groups, lrs, strict=True):
            for key in {"lr", "initial_lr"} & group.keys():
                # Exactly the number that was decided, whatever the rounding.
                group[key] = wanted if lr == base else group[key] * (wanted / base)
        lrs = [_first_lr(group) for group in groups]
    if set(lrs) == {wanted}:
        decided = True
    elif wanted in lrs:
        decided = base != wanted
        text = ", ".join(f"group {i}: {lr:g}" for i, lr in enumerate(lrs))
        policy.lr = replace(policy.lr, reason=_and(policy.lr.reason, f"the groups keep their ratios ({text})"))
    else:
        decided, policy.lr, policy.lr_is_chosen = False, Choice(lrs[0]), True  # by somebody else
    if not (decided and policy.lr.reason):
        _name_lr(optimizer, policy, lrs, least_multiplier(rule, model), None if not policy.named else wanted)


def _and(text: str, more: str) -> str:
    return f"{text}; {more}" if text else more


def _name_lr(
    optimizer: LearnedOptimizer, policy: RunPolicy, lrs: list[float], least: float, chosen: float | None
) -> None:
    """Name groups whose lr hardly moves their parameters, or is for training from scratch on a pretrained model.

    ``chosen``: what the user set in arguments that are meant for this optimizer.
    """
    rule, default = optimizer.rule, policy.default_lr
    small = {i: lr for i, lr in enumerate(lrs) if 0 < lr < least}
    if small:
        policy.conflicts.append(
            f"{_groups('lr', small)}, but lr multiplies {rule.class_name}'s own step size and should be about "
            f"{default.value:g} here: training will hardly move"
        )
    most = _TOO_LARGE * default.value if default.reason else float("inf")
    large = {i: lr for i, lr in enumerate(lrs) if lr > most and lr != chosen}
    if large:
        policy.conflicts.append(f"{_groups('lr', large)}, but should be about {default.value:g}: {default.reason}")


def _groups(key: str, values: Mapping[int, Any]) -> str:
    """``group 0 has lr=1, group 2 has lr=0.5``."""
    return ", ".join(
        f"group {i} has {key}={value:g}" if isinstance(value, float) else f"group {i} has {key}={value}"
        for i, value in values.items()
    )


def _settle_setting(optimizer: LearnedOptimizer, policy: RunPolicy, key: str, value: float) -> None:
    """Set ``key`` in all groups that did not bring their own; name those that did and differ."""
    others = {}
    for i, group in enumerate(optimizer.param_groups):
        if key in optimizer.explicit_in_group(i) | optimizer.explicit_settings and group[key] not in (
            value,
            optimizer.rule.defaults[key],
        ):
            others[i] = group[key]
        else:
            group[key] = value
    if others:
        policy.conflicts.append(f"{_groups(key, others)}, {value:g} would suit this model")


def _settle_by_model(
    optimizer: LearnedOptimizer,
    policy: RunPolicy,
    model: nn.Module,
    for_groups: Mapping[str, Any],
    given: Mapping[str, Any],
    free: bool,
) -> None:
    """Set what the model tells about each tensor, in groups that do not. A group of several kinds is divided."""
    rule, groups = optimizer.rule, optimizer.param_groups
    explicit = [optimizer.explicit_in_group(i) for i in range(len(groups))]
    chosen = given.keys() | optimizer.explicit_settings
    per_group = [key for key in _OF_THE_MODEL if key in rule.per_group and key not in chosen]
    decays = _decay_is_open(optimizer, policy)
    per_group += ["weight_decay"] if decays else []
    missing = [[k for k in per_group if k not in names or (decays and k == "weight_decay")] for names in explicit]
    if optimizer.state_was_loaded or not any(missing):
        return
    facts = _facts(model, policy, rule.name, for_groups)
    divided, names, conflicts = [], [], {}
    for i, (group, keys) in enumerate(zip(groups, missing, strict=True)):
        parts: dict[tuple[Any, ...], dict[str, Any]] = {}
        for p in group["params"]:
            values = {key: facts.get(id(p), group).get(key, group[key]) for key in keys}
            part = parts.setdefault(tuple(values.values()), {**group, **values, "params": []})
            part["params"].append(p)
        divided += list(parts.values()) or [group]
        names += [explicit[i] | set(keys)] * max(len(parts), 1)
        differs = next((k for k in keys for part in parts.values() if part[k] != group[k]), None)
        if differs is not None:
            conflicts[i] = (differs, group[differs])
    if free:
        optimizer.replace_groups(divided, names)
    elif conflicts:
        texts = [f"group {i} has {key}={value} for all of its tensors" for i, (key, value) in conflicts.items()]
        policy.conflicts.append(
            f"{', '.join(texts)}, where the model tells them apart: make the groups with "
            f"hf_lopt.param_groups(model, {rule.name!r})"
        )


def _settle_new_layers(optimizer: LearnedOptimizer, policy: RunPolicy, model: nn.Module | None, free: bool) -> None:
    """Give tensors that the checkpoint lacks the lr of training from scratch, where nobody chose an lr.

    All groups have numbers then, be they 1: a sharded checkpoint fills what it finds.
    """
    groups, scale = optimizer.param_groups, policy.new_layers.value
    rates = {_first_lr(group) for group in groups}
    known = any(lr_scales.KEY in group for group in groups)
    if scale != 1.0 and free and not known and model is not None and rates == {policy.default_lr.value}:
        new = new_layers.on_any_rank(model, [p for group in groups for p in group["params"]])
        pretrained.set_scales(groups, new, scale)
    name_new_layers(optimizer, policy, model)


def name_new_layers(optimizer: LearnedOptimizer, policy: RunPolicy, model: nn.Module | None) -> None:
    """Keep in ``policy`` what the groups say about new layers, which a checkpoint may have changed."""
    groups = optimizer.param_groups
    explicit = any(lr_scales.KEY in optimizer.explicit_in_group(i) for i in range(len(groups)))
    policy.new_layers = Choice(1.0) if explicit else new_layers.choice(groups, model, policy.lr.value)


def _decay_is_open(optimizer: LearnedOptimizer, policy: RunPolicy) -> bool:
    """Whether all groups have a weight decay of 0 because the arguments do, where the rule has one of its own."""
    return bool(policy.weight_decay.reason) and all(group["weight_decay"] == 0 for group in optimizer.param_groups)


def _facts(model: nn.Module, policy: RunPolicy, rule: str, for_groups: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """id of a parameter -> what its model tells about it. ``for_groups``: base_width and overrides, where given."""
    found = param_groups(model, rule, weight_decay=policy.weight_decay.value, **for_groups)
    return {
        id(p): {key: value for key, value in group.items() if key != "params"}
        for group in found
        for p in group["params"]
    }
