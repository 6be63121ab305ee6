"""A head on VeLO's scheduler (hf_lopt/meta/head.py) against the constructed weights, on the validation tasks.

    python -m benchmarks.meta_head judge --steps 200 1000     # -> benchmarks/results/meta_velo_scheduler.json
    python -m benchmarks.meta_head robust                     # adapters, scaled losses, into the same file
    python -m benchmarks.meta_head long                       # 20,000 steps, into the same file
    python -m benchmarks.meta_head save FOLDER                # the weights of the chosen head

One thread. The numbers of the heads were chosen on the training tasks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.meta_experiments import RESULTS, judge, looks_of, without_runs, write
from hf_lopt.meta import data, evaluate, tasks, theta
from hf_lopt.meta.head import head_leaves
from hf_lopt.weights import save


HEADS = {
    "small vectors": {"small_vector[0]": 5.0},
    "small vectors, g": {"small_vector[0]": 5.0, "fac_g[0]": 0.6},
}
CHOSEN = "small vectors, g"
SCALES, FLOORS = (0.001, 100.0), (0.0, 0.01, 0.1)
FILE = "meta_velo_scheduler"


def candidates() -> dict[str, Mapping[str, Tensor]]:
    start = theta.starting_weights("velo", "constructed")
    return {"constructed": start} | {name: head_leaves(start, numbers) for name, numbers in HEADS.items()}


def finals(task: tasks.Task, steps: int, seeds: int, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Mean final losses of all candidates, and their ratio to the constructed weights'."""
    runs = {
        name: evaluate.learned(task, "velo", weights, steps, seeds, settings=settings, looks=1).final
        for name, weights in candidates().items()
    }
    ratios = {name: evaluate.paired(final, runs["constructed"]) for name, final in runs.items()}
    print(task.name, {name: f"{c.ratio:.3f} ± {2 * c.error * c.ratio:.3f}" for name, c in ratios.items()}, flush=True)
    return {
        name: {"loss": final.mean().item(), "ratio": ratios[name].ratio, "interval": ratios[name].interval()}
        for name, final in runs.items()
    }


def adapters(steps: int, seeds: int) -> dict[str, Any]:
    """Low-rank adapters, whose second matrices start at zero, by the floor of the step size; beside AdamW."""
    task = tasks.lora(
        "wide_adapters", tasks.named("characters_wide"), partial(data.text, window=24, capitals=True), rank=4
    )
    task = replace(task, part="validation")
    found = {str(floor): finals(task, steps, seeds, {"min_param_scale": floor}) for floor in FLOORS}
    rate, curves = evaluate.best_of(lambda lr: evaluate.adamw(task, steps, seeds, lr, looks=1), (3e-3, 1e-2, 3e-2))
    return {"steps": steps, "floors": found, "AdamW": {"lr": rate, "loss": curves.final.mean().item()}}


def scaled(steps: int, seeds: int) -> dict[str, Any]:
    """The same runs with a loss that is multiplied by a number."""
    found: dict[str, Any] = {"steps": steps}
    for name in ("digits_wide", "functions_wide", "digits_conv_wide"):
        task = tasks.named(name)
        for scale in SCALES:
            loss = partial(lambda own, c, *pair: c * own(*pair), task.loss, scale)
            found[f"{name}, {scale:g}"] = finals(replace(task, loss=loss), steps, seeds)
    return found


def record(**new: Any) -> None:
    path = RESULTS / f"{FILE}.json"
    old = json.loads(path.read_text()) if path.is_file() else {}
    own = {key: x for key, x in old.items() if key not in ("machine", "command")}
    write(FILE, own | {"heads": HEADS, "chosen": CHOSEN} | new, "judge --steps 200 1000; robust; long", "meta_head")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("judge", "robust", "long", "save"))
    parser.add_argument("folder", nargs="?", help="save: where to")
    parser.add_argument("--steps", type=int, nargs="+", default=(200,), help="judge: lengths of the runs")
    parser.add_argument("--seeds", type=int, default=6)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.what == "judge":
        for steps in args.steps:
            judged = judge("velo", candidates(), "validation", steps, args.seeds)
            record(**{f"validation, {steps} steps": without_runs(judged)})
    elif args.what == "robust":
        record(adapters=adapters(200, args.seeds), scaled=scaled(200, args.seeds))
    elif args.what == "long":
        task = tasks.named("functions_wide")
        curves = evaluate.learned(task, "velo", candidates()[CHOSEN], 20_000, 3, looks=20)
        found = {"task": task.name, **looks_of(curves)}
        print(found)
        record(long=found)
    else:
        save(candidates()[CHOSEN], args.folder, rule="velo")


if __name__ == "__main__":
    main()
