"""The input matrices of LoRA (A), which start from random numbers: counted as at least 0.1 large, or as they are.

    python -m benchmarks.adapters [--celo FILE]    # -> benchmarks/results/adapters.json

VeLO and Celo scale a step by the size of its tensor, and the output matrices (B), which start at zero, count as 0.1
large. Numbers are held-out losses after the last step, means over seeds, at the multiplier that a run of so many steps
has. Two language models: the small Llama of benchmarks/finetune_multiplier.py on source code, where A has a size of
0.07, and SmolLM2-135M on docstrings of five libraries, where it has 0.024. ``--celo`` names a file of published Celo
weights. One thread; 20 minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

from benchmarks import finetune_multiplier, new_layers
from benchmarks.finetune_multiplier import RESULTS
from benchmarks.small_runs import mean, train
from benchmarks.storing import rounded, write_record
from hf_lopt import least_sizes, rules
from hf_lopt.meta.table import machine


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

from assets import smollm2_dir  # noqa: E402


ADAMW = (3e-3, 1e-2)
BLOCK, HELD_OUT = 64, 32


@dataclass(frozen=True)
class Task:
    """Adapters on a model, made by a seed; blocks of token ids to learn from, and held-out ones."""

    model: Callable[[int], nn.Module]
    blocks: Callable[[], tuple[Tensor, Tensor]]
    steps: int
    batch: int
    seeds: int


@functools.cache
def docstrings() -> tuple[Tensor, Tensor]:
    """Blocks of SmolLM2's tokens, (N, BLOCK) int64; a tenth is held out, and HELD_OUT of it used."""
    found = (itertools.islice(new_layers.docstrings_of(library), 1500) for library in new_layers.LIBRARIES)
    text = "\n\n".join(itertools.chain.from_iterable(found))
    tokens = transformers.AutoTokenizer.from_pretrained(smollm2_dir())(text, return_tensors="pt")["input_ids"][0]
    data = tokens[: len(tokens) // BLOCK * BLOCK].view(-1, BLOCK)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    return data[order[len(data) // 10 :]], data[order[:HELD_OUT]]


def smollm2(seed: int) -> nn.Module:
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2_dir(), dtype=torch.float32)
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def small_llama(seed: int) -> nn.Module:
    return finetune_multiplier.start("LoRA", seed)


TASKS = {
    "small Llama, 30 steps": Task(small_llama, finetune_multiplier.source_code, 30, 8, 3),
    "small Llama, 100 steps": Task(small_llama, finetune_multiplier.source_code, 100, 8, 3),
    "SmolLM2-135M, 30 steps": Task(smollm2, docstrings, 30, 4, 2),
}


def final_loss(task: Task, seed: int, rule: str, lr: float, weights: str = "bundled") -> float:
    model, (data, held_out) = task.model(seed), task.blocks()
    draw = torch.Generator().manual_seed(seed)
    batches = (data[torch.randint(len(data), (task.batch,), generator=draw)] for _ in range(task.steps))
    train(model, batches, lambda x: model(input_ids=x, labels=x).loss, task.steps, rule, lr, weights)
    with torch.no_grad():
        return model(input_ids=held_out, labels=held_out).loss.item()


def compare(name: str, contenders: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """The losses of one task."""
    task, found, before = TASKS[name], {}, least_sizes.OF_ADAPTER
    for lr in ADAMW:
        losses = [final_loss(task, seed, "adamw", lr) for seed in range(task.seeds)]
        found[f"adamw {lr:g}"] = mean(f"{name}: adamw {lr:g}", losses)
    for contender, (rule, weights) in contenders.items():
        multiplier = rules.get(rule).run_length.multiplier(task.steps)
        found[contender] = {"lr": multiplier}
        for words, always in {"A at least 0.1": True, "A as it is": False}.items():
            least_sizes.OF_ADAPTER = dataclasses.replace(before, always=always)
            losses = [final_loss(task, seed, rule, multiplier, weights) for seed in range(task.seeds)]
            found[contender][words] = mean(f"{name}: {contender}, {words}", losses)
        least_sizes.OF_ADAPTER = before
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--celo", help="a file of published Celo weights")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    contenders = {"velo": ("velo", "bundled"), "celo": ("celo", "bundled")}
    if options.celo:
        contenders["celo, published weights"] = ("celo", options.celo)
    record = {
        "machine": machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
        "command": "python -m benchmarks.adapters --celo FILE",
        "setting": {name: f"{task.batch} blocks a step, {task.seeds} seeds" for name, task in TASKS.items()},
        "held_out_loss": {name: compare(name, contenders) for name in TASKS},
    }
    write_record(RESULTS / "adapters.json", rounded(record, 4))


if __name__ == "__main__":
    main()
