"""``python -m hf_lopt --groups MODEL``: what each tensor of a model is to an optimizer, without loading the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hf_lopt import rules
from hf_lopt.hf.arguments import BASE_WIDTH, OVERRIDES, read_optim_args
from hf_lopt.param_groups import param_groups
from hf_lopt.parameters import describe


# Setting of a group -> the title of its column.
COLUMNS = {"branch": "branch", "axis_order": "axis order", "min_param_scale": "floor", "step_scale": "scale"}
# In this order, where a configuration does not name the class that it is of.
_TASKS = ("PRETRAINING", "CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_CLASSIFICATION")


def empty_model(name: str) -> nn.Module:
    """The model of a configuration, on the device "meta": shapes and no memory.

    Args:
        name: a hub id, or a folder or file with a ``config.json``. Code that comes with a model is not run.

    Raises:
        ValueError: without transformers, or for a configuration that cannot be found or built.
    """
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f"models are built with transformers, which cannot be imported: {error}") from None
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        with torch.device("meta"):
            model: nn.Module = _model_class(config)(config)
    except Exception as error:  # transformers' own code of any architecture
        raise ValueError(f"no model could be built from the configuration of {name!r}: {error}") from error
    return model


def _model_class(config: Any) -> Any:
    """The class that a configuration names, otherwise one of the usual tasks of its type."""
    import transformers
    from transformers.models.auto import modeling_auto

    for architecture in getattr(config, "architectures", None) or ():
        if hasattr(transformers, architecture):
            return getattr(transformers, architecture)
    for task in _TASKS:
        found = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {}).get(config.model_type)
        if isinstance(found, str) and hasattr(transformers, found):
            return getattr(transformers, found)
    return transformers.AutoModel.from_config


def rows(model: nn.Module, rule: str, groups: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """A row for each trainable parameter: name, shape, role, weight decay, and ``COLUMNS``; "-" where the rule has no
    such setting. ``groups``: of :func:`hf_lopt.param_groups`."""
    rule_ = rules.get(rule)
    group_of = {id(p): group for group in groups for p in group["params"]}
    for parameter in describe(model):
        group = group_of[id(parameter.tensor)]
        settings = [group.get(key, rule_.defaults.get(key)) for key in ("weight_decay", *COLUMNS)]
        shape = "x".join(map(str, parameter.tensor.shape)) or "1"
        yield (parameter.name, shape, parameter.role, *map(_text, settings))


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def report(name: str, rule: str, optim_args: str | None = None) -> str:
    """The table for a model by its name, see :func:`empty_model`, with its groups under ``optim_args``.

    Raises:
        ValueError: for an unknown rule, and what :func:`empty_model` and :func:`hf_lopt.param_groups` refuse.
    """
    rule_ = rules.get(rule)
    given, _ = read_optim_args(rule_, optim_args)
    keywords = {key: given[key] for key in (BASE_WIDTH, OVERRIDES, *rule_.per_group) if key in given}
    model = empty_model(name)
    groups = param_groups(model, rule, **keywords)
    found = list(rows(model, rule, groups))
    title = ("name", "shape", "role", "decay", *COLUMNS.values())
    widths = [max(len(row[i]) for row in (title, *found)) for i in range(len(title))]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in (title, *found)
    ]
    branch = 4 + list(COLUMNS).index("branch")
    counts = Counter(row[branch] if row[branch] != "-" else row[2] for row in found)
    summary = ", ".join(f"{count} {what}" for what, count in counts.most_common())
    lines += ["", f"{type(model).__name__}, {rule}: {len(found)} tensors in {len(groups)} groups; {summary}"]
    return "\n".join(lines)
