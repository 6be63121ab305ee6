"""Pretrain a language model in a loop of your own, with Accelerate and a learned optimizer, without Trainer.

Without arguments: a GPT-2 of 4 layers and width 128 learns, from random weights, the help texts that come with Python;
nothing to download or install, a minute or so on two CPU cores. The loop is short and meant to be copied.

  python recipes/pretrain_accelerate.py --max_steps 500
  accelerate launch --config_file recipes/accelerate/fsdp2.yaml recipes/pretrain_accelerate.py --layers 12 --width 768
  torchrun --nproc_per_node 2 recipes/pretrain_accelerate.py
"""

import dataclasses
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import GradientAccumulationPlugin, set_seed
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, default_data_collator, get_scheduler

import causal_lm
import hf_lopt
from arguments import InputError, parse, run_script
from common import versions
from metrics import perplexity
from report import draw_curves, write_json


FILES_WRITTEN = """\
Files written to --output_dir:
  metrics.json      arguments, versions, final metrics and the whole history
  curves.png        train loss, held-out perplexity and learned step sizes over the steps
  checkpoint/       the state of everything, for --resume
  model/            the trained model with its tokenizer
Without --resume a run starts anew."""
PROGRESS = "progress.json"


@dataclass
class Arguments:
    """Arguments of the loop."""

    output_dir: str = field(default="runs/pretrain", metadata={"help": "Folder for all results; created if missing."})
    optim: str = field(default="velo", metadata={"help": "Optimizer: one of hf_lopt.available(), or adamw."})
    learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate; for VeLO a multiplier. Default: the optimizer's own."}
    )
    weights: str = field(
        default="auto", metadata={"help": "Weights of the learned optimizer: auto, bundled, published, a path or id."}
    )
    text_file: str | None = field(
        default=None,
        metadata={"help": "Plain text in UTF-8; its last tenth is held out. Default: Python's help topics."},
    )
    block_size: int = field(default=128, metadata={"help": "Tokens per training example."})
    layers: int = field(default=4, metadata={"help": "Layers of the GPT-2."})
    width: int = field(default=128, metadata={"help": "Width of the GPT-2."})
    heads: int = field(default=4, metadata={"help": "Attention heads of the GPT-2; must divide --width."})
    vocab_size: int = field(default=1024, metadata={"help": "Tokens of the tokenizer made for it (BPE)."})
    max_steps: int = field(default=120, metadata={"help": "Number of optimizer steps."})
    batch_size: int = field(default=16, metadata={"help": "Training examples per batch and process."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches per optimizer step."})
    eval_steps: int = field(default=30, metadata={"help": "Evaluate and save a checkpoint every so many steps."})
    logging_steps: int = field(default=4, metadata={"help": "Log the mean training loss every so many steps."})
    mixed_precision: str = field(
        default="no", metadata={"help": "Lower precision in forward and backward.", "choices": ("no", "bf16", "fp16")}
    )
    seed: int = field(default=42, metadata={"help": "Fixes new weights, dropout and the order of the data."})
    resume: bool = field(default=False, metadata={"help": "Continue from the checkpoint in --output_dir."})

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "gradient_accumulation_steps", "eval_steps", "logging_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} is {getattr(self, name)}; it must be at least 1")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise InputError(f"--learning_rate is {self.learning_rate}; it must be greater than 0")
        if self.optim not in (*hf_lopt.available(), "adamw"):
            raise InputError(
                f"unknown optimizer {self.optim!r}; --optim takes {', '.join(hf_lopt.available())} or adamw"
            )
        self.model_arguments()

    def model_arguments(self) -> causal_lm.Arguments:
        """What causal_lm.py needs to make text, tokenizer and model; it checks the values, too."""
        names = ("text_file", "block_size", "layers", "width", "heads", "vocab_size")
        return causal_lm.Arguments(**{name: getattr(self, name) for name in names})


def make_optimizer(args: Arguments, model: torch.nn.Module) -> tuple[torch.optim.Optimizer, bool]:
    """The optimizer, and whether its learning rate decays from outside."""
    given = {} if args.learning_rate is None else {"lr": args.learning_rate}
    if args.optim == "adamw":
        return torch.optim.AdamW(model.parameters(), **({"lr": 1e-3} | given)), True
    groups = hf_lopt.param_groups(model, args.optim)
    optimizer = hf_lopt.LearnedOptimizer(groups, args.optim, weights=args.weights, **given)
    if optimizer.rule.needs_horizon:  # the one setting that is not optional: the schedule is for a known length
        optimizer.num_training_steps = args.max_steps
    return optimizer, not optimizer.rule.own_schedule


def endless(loader: DataLoader, accelerator: Accelerator, batches_done: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of one shuffled epoch after another, from where a run stopped."""
    epoch, skipped = divmod(batches_done, len(loader))
    while True:
        loader.set_epoch(epoch)
        yield from accelerator.skip_first_batches(loader, skipped) if skipped else loader
        epoch, skipped = epoch + 1, 0


@torch.no_grad()
def evaluate(model: torch.nn.Module, loader: DataLoader, accelerator: Accelerator) -> float:
    """Mean loss over all held-out blocks."""
    model.eval()
    losses = []
    for batch in loader:
        loss = model(**batch).loss.detach()
        losses.append(accelerator.gather_for_metrics(loss.repeat(len(batch["input_ids"]))))
    model.train()
    return torch.cat(losses).float().mean().item()


def learned_numbers(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """What a learned optimizer says about its last step; {} for the others."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, hf_lopt.LearnedOptimizer):
        return {}
    return {f"lopt/{key}": value for key, value in inner.metrics().items()}


def train(args: Arguments) -> dict[str, Any]:
    """Train, and write the results.

    Returns:
        What metrics.json holds.

    Raises:
        InputError: the text is too short, or there is nothing to resume from.
    """
    folder = Path(args.output_dir)
    accelerator = Accelerator(
        # Windows go on into the next epoch, so that every step is made of as many batches.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        mixed_precision=args.mixed_precision,
        cpu=not torch.accelerator.is_available(),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        step_scheduler_with_optimizer=False,
    )
    texts = causal_lm.load_texts(args.text_file)
    tokenizer, config = causal_lm.load_model_parts(args.model_arguments(), texts[0])
    train_data, eval_data = causal_lm.load_blocks(texts, tokenizer, args.block_size)
    if len(train_data) < args.batch_size * accelerator.num_processes:
        raise InputError(f"the text gives {len(train_data)} blocks, less than one batch; lower --batch_size")

    set_seed(args.seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    optimizer, decays = make_optimizer(args, model)
    loader = DataLoader(
        train_data,
        batch_size=args.batch_size,
        shuffle=True,
        drop_last=True,  # every step sees as much text, on every process
        collate_fn=default_data_collator,
        generator=torch.Generator(),  # or a loader made on resuming would move on the generator of dropout
    )
    eval_loader = DataLoader(eval_data, batch_size=4 * args.batch_size, collate_fn=default_data_collator)
    scheduler = get_scheduler("linear" if decays else "constant", optimizer, 0, args.max_steps)
    model, optimizer, loader, eval_loader, scheduler = accelerator.prepare(
        model, optimizer, loader, eval_loader, scheduler
    )

    step, history, earlier = 0, [], 0.0
    checkpoint = folder / "checkpoint"
    if args.resume:
        if not (checkpoint / PROGRESS).is_file():
            raise InputError(f"--resume: no checkpoint in {folder}; run without --resume")
        accelerator.load_state(str(checkpoint))
        saved = json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))
        step, history, earlier = saved["step"], saved["history"], saved["seconds"]
    start = time.perf_counter() - earlier

    def log(**numbers: float) -> None:
        history.append({"step": step, "seconds": round(time.perf_counter() - start, 3), **numbers})

    def evaluate_and_save(save: bool) -> None:
        loss = evaluate(model, eval_loader, accelerator)
        log(eval_loss=loss, **perplexity({"eval_loss": loss}))
        bar.write(f"step {step}: held-out loss {loss:.4f}, perplexity {history[-1]['eval_perplexity']:.1f}")
        if save:
            accelerator.save_state(str(checkpoint))
            if accelerator.is_main_process:
                write_json(
                    checkpoint / PROGRESS, {"step": step, "history": history, "seconds": history[-1]["seconds"]}
                )

    bar = tqdm(total=args.max_steps, initial=step, unit="step", disable=not accelerator.is_main_process)
    if step == 0:
        evaluate_and_save(save=False)
    batches = endless(loader, accelerator, step * args.gradient_accumulation_steps)
    losses: list[torch.Tensor] = []
    model.train()
    while step < args.max_steps:
        with accelerator.accumulate(model):
            loss = model(**next(batches)).loss
            accelerator.backward(loss)  # this also tells the learned optimizer its loss
            losses.append(loss.detach())
            optimizer.step()
            if accelerator.sync_gradients:
                scheduler.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        step += 1
        bar.update()
        if step % args.logging_steps == 0 or step == 1:
            mean = accelerator.reduce(torch.stack(losses).float().mean(), "mean").item()
            losses.clear()
            log(loss=mean, learning_rate=scheduler.get_last_lr()[0], **learned_numbers(optimizer))
            bar.set_postfix_str(f"loss {mean:.4g}")
        if step % args.eval_steps == 0 or step == args.max_steps:
            evaluate_and_save(save=True)
    bar.close()
    return finish(args, accelerator, model, tokenizer, history)


def finish(
    args: Arguments, accelerator: Accelerator, model: torch.nn.Module, tokenizer: Any, history: list[dict[str, Any]]
) -> dict[str, Any]:
    """Save the model and write metrics.json and the picture."""
    folder = Path(args.output_dir)
    state_dict = accelerator.get_state_dict(model)
    losses = [entry["loss"] for entry in history if "loss" in entry]
    final = [entry for entry in history if "eval_loss" in entry][-1]
    results = {
        "recipe": "pretrain_accelerate",
        "arguments": dataclasses.asdict(args),
        "versions": versions(),
        "machine": {"device": accelerator.device.type, "processes": accelerator.num_processes},
        "runs": {
            args.optim: {
                "steps": final["step"],
                "seconds": final["seconds"],
                "final": {
                    "train_loss": losses[-1],
                    "eval_loss": final["eval_loss"],
                    "eval_perplexity": final["eval_perplexity"],
                },
                "history": history,
            }
        },
    }
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(folder / "model", state_dict=state_dict)
        tokenizer.save_pretrained(folder / "model")
        write_json(folder / "metrics.json", results)
        title = f"gpt2 {args.layers}x{args.width} on {args.text_file or 'pydoc_data.topics'}"
        draw_curves(folder / "curves.png", title, results["runs"], "eval_perplexity", "perplexity", "log")
        print(f"Results: {folder / 'metrics.json'}")
        print(f"Curves:  {folder / 'curves.png'}")
        print(f"Model:   {folder / 'model'}")
    accelerator.end_training()
    return results


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the recipe with the command line `argv`; returns what metrics.json holds."""
    return train(parse(Arguments, __doc__, argv, FILES_WRITTEN))


if __name__ == "__main__":
    run_script(main)
