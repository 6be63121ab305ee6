"""What meta-training was tried on, with its results: benchmarks/results/meta_*.

    python -m benchmarks.meta_experiments bad-start            # trains for some minutes from bad weights, and judges
    python -m benchmarks.meta_experiments candidates RUN ...   # output folders of training against their start
    python -m benchmarks.meta_experiments scales RUN           # step sizes around that of a mixture
    python -m benchmarks.meta_experiments long                 # 20,000 steps with the embedded weights
    python -m benchmarks.meta_experiments figures              # the picture of meta_evaluation.json

One thread. The files hold final numbers; the course of a training is in the log of its folder. The table of all
embedded weights comes from ``python -m hf_lopt.meta evaluate``; docs/meta_training.md has the commands.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.storing import rounded, use_palette, write_record
from hf_lopt.meta import config, data, evaluate, export, mixtures, table, tasks, theta
from hf_lopt.meta.train import Trainer
from hf_lopt.plot import log_ticks
from hf_lopt.weights import content_sha256, publish


ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
BAD = {"p[0]": 1.0, "m_rsqrt_v[0]": 0.15}


def write(name: str, record: Mapping[str, Any], command: str, module: str = "meta_experiments") -> None:
    whole = {"machine": table.machine(), "command": f"python -m benchmarks.{module} {command}", **record}
    write_record(RESULTS / f"{name}.json", rounded(whole))


def without_runs(judged: Mapping[str, Any]) -> dict[str, Any]:
    """What is stored of `judge`: its summary, which has the mean losses, and not the loss of every run."""
    return {key: value for key, value in judged.items() if key != "results"}


def judge(
    rule: str,
    candidates: Mapping[str, Mapping[str, Tensor]],
    part: str,
    steps: int,
    seeds: int,
    rates: Sequence[float] | None = None,
    chosen: Sequence[tasks.Task] | None = None,
    settings: Callable[[tasks.Task], Mapping[str, Any]] = lambda task: {},
) -> dict[str, Any]:
    """Final losses of weights by task, compared with the first of them.

    Args:
        candidates: name -> weights.
        part: of the tasks.
        rates: the best of each task counts; None: those of :func:`hf_lopt.meta.table.rates_of`.
        chosen: other tasks than those of the part.
        settings: of a task -> those of the rule.

    Returns:
        `results`: task -> name -> final and mean training loss of every run. `summary`: name -> ratio of its geometric
        mean loss to that of the first candidate, with an interval of two standard errors over the tasks, and `tasks`:
        the same over the paired runs of each, with the mean final loss.
    """
    rates = table.rates_of(rule) if rates is None else rates
    results: dict[str, dict[str, Any]] = {}
    for task in tasks.of_part(part) if chosen is None else chosen:
        results[task.name] = {}
        for name, weights in candidates.items():
            rate, curves = evaluate.best_of(
                lambda lr, w=weights, t=task: evaluate.learned(t, rule, w, steps, seeds, lr, settings(t), looks=1),
                rates,
            )
            results[task.name][name] = {"lr": rate, "final": curves.final.tolist(), "train": curves.train.tolist()}
        print(task.name, {name: sum(row["final"]) / seeds for name, row in results[task.name].items()}, flush=True)
    first = next(iter(candidates))
    summary = {}
    for name in candidates:
        own = table.comparisons(results, name, first)
        total = evaluate.over_tasks(list(own.values()))
        summary[name] = {"ratio": total.ratio, "interval": total.interval()}
        summary[name]["tasks"] = {
            task: {"ratio": c.ratio, "interval": c.interval(), "loss": sum(results[task][name]["final"]) / seeds}
            for task, c in own.items()
        }
        print(name, f"{total.ratio:.4f}", [f"{x:.4f}" for x in total.interval()], flush=True)
    return {"part": part, "steps": steps, "seeds": seeds, "against": first, "results": results, "summary": summary}


def bad_start() -> None:
    """Train from a mixture that mostly follows the parameter, then judge on the validation tasks."""
    weights = mixtures.mixture_leaves("celo2", theta.starting_weights("celo2", "constructed"), BAD)
    folder, run = ROOT / "build" / "bad_start", ROOT / "build" / "bad_start_run"
    shutil.rmtree(run, ignore_errors=True)
    publish.save(weights, folder, rule="celo2")
    trainer = Trainer(config.read(ROOT / "recipes" / "meta" / "bad_start.yaml"), run)
    start = time.perf_counter()
    trainer.run()
    seconds = time.perf_counter() - start
    found = {"start": weights, "trained": trainer.theta()}
    found["constructed"] = theta.starting_weights("celo2", "constructed")
    judged = without_runs(judge("celo2", found, "validation", 200, 4, (3e-3, 1e-2)))
    steps = trainer.search.steps_per_call * trainer.steps
    write("meta_bad_start", {"seconds": seconds, "particle_steps": steps, **judged}, "bad-start")


def last_of(run: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The last weights of a training folder; its configuration, time, speed and last numbers."""
    weights, provenance = export.load(run, last=True)
    log = [json.loads(line) for line in (Path(run) / "log.jsonl").open()]
    speed = sorted(entry["particle_steps_per_second"] for entry in log if "meta_loss" in entry)
    seconds = torch.load(Path(run) / "checkpoint.pt", weights_only=True)["seconds"]
    keep = ("step", "meta_loss", "best", "gradient_norm", "distance")
    last = {k: v for k, v in log[-1].items() if k in keep or k.startswith(("mixture/", "selection/"))}
    return weights, {
        "provenance": provenance,
        "last": last,
        "seconds": seconds,
        "median_speed": speed[len(speed) // 2],
    }


def candidates(runs: Sequence[str], part: str, steps: int, seeds: int) -> None:
    """The last weights of training folders of one rule against the constructed ones."""
    record: dict[str, Any] = {}
    found: dict[str, Mapping[str, Tensor]] = {}
    for run in runs:
        found[Path(run).name], record[Path(run).name] = last_of(run)
    rules_of = {run["provenance"]["rule"] for run in record.values()}
    if len(rules_of) != 1:
        raise ValueError(f"runs of one rule can be compared, these are of {', '.join(sorted(rules_of))}")
    (rule,) = rules_of
    found = {"constructed": theta.starting_weights(rule, "constructed"), **found}
    judged = without_runs(judge(rule, found, part, steps, seeds))
    write(
        f"meta_candidates_{rule}_{part}_{steps}",
        {**judged, "runs": record},
        f"candidates RUN ... --part {part} --steps {steps} --seeds {seeds}",
    )


def scales(run: str, factors: Sequence[float], steps: int, seeds: int, save: float | None) -> None:
    """A mixture with its ``log_scale`` times several factors, on the validation tasks and on two larger models.

    ``save``: the factor whose weights go to build/NAME_scaled.
    """
    _, trained = last_of(run)
    provenance = trained["provenance"]
    rule, start = provenance["rule"], theta.starting_weights(provenance["rule"], "constructed")
    last = trained["last"].items()
    numbers = {key.removeprefix("mixture/"): value for key, value in last if key.startswith("mixture/")}

    def scaled(factor: float) -> dict[str, Tensor]:
        return mixtures.mixture_leaves(rule, start, numbers | {"log_scale": factor * numbers["log_scale"]})

    if save is not None:
        folder, weights = ROOT / "build" / f"{Path(run).name}_scaled", scaled(save)
        publish.save(weights, folder, rule=rule)
        changed = {"sha256": content_sha256(weights), "mixture": numbers, "log_scale_factor": save}
        (folder / export.PROVENANCE).write_text(json.dumps(provenance | changed, indent=2) + "\n")
    found = {"constructed": start} | {f"{factor:g}": scaled(factor) for factor in factors}
    found = {name: mixtures.narrowed(rule, weights) for name, weights in found.items()}
    wide = (64, 256, 256, 10)
    larger = [
        (tasks.transformer("transformer, two layers of 96", 96, 2, 32, part="validation"), 2),
        (tasks.mlp("perceptron 64-256-256-10", wide, data.digits, tasks.cross_entropy, part="validation"), 4),
    ]
    record: dict[str, Any] = {"steps": 200, "loss": {}, "ratio": {}}
    for task, count in larger:
        own = {name: evaluate.learned(task, rule, w, 200, count, looks=1).final for name, w in found.items()}
        record["loss"][task.name] = {name: losses.mean().item() for name, losses in own.items()}
        first = own["constructed"]
        record["ratio"][task.name] = {name: evaluate.paired(x, first).ratio for name, x in own.items()}
        print(task.name, record["ratio"][task.name], flush=True)
    judged = without_runs(judge(rule, found, "validation", steps, seeds))
    write(
        f"meta_scale_{rule}_{steps}",
        {**judged, "numbers": numbers, "larger": record, "runs": {Path(run).name: trained}},
        f"scales RUN --steps {steps} --seeds {seeds} --factors {' '.join(f'{x:g}' for x in factors)}",
    )


def looks_of(curves: evaluate.Curves) -> dict[str, Any]:
    """Of a long run: mean loss at four of twenty looks, the lowest one, the largest rise from one look to the next."""
    mean = curves.losses.mean(0)
    at = [len(mean) * k // 20 - 1 for k in (1, 5, 10, 20)]
    rise = (mean[1:] / mean[:-1]).max().item() - 1.0
    record = {"at": curves.steps[at].tolist(), "loss": mean[at].tolist(), "lowest": mean.min().item()}
    return record | {"largest rise": rise}


def long_runs(steps: int, seeds: int) -> None:
    """Long runs on one small task."""
    task, record = tasks.named("functions_wide"), {}
    for name in ("velo", "celo", "small_fc_lopt", "celo2"):
        lr = 3e-3 if name == "celo2" else 1.0
        weights = theta.starting_weights(name, "bundled")
        curves = evaluate.learned(task, name, weights, steps, seeds, lr, looks=20)
        record[name] = {"lr": lr, **looks_of(curves)}
        print(name, record[name], flush=True)
    curves = evaluate.adamw(task, steps, seeds, 1e-3, looks=20)
    record["AdamW"] = {"lr": 1e-3, **looks_of(curves)}
    print("AdamW", record["AdamW"], flush=True)
    write(
        "meta_long",
        {"task": task.name, "steps": steps, "seeds": seeds, "runs": record},
        f"long --steps {steps} --seeds {seeds}",
    )


def figures() -> None:
    """benchmarks/results/meta_evaluation.png from the JSON file beside it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    path = RESULTS / "meta_evaluation.json"
    if path.is_file():
        record = json.loads(path.read_text())
        names = [name for name in next(iter(record["results"].values())) if name != table.TUNED]
        figure, axes = plt.subplots(figsize=(9, 5.6), constrained_layout=True)
        shades = plt.get_cmap("tab20")(range(0, 40, 2) if len(names) < 11 else range(20))
        for k, name in enumerate(names):
            own = list(table.comparisons(record["results"], name, table.TUNED).values())
            places = [i + 0.8 * (k / len(names) - 0.5) for i in range(len(own))]
            ratios = [c.ratio for c in own]
            bars = [[c.ratio - c.interval()[0] for c in own], [c.interval()[1] - c.ratio for c in own]]
            marker = "s" if name.startswith("AdamW") else "o"
            axes.errorbar(places, ratios, bars, fmt=marker, color=shades[k], label=name, markersize=5)
        axes.axhline(1.0, color="black", linewidth=0.8)
        log_ticks(axes.yaxis)
        tasks_in_two_lines = [name.replace("_", "\n", 1) for name in record["results"]]
        axes.set_xticks(range(len(tasks_in_two_lines)), tasks_in_two_lines)
        axes.set(xlabel="test task", ylabel="final fresh loss / tuned AdamW's (log scale)")
        axes.set_title(f"{record['steps']} steps, {record['seeds']} paired seeds, two standard errors", fontsize=10)
        figure.legend(fontsize=8, frameon=False, loc="outside center right")
        figure.savefig(RESULTS / "meta_evaluation.png", dpi=90)
        use_palette(RESULTS / "meta_evaluation.png", 32)
        plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("bad-start", "candidates", "scales", "long", "figures"))
    parser.add_argument("runs", nargs="*", help="output folders of python -m hf_lopt.meta train; scales: one")
    parser.add_argument("--factors", type=float, nargs="+", default=(0.0, 0.25, 0.5, 0.75, 1.0), help="for scales")
    parser.add_argument("--save", type=float, help="scales: the factor whose weights are written to build/")
    parser.add_argument("--part", default="validation", choices=("validation", "test"))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", type=int, default=4)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.what == "bad-start":
        bad_start()
    elif args.what == "candidates":
        candidates(args.runs, args.part, args.steps or 200, args.seeds)
    elif args.what == "scales":
        scales(args.runs[0], args.factors, args.steps or 300, args.seeds, args.save)
    elif args.what == "long":
        long_runs(args.steps or 20_000, args.seeds)
    else:
        figures()


if __name__ == "__main__":
    main()
