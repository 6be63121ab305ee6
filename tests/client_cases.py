"""What every client of the optimizers has to do: train so that the loss falls, and resume to the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer

import hf_lopt
from hf_lopt.hf.loss_feed import unwrap


# Arguments of a short run of any subclass of TrainingArguments: the optimizer, checkpoints in the middle, no noise.
STEPS, MIDDLE = 16, 8
SETTINGS = {
    "optim": "velo",
    "optim_args": "weights=bundled",
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": MIDDLE,
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "disable_tqdm": True,
    "seed": 1,
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes, and tokens for the end, padding and what chat templates need."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>", model_max_length=64
    )


def rising_rows(n: int = 64, length: int = 12) -> list[dict[str, torch.Tensor]]:
    """Rows in which each id is the one before plus one: easy to predict, and hard for random weights."""
    ids = [(torch.arange(length) + 3 * i) % 40 + 1 for i in range(n)]
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def losses(trainer: Trainer) -> list[float]:
    """The training loss of every step."""
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def learned(trainer: Trainer) -> hf_lopt.LearnedOptimizer:
    """The optimizer of a Trainer, which has to be a learned one."""
    optimizer = unwrap(trainer.optimizer)
    assert isinstance(optimizer, hf_lopt.LearnedOptimizer), type(trainer.optimizer)
    return optimizer


def trainable(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the parameters that train."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_falls(values: list[float], by: float = 0.02, window: int = 4) -> None:
    """The mean of the last ``window`` losses is less than ``1 - by`` times that of the first ones."""
    first, last = (sum(part) / window for part in (values[:window], values[-window:]))
    assert last < (1 - by) * first, f"the loss goes from {first} to {last}: {values}"


def train_and_resume(make: Callable[[Path], Trainer], folder: Path, by: float = 0.02) -> Trainer:
    """Train with ``make(folder)``, then a new Trainer of the same kind from the checkpoint in the middle.

    The loss has to fall, the optimizer to have been told losses and horizon, and both ends to be the same.
    """
    trainer = make(folder)
    trainer.train()
    assert_falls(losses(trainer), by)
    optimizer = learned(trainer)
    assert optimizer.num_training_steps == optimizer.steps_done == trainer.state.max_steps == STEPS
    whole = trainable(trainer.model)
    resumed = make(folder)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{MIDDLE}"))
    assert learned(resumed).steps_done == STEPS
    ends = trainable(resumed.model)
    assert ends.keys() == whole.keys() and whole
    for name, value in whole.items():
        torch.testing.assert_close(ends[name], value, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")
    return trainer
