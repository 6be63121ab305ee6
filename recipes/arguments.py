"""The command line of every recipe: its arguments, the optimizers that they name, and how mistakes are reported."""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from transformers import HfArgumentParser
from transformers.training_args import OptimizerNames

import hf_lopt
from assets import DamagedPackageError, MissingPackageError


FILES_WRITTEN = """\
Files written to --output_dir:
  metrics.json      arguments, versions, final metrics and the whole history of every optimizer
  curves.png        train loss, held-out metric and learned step sizes over the steps, all optimizers together
  OPTIMIZER/        the trained model with its tokenizer, and the last checkpoint (checkpoint-N) for --resume
Without --resume a run starts anew and removes the checkpoints that an earlier run left in OPTIMIZER/."""


class InputError(ValueError):
    """A mistake in what the user gave; `run_script` prints the message without a traceback."""


@dataclass
class RecipeArguments:
    """Arguments of every recipe; where `transformers.TrainingArguments` has the name, the meaning is the same."""

    output_dir: str = field(default="runs/recipe", metadata={"help": "Folder for all results; created when missing."})
    optim: str = field(
        default="velo", metadata={"help": "Optimizer: one of hf_lopt.available(), or any name that Trainer knows."}
    )
    compare: list[str] = field(
        default_factory=list,
        metadata={
            "help": "More optimizers to train from the same initial weights on the same batches, each NAME or "
            "NAME=LEARNING_RATE, such as: adamw_torch adamw_torch=1e-4. --learning_rate and --optim_args do not apply "
            "to them. Default: none."
        },
    )
    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of --optim; for a learned optimizer a multiplier. Default: Trainer's own rule."
        },
    )
    optim_args: str | None = field(
        default=None, metadata={"help": "Further options of --optim as key=value,key=value, such as: weights=bundled"}
    )
    num_train_epochs: float = field(default=2.0, metadata={"help": "Passes over the training data; see --max_steps."})
    max_steps: int = field(
        default=-1, metadata={"help": "Number of optimizer steps; takes precedence over epochs. -1: go by epochs."}
    )
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Training examples per batch and device."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Held-out examples per batch and device."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches per optimizer step."})
    eval_steps: int | None = field(
        default=None, metadata={"help": "Evaluate and save a checkpoint every so many steps. Default: once an epoch."}
    )
    logging_steps: int = field(default=4, metadata={"help": "Log the mean training loss every so many steps."})
    seed: int = field(default=42, metadata={"help": "Fixes new weights, dropout and the order of the data."})
    resume: bool = field(
        default=False, metadata={"help": "Continue every optimizer from its last checkpoint in --output_dir."}
    )
    no_checkpoints: bool = field(
        default=False, metadata={"help": "Write no checkpoints: less disk, but nothing for --resume to continue from."}
    )
    bf16: bool = field(default=False, metadata={"help": "Train with bfloat16 autocast."})
    report_to: list[str] = field(
        default_factory=lambda: ["none"], metadata={"help": "Trackers, such as tensorboard or wandb."}
    )

    def __post_init__(self) -> None:
        self._require_positive(
            "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"
        )
        self._require_positive("eval_steps", "logging_steps", "num_train_epochs", "learning_rate")
        if self.max_steps != -1 and self.max_steps < 1:
            raise InputError(f"--max_steps is {self.max_steps}; give at least 1, or -1 to go by --num_train_epochs")
        contenders(self)

    def own_optim_args(self, optim: str) -> str | None:
        """Options that the recipe itself gives an optimizer, as --optim_args; the user's come first."""
        return None

    def _require_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"--{name} is {value}; it must be greater than 0")


@dataclass(frozen=True)
class Contender:
    """One optimizer of a comparison; `label` names its folder and its curve."""

    label: str
    optim: str
    learning_rate: float | None = None
    optim_args: str | None = None


def contenders(args: RecipeArguments) -> list[Contender]:
    """The optimizers that `args` asks for: `optim` first, then those of `compare`.

    Raises:
        InputError: an unknown optimizer, a bad learning rate, or the same entry twice.
    """
    first = Contender(args.optim, args.optim, args.learning_rate, args.optim_args)
    return check_contenders([first, *(read_contender(entry, "compare") for entry in args.compare)])


def learned_optimizer(name: str, **settings: Any) -> hf_lopt.LearnedOptimizer:
    """The optimizer `name` on a stand-in for parameters, to ask it for its rule and its weights."""
    return hf_lopt.LearnedOptimizer([torch.nn.Parameter(torch.zeros(2, 2))], name, **settings)


def read_contender(entry: str, option: str) -> Contender:
    """The optimizer that `entry`, NAME or NAME=LEARNING_RATE, of the argument `option` names.

    Raises:
        InputError: a bad learning rate.
    """
    name, equals, text = entry.partition("=")
    learning_rate = None
    if equals:
        try:
            learning_rate = float(text)
        except ValueError:
            learning_rate = math.nan
        if not 0 < learning_rate < math.inf:
            raise InputError(f"--{option} {entry}: {text!r} is not a learning rate; write NAME=0.001, or only NAME")
    return Contender(entry, name, learning_rate)


def check_contenders(chosen: Sequence[Contender]) -> list[Contender]:
    """`chosen`, if every optimizer is known and no entry comes twice.

    Raises:
        InputError: otherwise.
    """
    known = {member.value for member in OptimizerNames}
    labels = set()
    for contender in chosen:
        if contender.optim not in known:
            raise InputError(
                f"unknown optimizer {contender.optim!r}. hf_lopt offers {', '.join(hf_lopt.available())}; "
                f"transformers offers {', '.join(sorted(known.difference(hf_lopt.available())))}"
            )
        if contender.label in labels:
            raise InputError(f"the optimizer {contender.label!r} is named twice; each result needs a name of its own")
        labels.add(contender.label)
    return list(chosen)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the description and shows the defaults, except where the help text itself names one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, []):
            return action.help
        return super()._get_help_string(action)


Arguments = TypeVar("Arguments")


def parse(
    arguments_class: type[Arguments], description: str, argv: Sequence[str] | None = None, files: str = FILES_WRITTEN
) -> Arguments:
    """Parse `argv` (default: the command line) into `arguments_class`; `description` opens --help, `files` ends it."""
    return _parser(arguments_class, description, files).parse_args_into_dataclasses(args=argv)[0]


def parse_known(
    arguments_class: type[Arguments], description: str, argv: Sequence[str] | None, files: str
) -> tuple[Arguments, list[str]]:
    """As `parse`; arguments that `arguments_class` does not have come back as they are, for another parser."""
    parser = _parser(arguments_class, description, files, allow_abbrev=False)
    found, rest = parser.parse_args_into_dataclasses(args=argv, return_remaining_strings=True)
    return found, rest


def _parser(arguments_class: type, description: str, files: str, **options: Any) -> HfArgumentParser:
    return HfArgumentParser(
        arguments_class, description=f"{description.strip()}\n\n{files}", formatter_class=_HelpFormatter, **options
    )


def run_script(main: Callable[[], Any]) -> None:
    """Call `main`; a mistake of the user ends in one line on stderr and exit status 2 rather than in a traceback."""
    try:
        main()
    except (InputError, MissingPackageError, DamagedPackageError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
