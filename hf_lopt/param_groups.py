"""Parameter groups that know the model: which tensors are matrices, how their axes lie, how wide their layer is.

What is known about a parameter is in :mod:`hf_lopt.parameters`; here it becomes settings of a group. celo2 leaves
embeddings, tables and norms to Adam, all rules take the order of the axes, and μP scales steps with the width.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from hf_lopt import notices, rules
from hf_lopt.parameters import Parameter, describe, tables
from hf_lopt.rules.base import Rule
from hf_lopt.rules.celo2 import BRANCHES


# How many names an error lists.
_LISTED = 5


def param_groups(
    model: nn.Module,
    rule: str = "celo2",
    *,
    weight_decay: float | None = None,
    base_width: float | None = None,
    overrides: Mapping[str, str] | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Groups of all trainable parameters of ``model`` for the optimizer of ``rule``; each parameter is in one group.

    - ``branch`` (celo2, elo_celo2): "network" for matrices, "adam" for the rest: embeddings, the head that
      ``get_output_embeddings`` names, tables of positions and latents, norms, biases and other vectors
      (:mod:`hf_lopt.parameters`). Rules that send everything through the network keep doing so.
    - ``axis_order`` (all rules): by the module that owns the parameter.
    - ``step_scale`` (mulo, small_fc_lopt, elo): from ``base_width``, or from what the ``mup`` package attached to the
      parameters: 1 / width_mult of the tensors with two infinite dimensions, 1 for the others.
    - ``weight_decay``: 0 for norms and biases.

    ``base_width / fan_in`` is the multiplier of a hidden matrix; embeddings, the first and the last layer and all
    vectors have 1. A layer counts as first (last) if it is what ``get_input_embeddings`` (``get_output_embeddings``)
    returns; in a model that does not tell, if it is the first (last) linear or convolution layer and no other matrix
    has its input (output) width on the other side. Matrices of an adapter that take its rank have 1, because the rank
    does not grow with the model; those that take the layer's input are scaled by it (LoRA+, Hayou et al. 2024,
    section 4). Anything else of finite width, such as a router, needs mup. The
    reference of μLO has a plain 1 / fan_in, a constant factor of ``base_width`` less: ``base_width=1`` is the same.

    Args:
        model: any module.
        rule: name of the rule, one of :func:`hf_lopt.available`.
        weight_decay: for matrices, embeddings and vectors other than norms and biases; None: the rule's own.
        base_width: width for which the learning rate was tuned, for rules with ``step_scale``.
        overrides: regular expression -> branch, "network" or "adam", for rules that have one. The first that is found
            in a parameter's name (``re.search``) decides about it.
        settings: ``lr`` or settings that the rule has per group, for all groups; they replace what is derived here.

    Returns:
        parameter groups; those with weight decay first, otherwise in the order of ``named_parameters``.

    Raises:
        ValueError: for a model without trainable parameters, an unknown rule, settings that the rule does not have per
            group, and overrides that match no parameter.
    """
    rule_ = rules.get(rule)
    _check(rule_, base_width, settings)
    found = describe(model)
    chosen = overridden(rule_, found, overrides)
    scales = _step_scales(found, model, rule_, base_width) if "step_scale" in rule_.per_group else {}
    if weight_decay is None:
        weight_decay = rule_.defaults["weight_decay"]
    groups: dict[tuple, dict[str, Any]] = {}
    for parameter in found:
        values: dict[str, Any] = {"weight_decay": weight_decay if parameter.decays else 0.0}
        if "axis_order" in rule_.per_group:
            values["axis_order"] = parameter.axis_order
        if rule_.defaults.get("branch") == "auto":
            values["branch"] = branch_of(parameter)
        if scales:
            values["step_scale"] = scales[parameter.name]
        values |= settings
        if parameter.name in chosen:
            values["branch"] = chosen[parameter.name]
        # Whether it decays is part of the key, so that the groups do not depend on the number.
        key = (not parameter.decays, *values.values())
        groups.setdefault(key, {"params": [], **values})["params"].append(parameter.tensor)
    return [groups[key] for key in sorted(groups, key=lambda key: key[0])]


def branch_of(parameter: Parameter) -> str:
    """The branch of celo2 that suits a parameter.

    A depthwise convolution has taps and no matrix: to make its taps orthogonal is to give all channels together one
    size. Two-layer Mamba, a process of order two, 200 steps, means of four seeds: at lr 1e-3 a loss of 2.18 with Adam
    and 2.34 with the network, at 3e-3 1.99 and 2.03; ConvNeXt on noisy patterns, two seeds at 1e-3, 0.24 and 0.41.
    """
    return "network" if parameter.role == "matrix" else "adam"


def overridden(rule: Rule, found: list[Parameter], overrides: Mapping[str, str] | None) -> dict[str, str]:
    """Name -> branch of the parameters that ``overrides`` decide about, see :func:`param_groups`.

    Raises:
        ValueError: for a rule without branches, an unknown branch, and a pattern that is no regular expression,
            matches nothing, or has every match taken by one before it.
    """
    if not overrides:
        return {}
    if "branch" not in rule.per_group:
        raise ValueError(f"overrides={dict(overrides)!r}: {rule.name} has no branches; celo2 and elo_celo2 have")
    chosen: dict[str, str] = {}
    for pattern, branch in overrides.items():
        if branch not in BRANCHES:
            raise ValueError(f"overrides: branch must be one of {', '.join(BRANCHES)}, got {branch!r} for {pattern!r}")
        try:
            matching = [p.name for p in found if re.search(pattern, p.name)]
        except re.error as error:
            raise ValueError(f"overrides: {pattern!r} is no regular expression: {error}") from None
        if not matching:
            raise ValueError(f"overrides: {pattern!r} matches no trainable parameter. {_near(pattern, found)}")
        new = [name for name in matching if name not in chosen]
        if not new:
            raise ValueError(
                f"overrides: {pattern!r} decides about nothing, because patterns before it match the same parameters "
                f"({', '.join(matching[:_LISTED])}). The first match counts: put it before them."
            )
        chosen |= dict.fromkeys(new, branch)
    return chosen


def _near(pattern: str, found: list[Parameter]) -> str:
    """Names that were perhaps meant, the whole ones or parts of them."""
    names = [p.name for p in found]
    plain = re.sub(r"\\.|[^\w.]", lambda match: match[0][1:], pattern)
    near = difflib.get_close_matches(plain, names, n=_LISTED, cutoff=0.6)
    if not near:
        parts = {part for name in names for part in name.split(".") if not part.isdigit()}
        words = [word for word in plain.split(".") if word]
        near = list(dict.fromkeys(x for word in words for x in difflib.get_close_matches(word, parts, n=2)))
    if near:
        return f"Near it are {', '.join(near)}"
    return f"There are {', '.join(names[:_LISTED])}{', ...' if len(names) > _LISTED else ''}"


def _check(rule: Rule, base_width: float | None, settings: Mapping[str, Any]) -> None:
    valid = ("lr", *rule.per_group)
    unknown = [key for key in settings if key not in valid]
    if unknown:
        raise ValueError(
            f"{rule.name} has no {', '.join(unknown)} per group; it has {', '.join(valid)} and weight_decay. Pass the "
            f"rest to {rule.class_name}(...)."
        )
    if base_width is None:
        return
    if "step_scale" not in rule.per_group:
        raise ValueError(
            f"base_width={base_width!r}: {rule.name} has no width multipliers (step_scale); mulo has them"
        )
    number = isinstance(base_width, (int, float)) and not isinstance(base_width, bool)
    if not (number and math.isfinite(base_width) and base_width > 0):
        raise ValueError(f"base_width must be a positive number, got {base_width!r}")


def _step_scales(found: list[Parameter], model: nn.Module, rule: Rule, base_width: float | None) -> dict[str, float]:
    """Name -> multiplier of the step."""
    with_mup = [p for p in found if getattr(p.tensor, "infshape", None) is not None]
    if with_mup:
        if base_width is not None:
            notices.warn(
                f"base_width={base_width:g} is dropped: the parameters carry the widths that mup has set (infshape)",
            )
        scales = dict.fromkeys((p.name for p in found), 1.0)
        return scales | {p.name: _mup_scale(p.tensor.infshape) for p in with_mup}
    if base_width is None:
        if rule.name == "mulo":
            notices.warn(
                "mulo has no widths to scale its steps with, so every step_scale is 1: pass base_width=... (through "
                "Trainer: optim_args='base_width=...'), or set base shapes with the mup package",
            )
        return {}
    hidden = set(_hidden(found, model)) - {p.name for p in found if p.of_rank}
    return {p.name: base_width / p.fan_in if p.name in hidden else 1.0 for p in found}


def _mup_scale(infshape: Any) -> float:
    return 1.0 / float(infshape.width_mult()) if infshape.ninf() == 2 else 1.0


def _hidden(found: list[Parameter], model: nn.Module) -> Iterator[str]:
    """Names of the matrices between the first and the last layer."""
    # A single input channel, as of a layer for grey images, does not grow with the width.
    matrices = [p for p in found if p.role == "matrix" and p.fan_in > 1]
    # Bare parameters of a module are listed before its layers, wherever they are used.
    layers = [p for p in matrices if p.in_layer]
    outer = set()
    if layers and not tables(model, "get_input_embeddings"):
        first = layers[0]
        outer |= {first.name} if all(p.fan_out != first.fan_in for p in matrices if p is not first) else set()
    if layers and not tables(model, "get_output_embeddings"):
        last = layers[-1]
        outer |= {last.name} if all(p.fan_in != last.fan_out for p in matrices if p is not last) else set()
    return (p.name for p in matrices if p.name not in outer)
