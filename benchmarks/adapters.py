"""LoRA with VeLO and Celo, which scale a step by the size of its tensor: the least size that A and B count as.

    python -m benchmarks.adapters [--celo FILE]    # -> benchmarks/results/adapters.json

B, the output matrix, starts at zero and needs one; A starts from random numbers. Numbers are held-out losses after the
last step, means over seeds, at the multiplier that a run of so many steps has. Two language models: the small Llama of
benchmarks/finetune_multiplier.py on source code, where A has a size of 0.07, and SmolLM2-135M on docstrings of five
libraries, where it has 0.024. ``--celo`` names a file of published Celo weights. What is in the file is not done
again. One thread; a minute for each run of SmolLM2.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
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
from hf_lopt.rules.base import FROM_SCRATCH


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

from assets import smollm2_dir  # noqa: E402


FILE = RESULTS / "adapters.json"
ADAMW = (3e-3, 1e-2)
# Words -> what A and B count as at least; 0: as they are.
FLOORS = {"A 0.1, B 0.1": (0.1, 0.1), "B 0.1": (0.0, 0.1), "B 0.05": (0.0, 0.05), "B 0.03": (0.0, 0.03)}
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


def set_floors(of_a: float, of_b: float) -> None:
    """Let A count as ``of_a`` at least, wherever it starts, and B as ``of_b``."""
    least_sizes.OF_ADAPTER = dataclasses.replace(least_sizes.OF_ADAPTER, floor=of_a, always=True)
    least_sizes.ADAPTER = dataclasses.replace(least_sizes.ADAPTER, floor=of_b)


def compare(name: str, contenders: dict[str, tuple[str, str]], found: dict[str, Any]) -> Iterator[None]:
    """Add the losses of one task that ``found`` lacks, one after another."""
    task = TASKS[name]
    for lr in ADAMW:
        if f"adamw {lr:g}" not in found:
            losses = [final_loss(task, seed, "adamw", lr) for seed in range(task.seeds)]
            found[f"adamw {lr:g}"] = mean(f"{name}: adamw {lr:g}", losses)
            yield
    for contender, (rule, weights) in contenders.items():
        multiplier = rules.get(rule).run_lengths[FROM_SCRATCH].multiplier(task.steps)
        rows = found.setdefault(contender, {"lr": multiplier})
        for words, sizes in FLOORS.items():
            if words not in rows:
                set_floors(*sizes)
                losses = [final_loss(task, seed, rule, multiplier, weights) for seed in range(task.seeds)]
                rows[words] = mean(f"{name}: {contender}, {words}", losses) | {"seeds": losses}
                yield


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
    found = json.loads(FILE.read_text(encoding="utf-8"))["held_out_loss"] if FILE.is_file() else {}
    record = {
        "machine": machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
        "command": "python -m benchmarks.adapters --celo FILE",
        "setting": {name: f"{task.batch} blocks a step, {task.seeds} seeds" for name, task in TASKS.items()},
    }
    for name in TASKS:
        for _ in compare(name, contenders, found.setdefault(name, {})):
            write_record(FILE, rounded(record | {"held_out_loss": found}, 4))


if __name__ == "__main__":
    main()
