"""What trained a model, in words, for model cards, ``trainer_state.json`` and trackers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from hf_lopt.description import weights_name
from hf_lopt.hf.loss_feed import unwrap
from hf_lopt.hf.wrapping import wrap_once
from hf_lopt.optimizer import LearnedOptimizer


# Those of report_to that keep a text; the others drop it, with a warning.
_TAKE_TEXT = frozenset(("tensorboard", "wandb", "trackio"))


def facts(optimizer: LearnedOptimizer) -> dict[str, str | float]:
    """The optimizer, its version, where its weights are from, and the lr, which multiplies its step where it says so.

    The lr is that of the run policy, before any schedule. ``length_multiplier`` is there where the length of the run
    multiplies it once more, ``new_layers`` where it is multiplied for tensors that the checkpoint lacks.
    """
    from hf_lopt import __version__

    policy = optimizer.run_policy
    lr = float(optimizer.param_groups[0]["lr"]) if policy is None else policy.lr.value
    found: dict[str, str | float] = {
        "optimizer": type(optimizer).__name__,
        "hf_lopt": __version__,
        "weights": weights_name(optimizer.weights),
        "weights_origin": optimizer.weights.origin,
        "lr_multiplier" if optimizer.rule.own_schedule else "lr": lr,
    }
    if optimizer.length_multiplier != 1.0:
        found["length_multiplier"] = optimizer.length_multiplier
    if policy is not None and policy.new_layers.value != 1.0:
        found["new_layers"] = policy.new_layers.value
    return found


def line(optimizer: LearnedOptimizer) -> str:
    """The same as one line of a model card."""
    found = facts(optimizer)
    rates = (
        f"{key}={found[key]:.4g}" for key in ("lr_multiplier", "lr", "length_multiplier", "new_layers") if key in found
    )
    return (
        f"{found['optimizer']} of hf_lopt {found['hf_lopt']} with {found['weights_origin']} weights "
        f"{found['weights']} and {', '.join(rates)}"
    )


def trackers_take_text(report_to: Any) -> bool:
    """Whether all trackers that ``TrainingArguments.report_to`` names keep a text in a row of numbers."""
    names = [report_to] if isinstance(report_to, str) else list(report_to or ())
    return _TAKE_TEXT.issuperset(names) or names == ["none"]


def name_the_optimizer(module: Any) -> None:
    """Have the model cards of ``transformers.modelcard`` say what trained the model."""
    wrap_once(module, "extract_hyperparameters_from_trainer", _with_optimizer)


def _with_optimizer(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    @functools.wraps(original)
    def extract(trainer: Any) -> dict[str, Any]:
        found = original(trainer)
        learned = unwrap(getattr(trainer, "optimizer", None))
        if learned is not None:
            found["optimizer"] = line(learned)
        return found

    return extract
