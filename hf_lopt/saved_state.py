"""Whether a state dict fits an optimizer, found out before anything of the optimizer is changed.

A checkpoint is an input like any other: of another model, edited, or damaged on the way. Operators read as many
numbers as a parameter has, and a NaN in a momentum reaches the parameter in the next step, so what is loaded is
compared with what the rule would have made: keys, shapes, dtypes, placements, values.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor

from hf_lopt import distributed, lr_scales
from hf_lopt.rules.base import Rule
from hf_lopt.settings import MOST_STEPS, STORAGE, check_settings
from hf_lopt.state_formats import saved_format
from hf_lopt.step.networks import Theta


# How many differences an error lists.
_LISTED = 10
# Averages of squares.
_NON_NEGATIVE = frozenset(
    (
        *("second_moment", "momentum_scales", "second_moment_scales"),
        *("factored_row", "factored_col", "factored_diag", "min_param_scale"),
    )
)
# Kept per parameter where one update takes several calls of step().
_GRADIENT_SUM, _GRADIENTS_SUMMED = "gradient_sum", "gradients_summed"
# Kept where a group leaves it to the optimizer. Checkpoints from before that have a number in every group.
_OWN_FLOOR = "min_param_scale"
# What such an update has so far. With a number in it that is not finite it is skipped as a whole and forgotten, so a
# checkpoint from the middle of it is as good as any other.
_GATHERED = (_GRADIENT_SUM, "accumulated_loss")
# Settings that rules have not always had: an older state dict lacks them, and leaves them as they are.
_LATER = frozenset(("precision", *STORAGE))
# What a new optimizer does not have yet: of sharded tensors torch hands it to the rank that reads the file, and the
# others must not decide otherwise.
_OF_ONE_RANK = frozenset(("more_for_new_layers", "num_epochs"))
_WAY_OUT = (
    "Nothing was loaded. Load the checkpoint that belongs to this model, these parameter groups and these settings, "
    "or start without the optimizer's state."
)

_OTHER_ROUTES = (
    "Its tensors may have been sent elsewhere by an earlier version: hf_lopt.param_groups(model, rule, "
    "overrides={pattern: branch}), or optim_args='branch:PATTERN=BRANCH' under Trainer, gives a tensor the branch "
    "that it had, and python -m hf_lopt --groups MODEL prints those of today."
)


def checked_groups(state_dict: Any) -> Sequence[Mapping[str, Any]]:
    """The groups of a state dict, whatever it is the state of, if it is one at all.

    Raises:
        ValueError: if it has not the form of ``torch.optim.Optimizer.state_dict``.
    """
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        _refuse_form(f"got {_describe(state_dict)}")
    state, groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(state, Mapping):
        _refuse_form(f"its state is {_describe(state)}")
    if not isinstance(groups, (list, tuple)):
        _refuse_form(f"its param_groups are {_describe(groups)}")
    seen: set[Any] = set()
    for g, group in enumerate(groups):
        ids = group.get("params") if isinstance(group, Mapping) else None
        if not isinstance(ids, (list, tuple)) or not all(isinstance(i, (int, str)) for i in ids):
            _refuse_form(f"its group {g} has no list of parameters")
        twice = next((i for k, i in enumerate(ids) if i in seen or i in ids[:k]), None)
        if twice is not None:
            _refuse_form(f"its groups list the parameter {twice!r} twice")
        seen.update(ids)
    for i, values in state.items():
        if not isinstance(values, Mapping):
            _refuse_form(f"its state of the parameter {i!r} is {_describe(values)}")
    return groups


def _refuse_form(problem: str) -> NoReturn:
    raise ValueError(f"this is not the state dict of an optimizer: {problem}. {_WAY_OUT}")


@dataclass
class _Values:
    """Numbers of saved tensors that are still to be looked at, all together: an accelerator is waited for once.

    One pass over memory without temporaries per tensor: what is NaN or infinite shows in the extremes.
    """

    names: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    extremes: list[Tensor] = field(default_factory=list)

    def add(self, name: str, key: str, values: Tensor) -> None:
        """``values`` (…) of the state ``key``, in any format."""
        self.names.append(name)
        self.keys.append(key)
        self.extremes += [x.float() for x in torch.aminmax(values.detach())]

    def differences(self) -> Iterable[str]:
        """What is wrong with the numbers of the tensors that were added."""
        by_device: dict[torch.device, list[int]] = {}
        for place, extreme in enumerate(self.extremes):
            by_device.setdefault(extreme.device, []).append(place)
        found = [0.0] * len(self.extremes)
        for places in by_device.values():
            for place, value in zip(places, torch.stack([self.extremes[k] for k in places]).tolist(), strict=True):
                found[place] = value
        for name, key, low, high in zip(self.names, self.keys, found[::2], found[1::2], strict=True):
            if not (math.isfinite(low) and math.isfinite(high)):
                yield f"{name}: has values that are NaN or infinite"
            elif key in _NON_NEGATIVE and low < 0.0:
                yield f"{name}: averages of squares cannot be negative, got {low:.3g}"


def check_saved_state(
    rule: Rule,
    theta: Theta,
    groups: Sequence[Mapping[str, Any]],
    run_values: Mapping[str, Any],
    state_dict: Mapping[str, Any],
) -> None:
    """Compare a state dict with the optimizer that is to take it.

    Args:
        rule: the optimizer's rule; that the state dict has the form of one and is of the same rule has been checked.
        theta: its weights.
        groups: its ``param_groups``.
        run_values: the values of a run that has not begun: counters and tensors of the run, by name.
        state_dict: of ``torch.optim.Optimizer.state_dict``.

    Raises:
        ValueError: listing what differs, up to ten things, with the way out.
    """
    differences: list[str] = []
    saved_groups, saved = state_dict["param_groups"], state_dict["state"]
    if len(saved_groups) != len(groups):
        differences.append(
            f"parameter groups: got {len(saved_groups)}, this optimizer has {len(groups)} "
            f"(got {_routes(rule, saved_groups)}; this has {_routes(rule, groups)})"
        )
    known: set[Any] = set()
    values = _Values()
    wanted = functools.cache(functools.partial(_wanted_of_words, rule, theta))
    for g, (ours, theirs) in enumerate(zip(groups, saved_groups, strict=False)):
        differences += _group_differences(rule, f"group {g}", ours, theirs, run_values)
        differences += _other_run(f"group {g}", saved_groups[0], theirs, run_values)
        params, ids = ours["params"], theirs["params"]
        known |= set(ids)
        if len(params) != len(ids):
            differences.append(f"group {g}: got {len(ids)} parameters, this optimizer has {len(params)}")
        for i, p in zip(ids, params, strict=False):
            name = f"parameter {i} of shape {tuple(p.shape)}"
            differences += _state_differences(rule, wanted, name, p, theirs, saved.get(i, {}), values, bool(saved))
    differences += values.differences()
    differences += [f"state of parameter {i!r}, which is in no group" for i in saved if i not in known]
    if differences:
        more = len(differences) - _LISTED
        listed = "; ".join(differences[:_LISTED]) + (f"; and {more} more" if more > 0 else "")
        way_out = _WAY_OUT
        if _routes(rule, saved_groups) != _routes(rule, groups):
            way_out = f"{way_out} {_OTHER_ROUTES}"
        raise ValueError(f"the state dict does not fit this {rule.class_name}: {listed}. {way_out}")


def _group_differences(
    rule: Rule, name: str, ours: Mapping[str, Any], theirs: Mapping[str, Any], run_values: Mapping[str, Any]
) -> Iterable[str]:
    """What is wrong with the settings and the run of one group."""
    missing = [
        key for key in ours if key not in theirs and key in {*rule.defaults, *run_values} - {"weights", *_LATER}
    ]
    if missing:
        yield f"{name} lacks {', '.join(missing)}"
    try:
        check_settings({key: _number(value) for key, value in theirs.items() if key in rule.defaults})
    except ValueError as error:
        yield f"{name}: {error}"
    if text := lr_scales.problem(theirs):
        yield f"{name}: {text}"
    if rule.needs_horizon and not _is_count(theirs.get("num_training_steps", 0)):
        yield f"{name}: num_training_steps must be a whole number >= 0, got {theirs['num_training_steps']!r:.40}"
    for key in ("length_multiplier", "more_for_new_layers", "num_epochs"):
        number = theirs.get(key, 1.0)  # old checkpoints have none
        if not isinstance(number, (int, float)) or not (math.isfinite(number) and number >= 0.0):
            yield f"{name}: {key} must be a finite number >= 0, got {number!r}"
    for key, wanted in run_values.items():
        if key in theirs:
            yield from _run_differences(f"{name}, {key}", wanted, theirs[key], key in _GATHERED)


def _other_run(
    name: str, first: Mapping[str, Any], group: Mapping[str, Any], run_values: Mapping[str, Any]
) -> Iterable[str]:
    """What of the run has one value in the first group and another in this one."""
    for key in (*run_values, "num_training_steps"):
        a, b = first.get(key), group.get(key)
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if (
                a.shape == b.shape
                and a.dtype == b.dtype
                and not torch.equal(a.nan_to_num(), b.to(a.device).nan_to_num())
            ):
                yield f"{name}, {key}: is not that of group 0"
        elif isinstance(a, (int, float)) and isinstance(b, (int, float)) and a != b:
            yield f"{name}, {key}: got {b!r}, group 0 has {a!r}"


def _run_differences(name: str, wanted: Any, got: Any, any_number: bool) -> Iterable[str]:
    """What is wrong with a value of the run: a number of calls, a counter, or a tensor of the rule.

    ``any_number``: whether it may be one that is not finite.
    """
    if not isinstance(wanted, Tensor):
        if not _is_count(got):
            yield f"{name}: got {got!r}, wanted a whole number >= 0"
        return
    if not isinstance(got, Tensor) or got.shape != wanted.shape or got.dtype != wanted.dtype:
        yield f"{name}: got {_describe(got)}, wanted {_describe(wanted)}"
    elif not wanted.is_floating_point():
        if int(got) < 0:
            yield f"{name}: got {int(got)}, wanted a count >= 0"
    elif not any_number and not torch.isfinite(got).all():
        yield f"{name}: has values that are NaN or infinite"


def _state_differences(
    rule: Rule,
    wanted_of: Callable[..., dict[str, Tensor]],
    name: str,
    p: Tensor,
    group: Mapping[str, Any],
    saved: Mapping[str, Any],
    values: _Values,
    any_state: bool,
) -> Iterable[str]:
    """What is wrong with the state of one parameter, but for its numbers, which ``values`` takes.

    ``any_state``: the state dict has state of some parameter.
    """
    try:
        words = {name: group[name] for name in rule.words if name not in STORAGE}
        wanted = wanted_of(tuple(p.shape), p.dtype, **words, state_dtype=saved_format(saved))
    except (ValueError, TypeError, KeyError) as error:  # a group's axis order or branch that means nothing
        yield f"{name}: {error}"
        return
    if not saved:
        if any_state and p.numel() and p.requires_grad:
            yield f"{name}: no state"
        return
    optional = {_GRADIENT_SUM, _GRADIENTS_SUMMED} if "max_training_steps" in rule.defaults else set()
    if _OWN_FLOOR in rule.per_group:
        floor = {_OWN_FLOOR: torch.empty((), dtype=torch.float32, device="meta")}
        optional |= set() if group.get(_OWN_FLOOR) is None else floor.keys()
        wanted = {**wanted, **floor}
    if missing := sorted(wanted.keys() - saved.keys() - optional):
        yield f"{name}: lacks {', '.join(missing)}"
    if extra := sorted(map(str, saved.keys() - wanted.keys() - optional)):
        yield f"{name}: has {', '.join(extra)}, which {rule.class_name} does not keep for it"
    wanted = {**wanted, _GRADIENT_SUM: torch.empty(p.shape, dtype=torch.float32, device="meta")}
    for key, got in saved.items():
        if key == _GRADIENTS_SUMMED:
            if not _is_count(got):
                yield f"{name}, {key}: got {got!r}, wanted a whole number >= 0"
        elif key in wanted:
            yield from _tensor_differences(f"{name}, {key}", key, wanted[key], got, p, values)


def _wanted_of_words(
    rule: Rule, theta: Theta, shape: tuple[int, ...], dtype: torch.dtype, **words: str
) -> dict[str, Tensor]:
    """:func:`wanted_state` by the settings alone that decide about it."""
    return wanted_state(rule, theta, shape, dtype, words)


def wanted_state(
    rule: Rule, theta: Theta, shape: tuple[int, ...], dtype: torch.dtype, group: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The state that the rule makes for a parameter, without memory."""
    settings = {**rule.defaults, **group}
    return rule.init_state(torch.empty(shape, dtype=dtype, device="meta"), settings, theta)


def _tensor_differences(name: str, key: str, wanted: Tensor, got: Any, p: Tensor, values: _Values) -> Iterable[str]:
    """What is wrong with one tensor of the state of ``p``; ``wanted`` has its global shape and dtype, no values."""
    if not isinstance(got, Tensor) or got.shape != wanted.shape or got.dtype != wanted.dtype:
        yield f"{name}: got {_describe(got)}, wanted {_describe(wanted)}"
        return
    # The scheduler's vectors belong to no axis of the parameter and are the same on all ranks.
    if wanted.dim() > 1 and distributed.is_dtensor(p) and not distributed.is_dtensor(got):
        yield f"{name}: got an ordinary tensor, wanted a DTensor like its parameter"
        return
    local = distributed.local(got)
    if local.layout != torch.strided or local.is_quantized or (local.is_meta and not distributed.local(p).is_meta):
        yield f"{name}: got a tensor that is sparse, quantized or without memory, wanted an ordinary one"
    elif local.numel() and not local.is_meta and key not in _GATHERED:
        values.add(name, key, local)


def _routes(rule: Rule, groups: Sequence[Mapping[str, Any]]) -> str:
    """How many tensors each group has, and the words that decide about their state: ``12 network torch``."""
    words = [[len(group["params"]), *(group.get(word) for word in rule.words)] for group in groups]
    return ", ".join(" ".join(str(word) for word in of_group) for of_group in words)


def _number(value: Any) -> Any:
    """A setting as a Python value: schedulers keep some as tensors."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_STEPS


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return f"{type(value).__name__} {value!r:.40}"


def with_later_settings(state_dict: dict[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The state dict, with those of the ``groups`` for settings that it is too old to have or does not decide."""
    pairs = zip(state_dict["param_groups"], groups, strict=True)
    sharded = any(distributed.is_dtensor(p) for group in groups for p in group["params"])
    left_out = _OF_ONE_RANK if sharded else frozenset()
    completed = [
        {key: ours[key] for key in _LATER & ours.keys()}
        | {key: value for key, value in theirs.items() if key not in left_out}
        | {key: ours[key] for key in STORAGE}
        for theirs, ours in pairs
    ]
    return state_dict | {"param_groups": completed}
