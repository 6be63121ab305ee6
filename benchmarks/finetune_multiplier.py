"""The multiplier of rules with a step size of their own on a pretrained language model: all of it, and LoRA.

    python -m benchmarks.finetune_multiplier [--celo FILE]    # -> benchmarks/results/finetune_multiplier.json

A small Llama on bytes learns Python's help texts, and goes on with source code of the standard library. Numbers are
held-out losses of the source code after the last step, means over seeds. ``--celo`` names a file of published Celo
weights. One thread.
"""

from __future__ import annotations

import argparse
import copy
import functools
import sysconfig
import warnings
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

import torch
import transformers
from torch import Tensor, nn

from benchmarks.small_runs import mean, train
from benchmarks.storing import rounded, write_record
from hf_lopt.meta.table import machine


RESULTS = Path(__file__).parent / "results"
BLOCK, BATCH, PRETRAIN, STEPS = 48, 8, 1000, 100
MULTIPLIERS = (0.03, 0.05, 0.08, 0.3)
ADAMW = (3e-4, 1e-3, 3e-3)
# Small and middle-sized modules of many authors, the same in all supported versions of Python.
SOURCES = ("argparse", "ast", "calendar", "csv", "difflib", "gettext", "heapq", "optparse", "shlex", "textwrap")


def help_texts() -> str:
    """The texts of Python's ``help()`` on topics."""
    return "\n".join(topics[key] for key in sorted(topics))


def blocks(text: str) -> Tensor:
    """(N, BLOCK) int64 bytes."""
    data = torch.tensor(list(text.encode()), dtype=torch.int64)
    return data[: len(data) // BLOCK * BLOCK].view(-1, BLOCK)


@functools.cache
def source_code() -> tuple[Tensor, Tensor]:
    """Blocks to learn from, and held-out ones."""
    folder = Path(sysconfig.get_path("stdlib"))
    data = blocks("\n".join((folder / f"{name}.py").read_text(encoding="utf-8") for name in SOURCES))
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    return data[order[256:]], data[order[:256]]


def batches(data: Tensor, seed: int, steps: int):
    draw = torch.Generator().manual_seed(seed)
    return (data[torch.randint(len(data), (BATCH,), generator=draw)] for _ in range(steps))


@functools.cache
def pretrained() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=BLOCK,
    )
    model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, PRETRAIN)
    for x in batches(blocks(help_texts()), 0, PRETRAIN):
        optimizer.zero_grad()
        model(input_ids=x, labels=x).loss.backward()
        optimizer.step()
        schedule.step()
    return model


def start(task: str, seed: int) -> nn.Module:
    model = copy.deepcopy(pretrained())
    if task == "all of the model":
        return model
    import peft

    torch.manual_seed(seed)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def final_loss(task: str, seed: int, rule: str, lr: float, weights: str) -> float:
    """Held-out loss after :data:`STEPS` steps."""
    model, (data, held_out) = start(task, seed), source_code()
    train(model, batches(data, seed, STEPS), lambda x: model(input_ids=x, labels=x).loss, STEPS, rule, lr, weights)
    with torch.no_grad():
        return model(input_ids=held_out, labels=held_out).loss.item()


def row(task: str, seeds: int, rule: str, lr: float, weights: str = "") -> dict[str, float]:
    losses = [final_loss(task, seed, rule, lr, weights) for seed in range(seeds)]
    return mean(f"{task}: {rule} {Path(weights).name} lr {lr:g}", losses)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--celo", help="a file of published Celo weights")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model, (_, held_out) = pretrained(), source_code()
    with torch.no_grad():
        before = model(input_ids=held_out, labels=held_out).loss.item()
    contenders = [(rule, "bundled") for rule in ("velo", "small_fc_lopt")]
    contenders += [("celo", options.celo)] if options.celo else []
    found: dict = {}
    for task in ("all of the model", "LoRA"):
        rows = found[task] = {"adamw": {f"{lr:g}": row(task, options.seeds, "adamw", lr) for lr in ADAMW}}
        for rule, weights in contenders:
            name = f"{rule}, {'embedded' if weights == 'bundled' else 'published'} weights"
            rows[name] = {f"{lr:g}": row(task, options.seeds, rule, lr, weights) for lr in MULTIPLIERS}
    record = {
        "machine": machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "command": "python -m benchmarks.finetune_multiplier --celo FILE",
        "setting": f"{STEPS} steps of {BATCH} times {BLOCK} bytes, {options.seeds} seeds, {PRETRAIN} steps before",
        "loss_before": before,
        "held_out_loss": found,
    }
    write_record(RESULTS / "finetune_multiplier.json", rounded(record, 4))


if __name__ == "__main__":
    main()
