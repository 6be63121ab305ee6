"""Which multiplier of the step size suits a run of N steps: rules with a schedule of their own, on validation tasks.

    python -m benchmarks.run_length sweep velo celo celo_adam     # -> benchmarks/results/run_length.json
    python -m benchmarks.run_length sweep velo --steps 3000 --multipliers 0.35 0.5 0.7 1 1.4 2
    python -m benchmarks.run_length sweep celo --weights FILE     # published ones
    python -m benchmarks.run_length fit                           # -> the rules of a power, and run_length.md

All multipliers and seeds of a task run side by side, paired: the same starts and the same batches. The loss is that on
samples that are never trained on. Twelve of the tasks from scratch are models of transformers, one run after another
(benchmarks/small_models.py). Fine-tuning starts from parameters that AdamW has trained on other data, and its
multipliers count times 0.05. One thread. The recipes of this package take no part.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import small_models
from benchmarks.meta_experiments import RESULTS
from benchmarks.storing import rounded, write_record
from hf_lopt import rules
from hf_lopt.meta import data, evaluate, table, tasks, theta
from hf_lopt.meta.particles import Particles
from hf_lopt.meta.search import seeded
from hf_lopt.reach import reach_of
from hf_lopt.rules.base import FROM_SCRATCH


STEPS = (30, 100, 300, 1000)
MULTIPLIERS = (0.5, 1.0, 2.0, 2.8, 4.0, 5.6, 8.0)
FINETUNE = 0.05
FAILED = 1e3  # the loss of a run that has failed
FILE = RESULTS / "run_length.json"
SHIPPED = """\
From scratch (1000 / N)^1/2 ships, from 1 to 5, and (20 / R)^1.5 times that where a model's reach R is above 20. What
the best multiplier depends on most is how large the matrices start: a T5 of width 64, which starts at 1 / sqrt(width),
is best at 1 from 50 steps on, and at 5.6 after 50, with a lower loss, where all starting values count 0.2; a BART
the other way round; a Llama with the standard deviation 0.02 is best at 4 with a width of 64, at 2 with 256 and at 1
with 512; a T5 of four layers wants less than one of two. The number that tells these apart is the reach
(hf_lopt/reach.py). Before, all had (300 / N)^0.9: on these tasks velo was at 0.70, 0.78, 0.91 and 1.00 of the loss
with 1, at 30, 50, 100 and 300 steps, where it is at 0.67, 0.68, 0.67 and 0.85 now; published Celo, with (200 / N)^0.9,
at 0.76, 0.96, 1.01 and 1.00, where it is at 0.77, 0.82, 0.82 and 0.91.

Weights that are not embedded have (300 / N)^1/2. Published Celo wants shorter steps in models that reach far, whatever
the length of the run: a tenth of the loss after 1,000 steps of the T5 and the BART of full size. A Llama of width 512
ends 300 steps with half the step at 0.86 of its loss, one of width 64 that starts at 1 / sqrt(width) at 1.04
(throw-away runs, one and two seeds). It has 0.7 there at the least. Velo has 1: after 300 steps the T5 is best there,
the Llama of width 512 would be at 0.95 with half the step (one seed). At 300 steps and more digits are best at 0.5
with both.

Fine-tuning has (150 / N)^0.9 from 1 to 2 with embedded weights. These tasks, and four with a new head
(`python -m benchmarks.new_layers --lengths`), would have twice the step up to 300 steps, and 2.8 times at 50. Checked
on recipes, which take no part in choosing, both are too long: with (300 / N)^0.9 the film reviews end after 128 steps
at a held-out loss of 0.502 rather than 0.476, with up to 3 times after 50 steps at 0.562 rather than 0.531, labels of
words at 0.0844 rather than 0.0837. Others have (100 / N)^0.9: with twice its step published Celo is better on
docstrings at 50 steps, 0.66 for 0.92, and worse at 100, 0.53 for 0.48.

New layers start from random numbers and have (300 / N)^0.9, from 1 to 5, others (200 / N)^0.9
(`python -m benchmarks.new_layers --heads`): velo gains on all four tasks, docstrings 0.800 to 0.653 at 50 steps, 0.533
to 0.494 at 100; published Celo on all but docstrings at 100, 0.481 to 0.506; Celo-Adam's differ by less than their
errors. Film reviews end at 0.476 rather than 0.482 after 128 steps, labels of words at 0.0830 rather than 0.0837 after
50.

What a long fine-tuning wants depends on how often it sees its samples (`python -m benchmarks.epochs`, mostly one
seed). Up to four epochs no multiplier below 1 is right for all: after three, MiniLM tells the times of headlines
better with half the step, 0.974 for 1.063, kinds of tokens worse, 0.112 for 0.083; after two, beginnings of docstrings
are best at 1. From eight on the whole step learns by heart: with 600 headlines velo ends at 2.89, where chance is
1.10, with half of it at 1.55; 600 beginnings 1.84 and 0.98, with published Celo 3.13 and 1.68; after sixteen epochs of
300 at 3.23, with a quarter at 1.14, with an eighth at 1.42. So a model that reaches further than 20 takes 4 / epochs
of the step, and its new layers (4 / epochs)^2: after eight epochs of 600 headlines that is 1.24 rather than 1.55, of
600 beginnings 0.92 rather than 0.98; of 300 beginnings 1.23 rather than 1.15. With the power 3 the first is at 1.08
and the last at 1.29, and all runs together are within 1 % of what they are with 2. On eleven runs of more than four
epochs velo's loss is 0.70 times that with the whole step; two of them lose, a MiniLM cut to its first layer 22 %,
kinds of tokens 14 %. Three small models, which reach less, end after 1,000 steps, up to 25 epochs, at 1.8 to 2.4 times
the loss with 0.3 (`python -m benchmarks.new_layers --longer`): they keep the whole step. So does one epoch, however
long: of 33,936 blocks of source code, 1,000 steps, it ends at 0.086, with half at 0.100 (a throw-away run).

Adapters take 4 / epochs of the step from scratch. With LoRA on that MiniLM four epochs want the whole step (600
beginnings 1.03, with half of it 1.26); eight epochs of 600 beginnings end at 1.03 with half of it rather than 1.28,
headlines at 1.04 rather than 1.48, kinds of tokens at 0.246 rather than 0.199; on seven runs 0.79 times the loss. The
power 1/2 would have the same mean: what kinds of tokens lose less headlines lose more. SmolLM2-135M with LoRA, after
eight epochs of 60 blocks of docstrings: at 4.81 with the whole step, where it begins at 4.08, at 4.40 with 0.7, at
4.09 with half (throw-away runs). A Llama of two layers loses 1 %, as it does not learn by heart. Checked on the recipe
with argparse's own documentation, which repeats itself: eight epochs of 52 blocks end at 1.24 rather than 1.10, AdamW
with 1e-3 at 1.43, with 3e-3 at 1.10.

Where the epochs are known, under Trainer, Accelerate and Lightning, this holds by itself; other loops set
`num_epochs`. Checked on film reviews: eight epochs of 600 end at 1.35 rather than 2.99, AdamW with Trainer's 5e-5 at
1.00, with 2e-5 at 0.50; with `lr=0.03`, which new layers have then, too, at 0.70, with 0.01 at 0.53.

From scratch epochs count nothing. After 64 epochs of 300 samples half the step is better on six of eight small models,
digits at 0.22 rather than 0.46; but 64 epochs of 2,136 pictures of letters end at 3.77 rather than 3.28 with a ViT, at
1.21 rather than 1.18 with a ResNet, and 24 epochs of 800 words that a T5 sorts at 0.09 rather than 0.01 (throw-away
runs, one seed).

Celo-Adam's ends at 200: Adam's step is not relative to the size of a tensor. Small models still gain from longer steps
at 200 and 300, but a language model of four layers with sd 0.02 loses 5 % at 200 with 1.4 and is best below 1, and the
recipe causal_lm, of four layers too, ended at 5.28 with 1.44 and at 4.75 with 1.

At 3,000 steps the language model characters_wide is best at 1 with both rules (velo: x0.5 1.018, x2 1.039; celo:
1.028, 1.040), and at 10,000 with velo (x0.5 1.018, x2 fails). digits_wide is best at 0.5 at 3,000: it has learned its
samples by heart, and further steps cost loss.

small_fc and μLO have none. Their step is constant in time, and their best multiplier depends on the task, not on the
length: language models are best at 0.5 to 2 at 30, 100 and 300 steps, digits and convolutions at 2 to 8. RNN-MLP has a
step relative to the tensor as VeLO has, and gains from 2 to 4 at 30 steps; longer runs were not swept, and the rule is
not told the length. For a short run multiply its lr.

At 1,000 steps AdamW at the best of three rates ends at 0.94 ± 0.04 of velo's loss on characters_wide, at 0.93 ± 0.02
with sd 0.02 (4 seeds, two standard errors; `python -m benchmarks.velo_schedule`, velo_schedule.json). On the first a
schedule that stays at the peak for 70 % of the run makes up most of it, 0.96 ± 0.02; on the second none does: it is at
0.99 ± 0.04, a linear decay at 1.01 ± 0.02, 1.4 times the step at 0.98 ± 0.01. On digits the longer peak costs up to
1.6 times the loss. So the schedule stays.
"""
ADAPTERS = "adapters on characters_wide"
SETTINGS = {ADAPTERS: {"min_param_scale": 0.1}}  # of A, too; by default it is 0.05 of B
LM_START = 0.02  # standard deviation of what transformers initialises


@dataclass(frozen=True)
class Pretrained(tasks.Task):
    """A task that starts from parameters which were trained on something else."""

    trained: Callable[[], dict[str, Tensor]] = field(default=dict)

    def start(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {name: p.expand(count, *p.shape[1:]).clone() for name, p in self.trained().items()}


def pretrained(task: tasks.Task, before: tasks.Task, steps: int) -> tasks.Task:
    """``task`` from what AdamW makes of the same model on ``before`` in so many steps."""
    trained = functools.cache(lambda: tasks._trained(before, steps))
    known = {name: getattr(task, name) for name in task.__dataclass_fields__}
    return Pretrained(**(known | {"name": f"{task.name} pretrained"}), trained=trained)


def small_start(task: tasks.Task) -> tasks.Task:
    """The same language model with the starting values that transformers gives it."""
    scales = {name: scale if scale is None or scale == 0.0 else LM_START for name, scale in task.scales.items()}
    return replace(task, name=f"{task.name}, sd 0.02", scales=scales)


def scratch() -> dict[str, tasks.Task]:
    """Validation tasks from scratch, most of them language models."""
    wide = tasks.transformer("lm 48 x 2", 48, 2, 32, heads=4, part="validation")
    found = [tasks.named(name) for name in ("characters_wide", "digits_wide", "functions_wide", "digits_conv_wide")]
    found += [tasks.named("autoencoder_relu"), small_start(tasks.named("characters_wide")), small_start(wide)]
    narrow, capitals = tasks.named("characters_wide"), partial(data.text, window=24, capitals=True)
    found.append(small_start(tasks.transformer("lm 64 x 4", 64, 4, 48, heads=4, part="validation")))
    found.append(replace(tasks.lora(ADAPTERS, narrow, capitals, rank=4), part="validation"))
    return {task.name: task for task in found}


def finetuning() -> dict[str, tasks.Task]:
    """Pretrained models on what they do not know: capitals only, far from it; and other samples of the same, close."""
    lm = tasks.transformer("lm 48 x 2", 48, 2, 32, heads=4, part="validation")
    capitals = replace(lm, data=partial(data.text, window=32, capitals=True), name="capitals")
    digits = tasks.named("digits_wide")
    found = [
        pretrained(capitals, lm, 1500),
        pretrained(lm, replace(lm, part="train"), 1500),
        pretrained(digits, replace(digits, part="train"), 300),
    ]
    return {task.name: task for task in found}


def finals_of_model(
    task: small_models.Task, rule: str, weights: str, steps: int, seeds: int, multipliers: Sequence[float]
) -> Tensor:
    """As :func:`finals`, with the optimizer itself, one run after another; ``weights``: as it takes them."""
    losses = torch.tensor(
        [[small_models.final_loss(task, seed, steps, rule, m, weights) for seed in range(seeds)] for m in multipliers]
    )
    return losses.nan_to_num(math.inf)


def finals(
    task: tasks.Task, rule: str, leaves: Mapping[str, Tensor], steps: int, seeds: int, multipliers: Sequence[float]
) -> Tensor:
    """Loss on fresh samples at the end of every run, (multipliers, seeds); inf where one has failed."""
    count = seeds * len(multipliers)
    settings = {key: x for key, x in SETTINGS.get(task.name, {}).items() if key in rules.get(rule).defaults}
    particles = Particles(rule, task.shapes, count, settings)
    particles.set_weights({name: leaf.expand(count, *leaf.shape) for name, leaf in leaves.items()})
    samples, generator = task.samples(), seeded("run length", task.name)
    start = task.start(seeds, generator)
    repeated = {name: p.repeat(len(multipliers), *[1] * (p.dim() - 1)) for name, p in start.items()}
    particles.restart(range(count), repeated)
    rates = torch.tensor(multipliers, dtype=torch.float32).repeat_interleave(seeds)
    horizons = torch.full((count,), steps, dtype=torch.int64)
    for _ in range(steps):
        batch = samples.batch(seeds, task.batch, generator)
        now, gradients = evaluate.losses_and_gradients(task, particles.params, batch)
        particles.update(gradients, now, rates, horizons)
    fresh = (samples.batch(seeds, task.batch, generator, fresh=True) for _ in range(evaluate.FRESH_BATCHES))
    losses = evaluate.mean_losses(task, particles.params, fresh)
    losses[particles.failed | ~losses.isfinite()] = math.inf
    return losses.view(len(multipliers), seeds)


def weights_in(rule: str, file: str) -> Mapping[str, Tensor]:
    return rules.get(rule).load_weights(file).theta


def sweep(
    names: Sequence[str],
    lengths: Sequence[int],
    multipliers: Sequence[float],
    seeds: int,
    only: Sequence[str],
    file: str | None,
) -> None:
    """Run everything that the record does not have yet; ``file``: published weights."""
    record = json.loads(FILE.read_text()) if FILE.is_file() else {"runs": {}}
    kinds = {"from scratch": scratch() | small_models.TEXTS, "fine-tuning": finetuning()}
    for kind, found in kinds.items():
        for rule in names:
            label = rule if file is None else f"{rule}, published weights"
            leaves = theta.starting_weights(rule, "constructed") if file is None else weights_in(rule, file)
            for steps in lengths:
                for name, task in found.items():
                    if only and name not in only:
                        continue
                    of_kind = record["runs"].setdefault(f"{label} | {kind}", {})
                    done = of_kind.setdefault(name, {}).setdefault(str(steps), {})
                    missing = [m for m in multipliers if f"{m:g}" not in done]
                    if not missing:
                        continue
                    begin = time.perf_counter()
                    scale = FINETUNE if kind == "fine-tuning" else 1.0
                    if isinstance(task, small_models.Task):
                        rows = finals_of_model(task, rule, file or "bundled", steps, seeds, missing)
                    else:
                        rows = finals(task, rule, leaves, steps, seeds, [m * scale for m in missing])
                    means = rows.clamp_max(FAILED).log().mean(1).exp().tolist()
                    done |= {f"{m:g}": mean for m, mean in zip(missing, means, strict=True)}
                    shown = {m: f"{mean:.3f}" for m, mean in zip(missing, means, strict=True)}
                    print(
                        f"{time.perf_counter() - begin:5.0f} s  {label} | {kind} | {name} | {steps}  {shown}",
                        flush=True,
                    )
                    record |= {"machine": table.machine(), "finetune": FINETUNE}
                    write_record(FILE, rounded(record, 3))


def relative(record: dict[str, Any]) -> dict[tuple[str, str, int], dict[str, dict[float, float]]]:
    """(rule, kind, steps) -> task -> multiplier -> the loss relative to that at 1."""
    found: dict[tuple[str, str, int], dict[str, dict[float, float]]] = {}
    for key, by_task in record["runs"].items():
        rule, kind = key.split(" | ")
        for task, by_length in by_task.items():
            for steps, runs in by_length.items():
                found.setdefault((rule, kind, int(steps)), {})[task] = _relative(runs)
    return found


def _relative(runs: Mapping[str, float]) -> dict[float, float]:
    return {m: runs[f"{m:g}"] / runs["1"] for m in sorted(map(float, runs))}


def interpolated(runs: Mapping[float, float], m: float) -> float:
    """The logarithm of the loss relative to that at 1, between multipliers that were run."""
    below = max(x for x in runs if x <= m)
    above = min((x for x in runs if x >= m), default=below)  # where m is above all of them
    part = 0.0 if below == above else math.log(m / below) / math.log(above / below)
    return (1 - part) * math.log(runs[below]) + part * math.log(runs[above])


def reach_in(task: tasks.Task | small_models.Task) -> float:
    """The reach of a task's matrices before the first step; tables and adapters do not count."""
    if isinstance(task, small_models.Task):
        torch.manual_seed(0)
        model = task.model()  # which has to live: what a tensor is comes from its module
        return reach_of((p, {}) for p in model.parameters())
    start = task.start(1, seeded("reach", task.name))
    names = [name for name in start if name not in ("embedding", "position")] if task.name != ADAPTERS else []
    return reach_of((start[name][0], {"axis_order": "jax"}) for name in names)


def kept(compared: Mapping[tuple[str, str, int], Mapping[str, Mapping[float, float]]]) -> list[str]:
    """By rule and length, from scratch: the loss relative to that at 1 with what ships, and with the length alone.

    ``compared``: see :func:`relative`.
    """
    found, lines = scratch() | small_models.TEXTS, []
    reaches = {name: reach_in(task) for name, task in found.items()}
    for (rule, kind, steps), by_task in sorted(compared.items()):
        name = rule.partition(",")[0]
        if kind != "from scratch" or not rules.get(name).run_lengths or len(by_task) < 4:
            continue
        length = rules.get(name).run_lengths[FROM_SCRATCH].with_weights("published" not in rule)
        cells = []
        for words, count_reach in (("as it ships", True), ("without the reach", False)):
            logs = torch.tensor(
                [
                    interpolated(runs, length.multiplier(steps, reaches[task] if count_reach else 0.0))
                    for task, runs in by_task.items()
                ]
            )
            error = 2 * logs.std().item() / math.sqrt(len(logs))
            cells.append(f"{words} {logs.mean().exp():.3f} ± {error * logs.mean().exp():.3f}")
        lines.append(f"- {rule}, {steps} steps, {len(by_task)} tasks: {'; '.join(cells)}")
    told = ", ".join(f"{name} {x:.3g}" for name, x in sorted(reaches.items(), key=lambda each: each[1]))
    return [
        "## What ships",
        "",
        "The same, of the multiplier that each task gets, between those that were run; with two standard errors over",
        "tasks, which differ much more than seeds do.",
        "",
        *lines,
        "",
        f"Reach (hf_lopt/reach.py): {told}.",
        "",
    ]


def power(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """The N of multiplier 1 and the power of the least-squares line through the logarithms of (N, best multiplier)."""
    logs = [(math.log(n), math.log(m)) for n, m in points]
    mean_n, mean_m = (sum(column) / len(logs) for column in zip(*logs, strict=True))
    slope = sum((n - mean_n) * (m - mean_m) for n, m in logs) / sum((n - mean_n) ** 2 for n, _ in logs)
    return math.exp(mean_n - mean_m / slope) if slope else math.inf, -slope


def fit() -> None:
    """The table of what has been swept, and the line through the best multipliers of each rule from scratch."""
    record = json.loads(FILE.read_text())
    compared = relative(record)
    lines = [
        "# Multiplier of the step size by length of the run",
        "",
        "Validation tasks: held-out loss at the end relative to that at multiplier 1, geometric mean over three seeds",
        "(one of the Llamas of width 256 and 512) and over tasks; in brackets the number of tasks of which this",
        "multiplier is the best. What a task lacks is taken from its neighbours. A run that failed counts as a loss",
        f"of 1,000. Multipliers of fine-tuning count times {record['finetune']:g}.",
        "`python -m benchmarks.run_length sweep RULE ...`, then `fit`; "
        + ", ".join(map(str, record["machine"].values())),
        "",
    ]
    points: dict[str, list[tuple[int, float]]] = {}
    for (rule, kind, steps), by_task in sorted(compared.items()):
        best = {task: min(row, key=lambda m: row[m]) for task, row in by_task.items()}
        least, most = max(map(min, by_task.values())), min(map(max, by_task.values()))
        cells = []
        for m in sorted({m for row in by_task.values() for m in row if least <= m <= most}):
            mean = math.exp(sum(interpolated(row, m) for row in by_task.values()) / len(by_task))
            cells.append(
                f"x{m:g}: {mean:.3f} ({sum(b == m for b in best.values())})" if mean < 10 else f"x{m:g}: failed"
            )
        lines.append(f"- {rule}, {kind}, {steps} steps, {len(by_task)} tasks: {'; '.join(cells)}")
        if kind == "from scratch":
            points.setdefault(rule, []).extend((steps, b) for b in best.values())
    lines.append("")
    for rule, own in points.items():
        if len({n for n, _ in own}) > 1:
            start, slope = power(own)
            lines.append(f"{rule}: the best multipliers lie about ({start:,.0f} / N)^{slope:.2f}.\n")
    lines += [*kept(compared), SHIPPED]
    (RESULTS / "run_length.md").write_text("\n".join(lines))
    print("\n".join(lines))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("sweep", "fit"))
    parser.add_argument("rules", nargs="*")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--multipliers", type=float, nargs="+", default=MULTIPLIERS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", default=(), help="of these names; default: all")
    parser.add_argument("--weights", help="a file of published weights; default: the embedded ones")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.what == "sweep":
        sweep(args.rules, args.steps, args.multipliers, args.seeds, args.tasks, args.weights)
    else:
        fit()


if __name__ == "__main__":
    main()
