"""Tiny models, data and Trainers for the tests of hf_lopt.hf, and what an optimizer was told about the loss."""

from __future__ import annotations

import math
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import hf_lopt
from hf_lopt.hf.loss_feed import unwrap


OPTIM = {"optim": "velo", "optim_args": "weights=bundled"}

LOG_TOLERANCE = 8e-5  # transformers 4 rounds what it logs to four decimals


def older(package: str, version: str) -> bool:
    """Whether what is installed of ``package`` is older than ``version``."""
    return Version(metadata.version(package)) < Version(version)


# What older versions do with every optimizer, AdamW among them; docs/compatibility.md tells users.
# Trainer does not divide the loss of its label smoother by the accumulation steps: their gradients are added up.
SMOOTHED_LOSSES_ARE_SUMMED = older("transformers", "5.15")
# Trainer gives its data the epoch before Accelerate makes the loader that skips batches, which then counts from 0.
SECOND_EPOCH_IS_SHUFFLED_AS_THE_FIRST = older("transformers", "5.0") and older("accelerate", "1.15")
# Trainer loads the optimizer's state to the device "cpu:0", which torch.load does not know.
NO_RESUMING_ON_CPU_RANKS = older("transformers", "5.18")


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    """A random byte-level model of 18 thousand parameters, without dropout."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def far_reaching_llama() -> LlamaForCausalLM:
    """The tiny llama with matrices that reach five times as far as counts as far."""
    model = tiny_llama()
    torch.manual_seed(0)
    for layer in _linear_layers(model):
        torch.nn.init.normal_(layer.weight, std=2.0)
    return model


def reach_by_hand(model: LlamaForCausalLM) -> float:
    """Of its linear layers."""
    return math.hypot(
        *(x.weight.detach().square().mean().sqrt().item() * x.in_features for x in _linear_layers(model))
    )


def _linear_layers(model: LlamaForCausalLM) -> list[torch.nn.Linear]:
    return [module for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)]


def byte_rows(n: int, length: int = 12, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Rows of random bytes whose labels are ignored (-100) here and there, so that their token counts differ."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(n):
        ids = torch.randint(1, 256, (length,), generator=generator)
        ignored = torch.rand(length, generator=generator) < torch.rand((), generator=generator)
        ignored[-1] = False  # at least one token counts
        rows.append({"input_ids": ids, "labels": ids.masked_fill(ignored, -100)})
    return rows


def arguments(folder: Path | str, **changes: Any) -> TrainingArguments:
    """Arguments for a run of seconds on CPU; every step is logged."""
    settings = {
        **OPTIM,
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 1,
    }
    return TrainingArguments(**(settings | changes))


class LossProbe:
    """Reads from the optimizer's state, averages with known decays, what the last step took for the loss."""

    def __init__(self, optimizer: Any):
        self.optimizer = unwrap(optimizer)
        self.before = self._means()

    def _means(self) -> torch.Tensor:
        return self.optimizer.param_groups[0]["loss_means"].double().clone()

    def read(self) -> float | None:
        """The loss of the step taken since the last call, None if no step was taken."""
        before, self.before = self.before, self._means()
        if torch.equal(before, self.before):
            return None
        decay = torch.exp(torch.tensor(-1 / 10, dtype=torch.float64))  # the fastest average: 10 steps
        return ((self.before[0] - decay * before[0]) / (1 - decay)).item()


class SeenLosses(TrainerCallback):
    """Collects, per optimizer step, the loss that the optimizer used."""

    def __init__(self) -> None:
        self.values: list[float | None] = []

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        self.probe = LossProbe(optimizer)

    def on_step_end(self, args, state, control, **kwargs):
        self.values.append(self.probe.read())


class ReplayTrainer(Trainer):
    """Computes the loss of every window again, from its batches and the parameters before the step.

    ``objective(model, window)`` is the independent formula; ``recomputed`` and ``seen`` have one entry per step.
    """

    def __init__(self, *args: Any, objective: Any = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        trainer = self

        class BeforeStep(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
                with torch.no_grad():
                    trainer.recomputed.append(float(objective(model, trainer.window)))
                trainer.window = []

        self.window: list[dict[str, torch.Tensor]] = []
        self.recomputed: list[float] = []
        self.seen = SeenLosses()
        self.add_callback(BeforeStep)
        self.add_callback(self.seen)

    def training_step(self, model, inputs, *args, **kwargs):
        num_items = args[0] if args else kwargs.get("num_items_in_batch")
        self.window.append({"num_items": num_items, **{key: value.clone() for key, value in inputs.items()}})
        return super().training_step(model, inputs, *args, **kwargs)

    def logged(self, key: str = "loss") -> list[float]:
        return [row[key] for row in self.state.log_history if "loss" in row]


def token_losses(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropies of the tokens that count, next-token shift included, (n,)."""
    logits = model(input_ids=batch["input_ids"]).logits.float()[:, :-1]
    labels = batch["labels"][:, 1:]
    keep = labels != -100
    return F.cross_entropy(logits[keep], labels[keep], reduction="none")


def token_mean(model: Any, window: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Mean over all tokens of a window: what Trainer minimises with a model that takes ``num_items_in_batch``.

    Versions of transformers differ in whether they count the first token of a row, which has no loss.
    """
    return torch.cat([token_losses(model, batch) for batch in window]).sum() / window[0]["num_items"]


def mean_of_means(model: Any, window: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Mean over micro-batches of their token means: what Trainer minimises otherwise."""
    return torch.stack([token_losses(model, batch).mean() for batch in window]).mean()


def velo(parameters: Any, **changes: Any) -> hf_lopt.LearnedOptimizer:
    """A VeLO with the embedded weights and a horizon."""
    return hf_lopt.VeLO(parameters, **({"num_training_steps": 20, "weights": "bundled"} | changes))
