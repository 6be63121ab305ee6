"""Train an encoder-decoder from text to text, with the learned optimizer VeLO through the Hugging Face Trainer.

Without arguments: a T5 of two layers on each side and width 64 learns, from random weights, to put the vowels back
into phrases of the help texts that come with Python ("ssm tht" -> "assume that"), letter by letter; nothing to
download or install, half a minute on two CPU cores.

  python recipes/seq2seq.py --compare adamw_torch adamw_torch=1e-3
  python recipes/seq2seq.py --train_file pairs.csv --source_column english --target_column french
  python recipes/seq2seq.py --train_file pairs.csv --model google-t5/t5-small
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
)

import assets
import hf_lopt  # noqa: F401  (the import that makes optim="velo" known to transformers)
from arguments import InputError, RecipeArguments, parse, run_script
from common import Task, train_and_compare
from tables import hold_out, read_columns


Pair = tuple[str, str]
SAMPLES = 8


@dataclass
class Arguments(RecipeArguments):
    """Arguments of the text-to-text recipe."""

    output_dir: str = field(default="runs/seq2seq", metadata={"help": "Folder for all results; created when missing."})
    model: str | None = field(
        default=None,
        metadata={"help": "Hub id or local folder of a pretrained model. Default: a small T5 with random weights."},
    )
    train_file: str | None = field(
        default=None,
        metadata={"help": "Pairs of texts: .csv, .tsv, .json (a list of objects) or .jsonl. A fifth is held out."},
    )
    source_column: str = field(default="source", metadata={"help": "Column with the input text."})
    target_column: str = field(default="target", metadata={"help": "Column with the text to write."})
    skip_empty: bool = field(default=False, metadata={"help": "Leave out records with an empty text."})
    words: int = field(default=2, metadata={"help": "Words per phrase of the built-in data."})
    train_size: int | None = field(default=None, metadata={"help": "Use at most so many training pairs."})
    eval_size: int | None = field(default=500, metadata={"help": "Use at most so many held-out pairs."})
    max_length: int = field(default=64, metadata={"help": "Cut texts after so many tokens."})
    layers: int = field(default=2, metadata={"help": "Layers of the small T5, on either side."})
    width: int = field(default=64, metadata={"help": "Width of the small T5."})
    heads: int = field(default=4, metadata={"help": "Attention heads of the small T5; must divide --width."})
    max_steps: int = field(
        default=400, metadata={"help": "Number of optimizer steps; takes precedence over epochs. -1: go by epochs."}
    )
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Training examples per batch and device."})
    eval_steps: int | None = field(
        default=100, metadata={"help": "Evaluate and save a checkpoint every so many steps."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("words", "train_size", "eval_size", "max_length", "layers", "width", "heads")
        if self.width % self.heads:
            raise InputError(f"--heads {self.heads} does not divide --width {self.width}")


def without_vowels(text: str) -> str:
    """`text` without a, e, i, o and u; a word of vowels only keeps its first letter."""
    words = (re.sub("[aeiou]", "", word) or word[:1] for word in text.split(" "))
    return " ".join(words)


def vowel_pairs(texts: Sequence[str], words: int, known: Sequence[Pair] = ()) -> list[Pair]:
    """Phrases of `words` words of `texts` in lower case: (without vowels, as it is), each once, none of `known`."""
    found = dict.fromkeys(
        " ".join(group)
        for text in texts
        for line in re.findall(r"[a-z]+(?: [a-z]+)*", re.sub(r"\s+", " ", text.lower()))
        for group in zip(*(line.split(" ")[start:] for start in range(words)), strict=False)
    )
    targets = found.keys() - {target for _, target in known}
    return [(without_vowels(target), target) for target in found if target in targets]


def load_pairs(args: Arguments) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs that `args` names; the choice does not depend on `args.seed`.

    Raises:
        InputError: see `tables.read_columns`; or too few pairs.
    """
    if args.train_file is None:
        train_texts, eval_texts = assets.pydoc_topics()
        train = vowel_pairs(train_texts, args.words)
        evaluation = vowel_pairs(eval_texts, args.words, known=train)
        random.Random(0).shuffle(train)
        random.Random(0).shuffle(evaluation)
        evaluation = evaluation[: args.eval_size]
    else:
        columns = {"source_column": args.source_column, "target_column": args.target_column}
        rows = read_columns(args.train_file, args.skip_empty, **columns)
        train, evaluation = hold_out(rows, args.eval_size)
        if not evaluation:
            raise InputError(f"{args.train_file} has too few pairs to hold a fifth out; 5 or more are needed")
    return train[: args.train_size], evaluation


def load_model_parts(args: Arguments) -> tuple[PreTrainedTokenizerBase, PretrainedConfig]:
    """Tokenizer and configuration: of `args.model`, or those of a small T5 that reads and writes bytes.

    Raises:
        InputError: no usable model under that name.
    """
    if args.model is not None:
        try:
            return AutoTokenizer.from_pretrained(args.model), AutoConfig.from_pretrained(args.model)
        except (OSError, ValueError) as error:
            raise InputError(f"--model {args.model}: no usable model there. {error}") from error
    tokenizer = assets.byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=args.width,
        d_kv=args.width // args.heads,
        d_ff=2 * args.width,
        num_layers=args.layers,
        num_heads=args.heads,
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    return tokenizer, config


def encode_pairs(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[dict[str, Any]]:
    """Token ids of both sides; every target ends in the end token, also one that was cut."""

    def ids(text: str) -> list[int]:
        tokens = [token for token in tokenizer(text)["input_ids"] if token != tokenizer.eos_token_id]
        return [*tokens[: max_length - 1], tokenizer.eos_token_id]

    return [{"input_ids": ids(source), "labels": ids(target)} for source, target in pairs]


def token_accuracy(prediction: Any) -> dict[str, float]:
    """Share of target tokens that are the most likely ones, each given the true tokens before it."""
    counted = prediction.label_ids != -100
    return {"token_accuracy": float(np.mean((prediction.predictions == prediction.label_ids)[counted]))}


def make_task(args: Arguments) -> Task:
    """Load pairs, tokenizer and configuration; every model is built later, one per optimizer.

    Raises:
        InputError: the pairs or the model cannot be used.
    """
    train, evaluation = load_pairs(args)
    tokenizer, config = load_model_parts(args)

    def build_model() -> PreTrainedModel:
        if args.model is None:
            return AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32)
        return AutoModelForSeq2SeqLM.from_pretrained(args.model, config=config, dtype=torch.float32)

    def samples(model: PreTrainedModel) -> list[dict[str, str]]:
        chosen = evaluation[:SAMPLES]
        batch = tokenizer.pad(
            [{"input_ids": row["input_ids"]} for row in encode_pairs(chosen, tokenizer, args.max_length)],
            return_tensors="pt",
        ).to(model.device)
        written = model.generate(**batch, max_new_tokens=args.max_length, do_sample=False, num_beams=1)
        texts = tokenizer.batch_decode(written, skip_special_tokens=True)
        return [
            {"source": source, "target": target, "written": text}
            for (source, target), text in zip(chosen, texts, strict=True)
        ]

    return Task(
        name="seq2seq",
        facts={
            "model": args.model or f"t5 {args.layers}+{args.layers} layers of {args.width}, bytes",
            "data": args.train_file or f"vowels of {args.words} words, pydoc_data.topics",
            "train_examples": len(train),
            "eval_examples": len(evaluation),
        },
        build_model=build_model,
        train_data=encode_pairs(train, tokenizer, args.max_length),
        eval_data=encode_pairs(evaluation, tokenizer, args.max_length),
        collator=DataCollatorForSeq2Seq(tokenizer),
        tokenizer=tokenizer,
        metric="eval_token_accuracy",
        metric_name="token accuracy",
        compute_metrics=token_accuracy,
        # The first output; the encoder's states would come after it.
        preprocess_logits=lambda logits, labels: (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1),
        samples=samples,
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the recipe with the command line `argv`; returns what metrics.json holds."""
    args = parse(Arguments, __doc__, argv)
    return train_and_compare(make_task(args), args)


if __name__ == "__main__":
    run_script(main)
