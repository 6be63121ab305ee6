"""Every optimizer on the language model recipe from embedded weights, AdamW beside it: `python -m benchmarks.recipes`.

Runs recipes/causal_lm.py with every name of hf_lopt.available(), all arguments at their defaults, and writes
benchmarks/results/recipes.json (first and final numbers of the runs) and recipes.md. Fine-tuning is in comparison.py.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import hf_lopt
from benchmarks.storing import rounded, write_record


ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
RECIPE = "causal_lm"
TUNED = "adamw_torch=1e-3"  # beside AdamW at Trainer's default rate
METRIC = "perplexity"


def run(names: list[str], steps: int, folder: Path) -> dict:
    first, *others = names
    command = [sys.executable, str(ROOT / "recipes" / f"{RECIPE}.py"), "--optim", first, "--compare", *others]
    command += ["adamw_torch", TUNED, "--max_steps", str(steps), "--no_checkpoints", "--output_dir", str(folder)]
    subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def first_and_final(run: dict, metric: str) -> dict:
    """A run of metrics.json without its curves: the first and the final numbers of each kind."""
    train = [row["loss"] for row in run["history"] if "loss" in row]
    held_out = [row["eval_loss"] for row in run["history"] if "eval_loss" in row]
    kept = {key: x for key, x in run.items() if key != "history"}
    kept["first"] = {"train_loss": train[0], "eval_loss": held_out[0]}
    kept["final"] = {"train_loss": train[-1]} | {
        f"eval_{key}": run["final"][f"eval_{key}"] for key in ("loss", metric)
    }
    kept["finite"] = all(x is not None and math.isfinite(x) for x in train)
    return rounded(kept, 6)


def rows(metrics: dict) -> list[str]:
    out = []
    for name, result in metrics["runs"].items():
        first, final = result["first"], result["final"]
        schedule = f"{result['learning_rate']:g}, {result['lr_scheduler_type']}"
        out.append(
            f"| {name} | {schedule} | {first['train_loss']:.3f} → {final['train_loss']:.3f} | "
            f"{first['eval_loss']:.3f} → {final['eval_loss']:.3f} | {final['eval_' + METRIC]:.3f} | "
            f"{result['seconds']:.0f} |{'' if result['finite'] else ' not finite |'}"
        )
    return out


def render(metrics: dict) -> str:
    """The page of the table."""
    versions = ", ".join(f"{key} {value}" for key, value in metrics["versions"].items())
    text = [
        f"# All optimizers on {RECIPE}",
        "",
        f"{metrics['arguments']['max_steps']} steps, seed {metrics['arguments']['seed']}, one run each, embedded "
        f"weights, the rest at its defaults; CPU, {metrics['machine']['threads']} threads, {versions}, "
        f"{metrics['date']}. Seconds include evaluation.{' ' + metrics['note'] if metrics.get('note') else ''}",
        "",
        f"| optimizer | lr, schedule | training loss, first → last | held-out loss | {METRIC} | s |",
        "| --- | --- | --- | --- | ---: | ---: |",
        *rows(metrics),
        "",
    ]
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of every run (default: 200)")
    parser.add_argument("--names", nargs="+", default=list(hf_lopt.available()))
    parser.add_argument("--note", help="what a reader should know about these runs, such as what else was running")
    parser.add_argument("--draw", action="store_true", help="only write the page again")
    options = parser.parse_args()
    file = RESULTS / "recipes.json"
    if not options.draw:
        with tempfile.TemporaryDirectory() as folder:
            metrics = run(options.names, options.steps, Path(folder))
        metrics["arguments"].pop("output_dir")  # a folder of this machine
        metrics["runs"] = {name: first_and_final(run, METRIC) for name, run in metrics["runs"].items()}
        metrics |= {"note": options.note, "date": datetime.date.today().isoformat()}
        metrics["machine"]["processor"] = platform.machine()
        write_record(file, metrics)
    (RESULTS / "recipes.md").write_text(render(json.loads(file.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
