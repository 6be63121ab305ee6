"""small_fc's steps on wide perceptrons: the constructed weights against those that the package embedded before.

    python -m benchmarks.small_fc_width validation    # and the other settings that were compared
    python -m benchmarks.small_fc_width test          # opened for peaks of 0.004, the choice, and 0.003

Both go to benchmarks/results/small_fc_width.json. The network sees normalised features, which are the same for a
layer of any width. Where steps are too long, however, the newest gradient turns against its own momentum: a candidate
is how many times the gradient bounds a step, and the peak step. The tasks are those of meta-training, and perceptrons
of width 192 to 512. One thread.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.meta_experiments import RESULTS, judge, without_runs
from benchmarks.storing import rounded, write_record
from hf_lopt.features import SMALL_FC
from hf_lopt.meta import data, mixtures, table, tasks
from hf_lopt.meta.construct import networks, small_fc
from hf_lopt.meta.theta import starting_weights
from hf_lopt.weights import EMBEDDED


RULE = "small_fc_lopt"
BEFORE = EMBEDDED / "earlier" / "small_fc_lopt.78b045a4c50f.safetensors"
CANDIDATES = ((1.3, 0.002), (1.3, 0.003), (4.0, 0.003))  # times the gradient, peak


def wide(part: str) -> list[tasks.Task]:
    ce, mse, digits = tasks.cross_entropy, tasks.squared_error, data.digits
    if part == "validation":
        found = [
            tasks.mlp("digits 256 x 2", (64, 256, 256, 10), digits, ce, batch=64),
            tasks.mlp("digits 512", (64, 512, 10), digits, ce),
            tasks.mlp("regions 256 x 2", (8, 256, 256, 6), partial(data.regions, seed=5), ce, "gelu"),
            tasks.mlp("functions 256", (8, 256, 4), partial(data.functions, seed=2), mse),
            tasks.transformer("lm 96 x 2", 96, 2, 32, heads=4),
        ]
    else:
        found = [
            tasks.mlp("digits 384 x 2", (64, 384, 384, 10), digits, ce, "gelu", batch=64),
            tasks.mlp("tumours 512", (30, 512, 2), data.tumours, ce),
            tasks.mlp("regions 512", (8, 512, 6), partial(data.regions, seed=11), ce, batch=64),
            tasks.mlp("autoencoder 192", (64, 192, 16, 192, 64), data.digit_images, mse, "tanh"),
            tasks.mlp("teacher 256 x 2", (16, 256, 256, 6), data.teacher, mse, "gelu", batch=64),
        ]
    return [replace(task, part=part) for task in found]


def candidate(times: float, peak: float) -> dict[str, Tensor]:
    """The constructed weights with another bound by the gradient and another peak."""
    leaves = {name: leaf.clone() for name, leaf in starting_weights(RULE, "constructed").items()}
    forms = (networks.columns(SMALL_FC, form) for form in (small_fc.DIRECTION, {("fac_g", 0): times}))
    mixtures.set_units(leaves["nn/~/w0"], networks.agreeing(*forms)[0])
    leaves["nn/~/w2"][:, 0] *= peak / small_fc.PEAK
    return leaves


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("validation", "test"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=4)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    for task in wide(args.part):
        tasks.add(task)
    found = {"before": starting_weights(RULE, str(BEFORE)), "constructed": starting_weights(RULE, "constructed")}
    if args.part == "validation":
        found |= {f"{times:g} times the gradient, peak {peak:g}": candidate(times, peak) for times, peak in CANDIDATES}
    found = {name: mixtures.narrowed(RULE, leaves) for name, leaves in found.items()}
    judged = without_runs(judge(RULE, found, args.part, args.steps, args.seeds))
    file = RESULTS / "small_fc_width.json"
    record = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    record |= {"machine": table.machine(), "command": "python -m benchmarks.small_fc_width PART", args.part: judged}
    write_record(file, rounded(record))


if __name__ == "__main__":
    main()
