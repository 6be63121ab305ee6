"""Tensors that start at or near zero: a floor for each kind, on validation tasks that need such tensors.

    python -m benchmarks.zero_init sweep [--celo FILE]     # -> benchmarks/results/zero_init.json
    python -m benchmarks.zero_init plain [--celo FILE]     # models that need no floor, into the same file

Numbers are held-out losses after the last step, means over seeds, for values of one floor (hf_lopt/least_sizes.py),
the others as they are. ``--celo`` names a file of published Celo weights. One thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.small_models import BATCH, TASKS, final_loss
from benchmarks.small_runs import mean
from benchmarks.storing import rounded, write_record
from hf_lopt import least_sizes
from hf_lopt.meta.table import machine


RESULTS = Path(__file__).parent / "results"
STEPS = 150
ADAMW = (1e-3, 1e-2)

# Kind (a constant of hf_lopt.least_sizes) -> the task that needs it, and floors.
SWEEP: Mapping[str, tuple[str, Sequence[float]]] = {
    "ONE_PLUS": ("Gemma", (0.0, 0.1, 0.3, 1.0)),
    "TABLE": ("BEiT", (0.0, 0.02, 0.05, 0.1)),
    "SCALE": ("ConvNeXt", (0.0, 0.01, 0.1, 0.3)),
    "GATE": ("gated attention", (0.0, 0.1, 0.3, 1.0)),
    "PROJECTION": ("zero last layers", (0.0, 0.005, 0.02, 0.1)),
    "NORM": ("zero last norms", (0.0, 0.1, 0.3, 1.0)),
}
# Biases of models in which nothing else starts at zero.
BIASES, PLAIN = (0.0, 0.01, 0.1), ("GPT-2", "ViT", "MLP")


def floors(kind: str, name: str, values: Sequence[float], seeds: int, contenders: Mapping[str, Any]) -> dict[str, Any]:
    """The losses of one task by the floor of one kind."""
    task, before = TASKS[name], getattr(least_sizes, kind)
    found: dict[str, Any] = {"task": name}
    rates = {
        lr: mean(f"{name}: adamw {lr:g}", [final_loss(task, s, STEPS, "adamw", lr) for s in range(seeds)])
        for lr in ADAMW
    }
    best = min(rates, key=lambda lr: rates[lr]["loss"])
    found["adamw"] = {"lr": best, **rates[best]}
    for contender, (rule, weights) in contenders.items():
        found[contender] = {}
        for floor in values:
            setattr(least_sizes, kind, dataclasses.replace(before, floor=floor))
            losses = [final_loss(task, seed, STEPS, rule, 1.0, weights) for seed in range(seeds)]
            found[contender][f"{floor:g}"] = mean(f"{name}: {contender}, {before.name} {floor:g}", losses)
    setattr(least_sizes, kind, before)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("sweep", "plain"))
    parser.add_argument("--kinds", nargs="+", default=list(SWEEP))
    parser.add_argument("--celo", help="a file of published Celo weights")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    contenders = {"velo": ("velo", "bundled")}
    if options.celo:
        contenders["celo, published weights"] = ("celo", options.celo)
    file = RESULTS / "zero_init.json"
    record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    record |= {
        "machine": machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "command": "python -m benchmarks.zero_init {sweep,plain} --celo FILE",
        "setting": f"{STEPS} steps of batches of {BATCH}, {options.seeds} seeds, held-out loss by floor",
    }
    if options.what == "sweep":
        todo = [("kinds", getattr(least_sizes, kind).name, kind, *SWEEP[kind]) for kind in options.kinds]
    else:
        todo = [("biases", name, "BIAS", name, BIASES) for name in PLAIN]
    for part, key, *what in todo:
        record.setdefault(part, {})[key] = floors(*what, options.seeds, contenders)
        write_record(file, rounded(record, 4))


if __name__ == "__main__":
    main()
