"""A head on VeLO's scheduler (hf_lopt/meta/head.py) against the constructed weights, on the validation tasks.

    python -m benchmarks.meta_head judge --steps 200 1000     # -> benchmarks/results/meta_velo_scheduler.json
    python -m benchmarks.meta_head judge --seeds 8 --defaults # as a plain loop does by default, into the same file
    python -m benchmarks.meta_head robust                     # adapters, scaled losses, into the same file
    python -m benchmarks.meta_head long                       # 20,000 steps, into the same file
    python -m benchmarks.meta_head save FOLDER                # the weights of the chosen head
    python -m benchmarks.meta_head fresh --steps 300 1000 100 --seeds 8    # -> benchmarks/results/meta_fresh_velo.json

One thread. The numbers of the heads were chosen on the training tasks. ``fresh`` is the chosen head with the defaults
of a plain loop, that is with the floors of tensors near zero and the multiplier by the length of the run. After the
validation tasks it opens, once, test tasks that the head has not been on: those of hf_lopt/meta/fresh_tasks.py, and
the others with other starts and batches. It ships if its gain over all of them exceeds two standard errors.
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
from benchmarks.storing import rounded
from hf_lopt import least_sizes, rules
from hf_lopt.meta import data, evaluate, fresh_tasks, table, tasks, theta
from hf_lopt.meta.head import head_leaves
from hf_lopt.rules.base import FROM_SCRATCH
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


def _as_module(name: str, shape: Sequence[int]) -> str:
    """What a tensor of a task would be called in a module, by which its kind is known."""
    path, _, leaf = name.rpartition(".")
    if leaf in ("a", "b") and len(shape) == 2:
        return f"{path}.lora_{leaf.upper()}.weight"
    if leaf in ("w", "b"):
        return f"{path}.{'weight' if leaf == 'w' else 'bias'}"
    return f"{name}.weight" if "norm" in leaf else name


def user_settings(task: tasks.Task) -> dict[str, Any]:
    """The least sizes that an optimizer decides by default for the tensors of a task."""
    params = {name: p[0] for name, p in task.start(1, torch.Generator().manual_seed(0)).items()}
    names = [_as_module(name, p.shape) for name, p in params.items()]
    group = {"params": list(params.values()), "param_names": names, least_sizes.KEY: None}
    state: dict[Tensor, dict[str, Tensor]] = {p: {} for p in params.values()}
    least_sizes.decide([(p, group) for p in params.values()], state, "VeLO")
    return {least_sizes.KEY: {name: state[p][least_sizes.KEY].item() for name, p in params.items()}}


def bare(task: tasks.Task) -> dict[str, Any]:
    """The reference's settings."""
    return {}


def multiplier(steps: int) -> float:
    """The lr of a run of so many steps by default."""
    return rules.get("velo").run_lengths[FROM_SCRATCH].multiplier(steps)


def fresh(lengths: Sequence[int], seeds: int) -> None:
    """The chosen head on validation and fresh test tasks, for each length."""
    weights = {name: candidates()[name] for name in ("constructed", CHOSEN)}
    new = list(fresh_tasks.TASKS.values())
    again = [replace(task, name=f"{task.name}, new seeds") for task in tasks.of_part("test")]
    rates = {steps: multiplier(steps) for steps in lengths}
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for steps, lr in rates.items():
        for part, chosen in {"validation": tasks.of_part("validation"), "fresh": new + again}.items():
            judged = judge("velo", weights, part, steps, seeds, (lr,), chosen, user_settings)
            by_task = table.comparisons(judged["results"], CHOSEN, "constructed")
            of_new = [c for name, c in by_task.items() if name in fresh_tasks.TASKS]
            rows = {"all": evaluate.over_tasks(list(by_task.values()))}
            rows |= {"new kinds": evaluate.over_tasks(of_new)} if of_new else {}
            for name, c in (rows | by_task).items():
                row = found.setdefault(part, {}).setdefault(name.removesuffix(", new seeds"), {})
                row[str(steps)] = [c.ratio, *c.interval()]
            print(part, steps, {name: [c.ratio, *c.interval()] for name, c in rows.items()}, flush=True)
    command = f"fresh --steps {' '.join(map(str, lengths))} --seeds {seeds}"
    lr_by_steps = {str(steps): lr for steps, lr in rates.items()}
    about = {"seeds": seeds, "lr": lr_by_steps, "weights": CHOSEN, "against": "constructed"}
    write("meta_fresh_velo", rounded(about | found, 4), command, "meta_head")


def record(**new: Any) -> None:
    path = RESULTS / f"{FILE}.json"
    old = json.loads(path.read_text()) if path.is_file() else {}
    own = {key: x for key, x in old.items() if key not in ("machine", "command")}
    write(FILE, own | {"heads": HEADS, "chosen": CHOSEN} | new, "judge --steps 200 1000; robust; long", "meta_head")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("judge", "robust", "long", "fresh", "save"))
    parser.add_argument("folder", nargs="?", help="save: where to")
    parser.add_argument("--steps", type=int, nargs="+", default=(200,), help="judge, fresh: lengths of the runs")
    parser.add_argument("--defaults", action="store_true", help="judge: with what a plain loop does by default")
    parser.add_argument("--seeds", type=int, default=6)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.what == "judge":
        for steps in args.steps:
            rates, settings = (multiplier(steps) if args.defaults else 1.0,), user_settings if args.defaults else bare
            judged = judge("velo", candidates(), "validation", steps, args.seeds, rates, settings=settings)
            record(**{f"validation, {steps} steps{', defaults' * args.defaults}": without_runs(judged)})
    elif args.what == "robust":
        record(adapters=adapters(200, args.seeds), scaled=scaled(200, args.seeds))
    elif args.what == "long":
        task = tasks.named("functions_wide")
        curves = evaluate.learned(task, "velo", candidates()[CHOSEN], 20_000, 3, looks=20)
        found = {"task": task.name, **looks_of(curves)}
        print(found)
        record(long=found)
    elif args.what == "fresh":
        fresh(args.steps, args.seeds)
    else:
        save(candidates()[CHOSEN], args.folder, rule="velo")


if __name__ == "__main__":
    main()
