"""``repr`` of an optimizer: what a person set, group by group, and one line about the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hf_lopt import lr_scales
from hf_lopt.given_settings import GivenSettings
from hf_lopt.weights import Weights


_HASH = 12  # digits of a sha256 that tell weights apart
_LONG = 60


def _value(value: Any) -> str:
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 else f"tensor {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= _LONG else f"{text[:_LONG]}…"


def weights_name(weights: Weights) -> str:
    """Where weights are from, and the first digits of their sha256."""
    source = weights.source if len(weights.source) <= _LONG else f"…{weights.source[-_LONG:]}"
    return f"{source}@{weights.sha256[:_HASH]}"


def _given(optimizer: GivenSettings, weights: Weights) -> str:
    known = {"weights": weights.source, **{k: v for k, v in optimizer.defaults.items() if k != "weights"}}
    names = [name for name in known if name in optimizer.explicit_settings]
    return ", ".join(f"{name}={_value(known[name])}" for name in names)


def _group(index: int, group: Mapping[str, Any], names: frozenset[str]) -> str:
    tensors = group["params"]
    size = f"{len(tensors)} tensor{'s' * (len(tensors) != 1)}, {sum(p.numel() for p in tensors):,} parameters"
    settings = [f"lr={_value(group['lr'])}"]
    scales = dict.fromkeys(sorted(group.get(lr_scales.KEY) or ()))
    settings += [f"{lr_scales.KEY} {', '.join(f'{x:g}' for x in scales)}"] if scales.keys() - {1.0} else []
    settings += [f"{name}={_value(group[name])}" for name in sorted(names - {"lr", lr_scales.KEY}) if name in group]
    return f"  group {index}: {size}, {', '.join(settings)}"


def describe(optimizer: GivenSettings, name: str, weights: Weights) -> str:
    """The text.

    Args:
        optimizer: with the counters of the run in its groups. Reading them waits for the device.
        name: of its class.
        weights: in use.
    """
    groups = enumerate(optimizer.param_groups)
    lines = [_group(i, group, optimizer.explicit_in_group(i)) for i, group in groups]
    first: Mapping[str, Any] = optimizer.param_groups[0] if optimizer.param_groups else {}
    steps = first.get("num_training_steps", 0)
    horizon = f" of {steps}" if steps else ""
    if optimizer.length_multiplier != 1.0:
        horizon += f", length_multiplier={optimizer.length_multiplier:.3g}"
    skipped = int(first.get("nonfinite_steps", 0))
    run = f"  run: step {int(first.get('step', 0))}{horizon}, {skipped} skipped, weights {weights_name(weights)}"
    return "\n".join([f"{name}({_given(optimizer, weights)})", *lines, run])
