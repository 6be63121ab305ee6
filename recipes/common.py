"""What every recipe shares: one training run per optimizer, from the same start on the same data."""

import contextlib
import dataclasses
import gc
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

import hf_lopt
from arguments import Contender, InputError, RecipeArguments, contenders
from hf_lopt.hf.checkpoints import last_complete_checkpoint
from report import draw_curves, print_summary, write_json


@dataclass(frozen=True)
class Task:
    """What a recipe trains and how it is judged.

    Attributes:
        name: name of the recipe.
        facts: what metrics.json says about "model", "data" and whatever else is worth knowing (JSON values).
        build_model: makes the model; called once per optimizer, always with the same random state.
        train_data, eval_data: examples for `collator`; indexable, with a length.
        collator: makes a batch of a list of examples.
        tokenizer: saved beside the model; None where the inputs are no text.
        metric: the key of the held-out metric that is drawn and printed, such as "eval_accuracy".
        metric_name: its name in words.
        metric_scale: how its axis is drawn, "linear" or "log".
        compute_metrics: see `transformers.Trainer`; needed for metrics other than the loss.
        preprocess_logits: see `Trainer`'s preprocess_logits_for_metrics.
        derive: further metrics computed from those of one evaluation.
        samples: what the trained model makes of some held-out inputs, for the eye (JSON values).
        by_length: whether batches are made of examples of like length, in random order, so that little is padded.
    """

    name: str
    facts: Mapping[str, Any]
    build_model: Callable[[], PreTrainedModel]
    train_data: Sequence[Mapping[str, Any]]
    eval_data: Sequence[Mapping[str, Any]]
    collator: Callable[[list[Any]], dict[str, torch.Tensor]]
    tokenizer: PreTrainedTokenizerBase | None
    metric: str
    metric_name: str
    metric_scale: str = "linear"
    compute_metrics: Callable[[Any], dict[str, float]] | None = None
    preprocess_logits: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    derive: Callable[[Mapping[str, float]], dict[str, float]] | None = None
    samples: Callable[[PreTrainedModel], list[Any]] | None = None
    by_length: bool = False


class _NothingLeftToTrain(Exception):
    """The checkpoint to resume from is the end of the run."""


class _Journal(TrainerCallback):
    """Adds to each entry of the history the time spent so far, earlier sessions included, and derived metrics.

    `seconds` is wall clock, evaluations included. `step_seconds` is that of the optimizer steps alone, and
    `step_cpu_seconds` the same in processor time of this process, which other processes on the machine hardly change.
    """

    def __init__(self, derive: Callable[[Mapping[str, float]], dict[str, float]] | None) -> None:
        self.derive = derive
        self.start = self.step_start = time.perf_counter()
        self.step_cpu_start = time.process_time()
        self.step_seconds = self.step_cpu_seconds = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        def before(key: str) -> float:
            return max((entry.get(key, 0.0) for entry in state.log_history), default=0.0)

        self.start = time.perf_counter() - before("seconds")
        self.step_seconds, self.step_cpu_seconds = before("step_seconds"), before("step_cpu_seconds")
        if state.global_step >= state.max_steps:
            # Trainer looks at the limit only after a step, and would train one too many.
            raise _NothingLeftToTrain

    def on_step_begin(self, args, state, control, **kwargs):
        self.step_start, self.step_cpu_start = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.step_seconds += time.perf_counter() - self.step_start
        self.step_cpu_seconds += time.process_time() - self.step_cpu_start

    def on_log(self, args, state, control, **kwargs):
        entry = state.log_history[-1]
        entry["seconds"] = round(time.perf_counter() - self.start, 3)
        entry["step_seconds"] = round(self.step_seconds, 3)
        entry["step_cpu_seconds"] = round(self.step_cpu_seconds, 3)
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
        checkpoints = {contender.label: last_complete_checkpoint(folder / contender.label) for contender in chosen}
        if not any(checkpoints.values()):
            raise InputError(f"--resume: no checkpoint of {', '.join(checkpoints)} in {folder}; run without --resume")
    # All of them before the first run, because they find out early what is wrong with the arguments.
    settings = [
        training_arguments(args, contender, checkpoints.get(contender.label), task.by_length) for contender in chosen
    ]
    is_main = settings[0].process_index == 0
    results = {
        "recipe": task.name,
        "arguments": dataclasses.asdict(args),
        "versions": versions(),
        "machine": machine(settings[0]),
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
        results["runs"][contender.label] = train(task, contender, training_args, checkpoint)
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


def training_arguments(
    args: RecipeArguments, contender: Contender, checkpoint: str | None = None, by_length: bool = False
) -> TrainingArguments:
    """Trainer's arguments for one optimizer; `checkpoint`: what the run will go on from."""
    options: dict[str, Any] = {}
    if by_length and "train_sampling_strategy" in TrainingArguments.__dataclass_fields__:
        options["train_sampling_strategy"] = "group_by_length"
    elif by_length:
        options["group_by_length"] = True  # transformers 4
    if contender.learning_rate is not None:
        options["learning_rate"] = contender.learning_rate
    if args.eval_steps is not None:
        options["eval_steps"] = options["save_steps"] = args.eval_steps
    if contender.optim.startswith("schedule_free"):  # it averages instead of decaying, and warms up by itself
        options |= {"lr_scheduler_type": "constant", "warmup_steps": max(args.max_steps, 0) // 20}
    interval = "epoch" if args.eval_steps is None else "steps"
    return TrainingArguments(
        output_dir=str(Path(args.output_dir) / contender.label),
        optim=contender.optim,
        optim_args=",".join(filter(None, (contender.optim_args, args.own_optim_args(contender.optim)))) or None,
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


def train(
    task: Task,
    contender: Contender,
    training_args: TrainingArguments,
    checkpoint: str | None = None,
    save: bool = True,
) -> dict[str, Any]:
    """Train one new model of `task`, save it, and return what `runs` of metrics.json says about it."""
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
    if training_args.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
    else:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(_Progress(task.metric, task.metric_name))
    # By now model, optimizer and history are restored, so what follows works as after training.
    with contextlib.suppress(_NothingLeftToTrain):
        trainer.train(resume_from_checkpoint=checkpoint)
    if not any(
        "eval_loss" in entry and entry["step"] == trainer.state.global_step for entry in trainer.state.log_history
    ):
        trainer.evaluate()
    if save:
        trainer.save_model()
    run = _summary(trainer, contender)
    if save and task.samples is not None:
        run["samples"] = task.samples(trainer.model)
    del trainer
    gc.collect()
    return run


def _summary(trainer: Trainer, contender: Contender) -> dict[str, Any]:
    # The entry that Trainer adds at the end of a session repeats, as means over that session, what the others hold.
    history = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    final = {key: value for entry in history if "eval_loss" in entry for key, value in entry.items()}
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    policy = getattr(optimizer, "run_policy", None)  # of a learned optimizer: what it chose in place of defaults
    args = trainer.args
    run = {
        "optim": contender.optim,
        "learning_rate": args.learning_rate if policy is None else policy.lr.value,
        "lr_scheduler_type": str(args.lr_scheduler_type.value) if policy is None else policy.schedule.value,
        "steps": trainer.state.global_step,
        "seconds": max(entry["seconds"] for entry in history),
        "final": {
            "train_loss": losses[-1] if losses else None,
            **{key: value for key, value in final.items() if key.startswith("eval_")},
        },
        "history": history,
    }
    if isinstance(optimizer, hf_lopt.LearnedOptimizer):
        weights = optimizer.weights
        run["weights"] = {"source": weights.source, "sha256": weights.sha256}
    return run


def _remove_checkpoints(folder: Path) -> None:
    """Remove what an earlier run left: a later --resume must not take it for a checkpoint of this one."""
    for path in folder.glob("checkpoint-*"):
        if re.fullmatch(r"checkpoint-\d+", path.name) and (path / "trainer_state.json").is_file():
            shutil.rmtree(path)


def machine(training_args: TrainingArguments) -> dict[str, Any]:
    """Where the training runs."""
    return {
        "device": training_args.device.type,
        "name": processor_name() if training_args.device.type == "cpu" else torch.cuda.get_device_name(),
        "cores": os.cpu_count(),
        "processes": training_args.world_size,
        "threads": torch.get_num_threads(),
    }


def processor_name() -> str:
    """The model of the processor, as the system calls it."""
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of what takes part in the training."""
    return {
        "python": platform.python_version(),
        "hf_lopt": hf_lopt.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
    }
