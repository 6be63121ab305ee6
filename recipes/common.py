"""What every recipe shares: its arguments, and one training run per optimizer from the same start on the same data."""

import argparse
import contextlib
import dataclasses
import gc
import math
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import accelerate
import torch
import transformers
from transformers import (
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint
from transformers.training_args import OptimizerNames

import hf_lopt
from assets import DamagedPackageError, MissingPackageError
from report import draw_curves, print_summary, write_json


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
    chosen = [Contender(args.optim, args.optim, args.learning_rate, args.optim_args)]
    for entry in args.compare:
        name, equals, text = entry.partition("=")
        learning_rate = None
        if equals:
            try:
                learning_rate = float(text)
            except ValueError:
                learning_rate = math.nan
            if not 0 < learning_rate < math.inf:
                raise InputError(f"--compare {entry}: {text!r} is not a learning rate; write NAME=0.001, or only NAME")
        chosen.append(Contender(entry, name, learning_rate))
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
    return chosen


@dataclass(frozen=True)
class Task:
    """What a recipe trains and how it is judged.

    Attributes:
        name: name of the recipe.
        facts: what metrics.json says about "model", "data" and whatever else is worth knowing (JSON values).
        build_model: makes the model; called once per optimizer, always with the same random state.
        train_data, eval_data: examples for `collator`; indexable, with a length.
        collator: makes a batch of a list of examples.
        tokenizer: saved beside the model.
        metric: the key of the held-out metric that is drawn and printed, such as "eval_accuracy".
        metric_name: its name in words.
        metric_scale: how its axis is drawn, "linear" or "log".
        compute_metrics: see `transformers.Trainer`; needed for metrics other than the loss.
        preprocess_logits: see `Trainer`'s preprocess_logits_for_metrics.
        derive: further metrics computed from those of one evaluation.
        by_length: whether batches are made of examples of like length, in random order, so that little is padded.
    """

    name: str
    facts: Mapping[str, Any]
    build_model: Callable[[], PreTrainedModel]
    train_data: Sequence[Mapping[str, Any]]
    eval_data: Sequence[Mapping[str, Any]]
    collator: Callable[[list[Any]], dict[str, torch.Tensor]]
    tokenizer: PreTrainedTokenizerBase
    metric: str
    metric_name: str
    metric_scale: str = "linear"
    compute_metrics: Callable[[Any], dict[str, float]] | None = None
    preprocess_logits: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    derive: Callable[[Mapping[str, float]], dict[str, float]] | None = None
    by_length: bool = False


class _NothingLeftToTrain(Exception):
    """The checkpoint to resume from is the end of the run."""


class _Journal(TrainerCallback):
    """Adds to each entry of the history the seconds spent so far, earlier sessions included, and derived metrics."""

    def __init__(self, derive: Callable[[Mapping[str, float]], dict[str, float]] | None) -> None:
        self.derive = derive
        self.start = time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        before = max((entry.get("seconds", 0.0) for entry in state.log_history), default=0.0)
        self.start = time.perf_counter() - before
        if state.global_step >= state.max_steps:
            # Trainer looks at the limit only after a step, and would train one too many.
            raise _NothingLeftToTrain

    def on_log(self, args, state, control, **kwargs):
        entry = state.log_history[-1]
        entry["seconds"] = round(time.perf_counter() - self.start, 3)
        if self.derive is not None and "eval_loss" in entry:
            entry.update(self.derive(entry))


class _Progress(ProgressCallback):
    """Trainer's progress bar with the loss beside it, and one line per evaluation in place of each log entry."""

    def __init__(self, metric: str, metric_name: str) -> None:
        super().__init__()
        self.metric, self.metric_name = metric, metric_name

    def on_log(self, args, state, control, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None:
            return
        entry = state.log_history[-1]
        if "loss" in entry:
            self.training_bar.set_postfix_str(f"loss {entry['loss']:.4g}")
        if self.metric in entry:
            self.training_bar.write(
                f"step {state.global_step}: held-out loss {entry['eval_loss']:.4f}, "
                f"{self.metric_name} {entry[self.metric]:.4f}"
            )


def train_and_compare(task: Task, args: RecipeArguments) -> dict[str, Any]:
    """Train `task` once per optimizer from the same initial weights on the same batches, and write the results.

    Returns:
        What metrics.json holds: `recipe`, `arguments`, `versions`, `machine`, `task`, and under `runs` for each
        optimizer its `final` metrics, `steps`, `seconds` (wall clock of training and evaluation) and `history`.

    Raises:
        InputError: nothing to resume from.
    """
    folder = Path(args.output_dir)
    chosen = contenders(args)
    checkpoints = {}
    if args.resume:
        checkpoints = {contender.label: _last_checkpoint(folder / contender.label) for contender in chosen}
        if not any(checkpoints.values()):
            raise InputError(f"--resume: no checkpoint of {', '.join(checkpoints)} in {folder}; run without --resume")
    # All of them before the first run, because they find out early what is wrong with the arguments.
    settings = [
        _training_arguments(args, contender, checkpoints.get(contender.label), task.by_length) for contender in chosen
    ]
    is_main = settings[0].process_index == 0
    results = {
        "recipe": task.name,
        "arguments": dataclasses.asdict(args),
        "versions": _versions(),
        "machine": {
            "device": settings[0].device.type,
            "processes": settings[0].world_size,
            "threads": torch.get_num_threads(),
        },
        "task": dict(task.facts),
        "runs": {},
    }
    if is_main:
        facts = (f"{key} {value}" for key, value in task.facts.items() if not isinstance(value, list))
        print(f"{task.name}: {', '.join(facts)}")
    for contender, training_args in zip(chosen, settings, strict=True):
        checkpoint = checkpoints.get(contender.label)
        if is_main:
            print(f"Training with {contender.label}, from {Path(checkpoint).name if checkpoint else 'step 0'}")
        with training_args.main_process_first(desc="removal of old checkpoints"):
            if is_main and not args.resume:
                _remove_checkpoints(folder / contender.label)
        results["runs"][contender.label] = _train(task, contender, training_args, checkpoint)
        # After every optimizer, so that an interrupted comparison keeps what it has.
        if is_main:
            write_json(folder / "metrics.json", results)
            title = f"{task.name}: {task.facts['model']} on {task.facts['data']}"
            draw_curves(
                folder / "curves.png", title, results["runs"], task.metric, task.metric_name, task.metric_scale
            )
    if is_main:
        print_summary(task.name, results["runs"], task.metric, task.metric_name, folder)
    return results


def _training_arguments(
    args: RecipeArguments, contender: Contender, checkpoint: str | None, by_length: bool
) -> TrainingArguments:
    options: dict[str, Any] = {}
    if by_length and "train_sampling_strategy" in TrainingArguments.__dataclass_fields__:
        options["train_sampling_strategy"] = "group_by_length"
    elif by_length:
        options["group_by_length"] = True  # transformers 4
    if contender.learning_rate is not None:
        options["learning_rate"] = contender.learning_rate
    if args.eval_steps is not None:
        options["eval_steps"] = options["save_steps"] = args.eval_steps
    interval = "epoch" if args.eval_steps is None else "steps"
    return TrainingArguments(
        output_dir=str(Path(args.output_dir) / contender.label),
        optim=contender.optim,
        optim_args=contender.optim_args,
        num_train_epochs=args.num_train_epochs,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.per_device_train_batch_size,
        per_device_eval_batch_size=args.per_device_eval_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        eval_strategy=interval,
        eval_on_start=checkpoint is None,
        save_strategy="no" if args.no_checkpoints else interval,
        save_total_limit=1,
        logging_steps=args.logging_steps,
        logging_first_step=True,
        seed=args.seed,
        data_seed=args.seed,
        bf16=args.bf16,
        report_to=args.report_to,
        remove_unused_columns=False,
        # Said outright, because Trainer would otherwise let every process of a CPU-only torchrun train alone.
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        **options,
    )


def _train(
    task: Task, contender: Contender, training_args: TrainingArguments, checkpoint: str | None
) -> dict[str, Any]:
    set_seed(training_args.seed)
    trainer = Trainer(
        model=task.build_model(),
        args=training_args,
        train_dataset=task.train_data,
        eval_dataset=task.eval_data,
        data_collator=task.collator,
        processing_class=task.tokenizer,
        compute_metrics=task.compute_metrics,
        preprocess_logits_for_metrics=task.preprocess_logits,
        callbacks=[_Journal(task.derive)],
    )
    if not training_args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(_Progress(task.metric, task.metric_name))
    # By now model, optimizer and history are restored, so what follows works as after training.
    with contextlib.suppress(_NothingLeftToTrain):
        trainer.train(resume_from_checkpoint=checkpoint)
    if not any(
        "eval_loss" in entry and entry["step"] == trainer.state.global_step for entry in trainer.state.log_history
    ):
        trainer.evaluate()
    trainer.save_model()
    run = _summary(trainer, contender)
    del trainer
    gc.collect()
    return run


def _summary(trainer: Trainer, contender: Contender) -> dict[str, Any]:
    # The entry that Trainer adds at the end of a session repeats, as means over that session, what the others hold.
    history = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    final = {key: value for entry in history if "eval_loss" in entry for key, value in entry.items()}
    run = {
        "optim": contender.optim,
        "learning_rate": trainer.args.learning_rate,
        "lr_scheduler_type": str(trainer.args.lr_scheduler_type.value),
        "steps": trainer.state.global_step,
        "seconds": max(entry["seconds"] for entry in history),
        "final": {
            "train_loss": losses[-1] if losses else None,
            **{key: value for key, value in final.items() if key.startswith("eval_")},
        },
        "history": history,
    }
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    if isinstance(optimizer, hf_lopt.LearnedOptimizer):
        weights = optimizer.weights
        run["weights"] = {"source": weights.source, "sha256": weights.sha256}
    return run


def _last_checkpoint(folder: Path) -> str | None:
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None


def _remove_checkpoints(folder: Path) -> None:
    """Remove what an earlier run left: a later --resume must not take it for a checkpoint of this one."""
    for path in folder.glob("checkpoint-*"):
        if re.fullmatch(r"checkpoint-\d+", path.name) and (path / "trainer_state.json").is_file():
            shutil.rmtree(path)


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "hf_lopt": hf_lopt.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
    }


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the description and shows the defaults, except where the help text itself names one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, []):
            return action.help
        return super()._get_help_string(action)


Arguments = TypeVar("Arguments", bound=RecipeArguments)


def parse(arguments_class: type[Arguments], description: str, argv: Sequence[str] | None = None) -> Arguments:
    """Parse `argv` (default: the command line) into `arguments_class`; `description` opens --help."""
    parser = HfArgumentParser(
        arguments_class, description=f"{description.strip()}\n\n{FILES_WRITTEN}", formatter_class=_HelpFormatter
    )
    return parser.parse_args_into_dataclasses(args=argv)[0]


def run_script(main: Callable[[], Any]) -> None:
    """Call `main`; a mistake of the user ends in one line on stderr and exit status 2 rather than in a traceback."""
    try:
        main()
    except (InputError, MissingPackageError, DamagedPackageError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
