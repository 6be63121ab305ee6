"""What a step costs beside its arithmetic: many small tensors, and one matrix, beside ``AdamW(foreach=True)``.

    python -m benchmarks.host                            # writes benchmarks/results/host.*
    python -m benchmarks.host --rules velo --sets 448

Both optimizers step in turns in one process, on one thread, each on parameters of its own; the time is that of the
process on the CPU, and a ratio the median over pairs. Tensors have so few elements that a step is checks, lists and
calls. ``arithmetic`` is what the operators take for as many elements of one large matrix, ``host`` the rest of a step
(not of rules that make matrices orthogonal, which depends on their shapes). The weights are the bundled ones: VeLO's
published LSTM of 512 units alone is 4 MFLOP for a tensor.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import statistics
import time
import warnings
from typing import Any

import torch

import hf_lopt
from benchmarks.step import RESULTS, gpt2, machine, parameters, timed_operators
from benchmarks.storing import write_record
from hf_lopt import rules


# Numbers of tensors as in a GPT-2 of 124M and of 355M, and in LoRA adapters of a model of 1.5B; one matrix.
SETS: dict[str, list[tuple[int, ...]]] = {
    "148": gpt2(16, 12, 40, context=24),
    "292": gpt2(16, 24, 40, context=24),
    "448": [(4, 32), (32, 4)] * 224,
    "128x512": [(128, 512)],
}


LARGE = (1024, 512)
ONE_MATRIX_MS = 0.3  # what a step over one matrix should take at most


def build(rule: str, params: list[torch.nn.Parameter]) -> hf_lopt.LearnedOptimizer:
    settings = {"num_training_steps": 1_000_000} if rules.get(rule).needs_horizon else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hf_lopt.LearnedOptimizer(params, rule, weights="bundled", **settings)


@functools.cache
def arithmetic(rule: str) -> float | None:
    """Milliseconds per element inside the operators, in a step over one large matrix."""
    if rules.get(rule).defaults.get("orthogonalize"):
        return None
    optimizer, times = build(rule, parameters([LARGE])), []
    for _ in range(12):
        spent: dict[str, float] = {}
        with timed_operators(spent, time.process_time):
            optimizer.step(1.0)
        times.append(sum(spent.values()))
    return 1e3 * min(times) / math.prod(LARGE)


def measure(rule: str, name: str, seconds: float) -> dict[str, Any]:
    """One row of the table."""
    ours, theirs = parameters(SETS[name]), parameters(SETS[name])
    optimizer = build(rule, ours)
    adamw = torch.optim.AdamW(theirs, foreach=True)
    pairs: list[tuple[float, float]] = []
    stop = time.perf_counter() + seconds
    while len(pairs) < 15 or time.perf_counter() < stop:
        start = time.process_time()
        adamw.step()
        between = time.process_time()
        optimizer.step(1.0)
        pairs.append((between - start, time.process_time() - between))
    pairs = pairs[3:]
    row = {"rule": rule, "tensors": name, "pairs": len(pairs)}
    row |= {key: 1e3 * statistics.median(pair[i] for pair in pairs) for i, key in enumerate(("adamw_ms", "step_ms"))}
    row |= {key: 1e3 * min(pair[i] for pair in pairs) for i, key in enumerate(("adamw_least_ms", "step_least_ms"))}
    row |= {"ratio": statistics.median(step / reference for reference, step in pairs)}
    if (of_element := arithmetic(rule)) is not None:
        row["arithmetic_ms"] = of_element * sum(p.numel() for p in ours)
        row["host_ms"] = row["step_least_ms"] - row["arithmetic_ms"]
    return row


def markdown(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The results as a table."""
    lines = [
        f"Process time of an `optimizer.step()`, {about['processor']} ({about['kernels']} kernels), "
        f"{about['setting']}; "
        f"hf_lopt {about['hf_lopt']}, torch {about['torch']}, Python {about['python']}, {about['date']}. "
        "`python -m benchmarks.host`; milliseconds, medians of interleaved pairs, and the least; of the latter the "
        "arithmetic, which no work on the host removes, and the rest.",
        "",
        "| rule | tensors | AdamW foreach | step | ratio | AdamW, least | step, least | arithmetic | host |",
        "| --- " * 9 + "|",
    ]
    for r in rows:
        cells = [r["rule"], r["tensors"], *(f"{r[key]:.2f}" for key in ("adamw_ms", "step_ms", "ratio"))]
        cells += [f"{r[key]:.2f}" for key in ("adamw_least_ms", "step_least_ms")]
        cells += [f"{r[key]:.2f}" if key in r else "" for key in ("arithmetic_ms", "host_ms")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, *floors(rows)]) + "\n"


def floors(rows: list[dict[str, Any]]) -> list[str]:
    """Which targets no work on the host reaches, or hardly."""
    known = [r for r in rows if "arithmetic_ms" in r]
    alone = [r for r in known if r["tensors"] == "128x512" and r["arithmetic_ms"] > ONE_MATRIX_MS]
    shares = [(r, r["arithmetic_ms"] / r["adamw_least_ms"]) for r in known if r["tensors"] != "128x512"]
    large = [f"{r['rule']} ({r['tensors']}) {share:.0%}" for r, share in shares if share > 0.5]
    lines = []
    if alone:
        numbers = ", ".join(f"{r['rule']} {r['arithmetic_ms']:.2f}" for r in alone)
        lines += ["", f"The arithmetic of one matrix alone takes more than {ONE_MATRIX_MS} ms: {numbers} ms."]
    if large:
        lines += ["", f"The arithmetic alone takes more than half of AdamW's least time: {', '.join(large)}."]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name in rules.names() if name != "rnn_mlp"]
    parser.add_argument("--rules", nargs="+", default=names, choices=rules.names())
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--seconds", type=float, default=3.0, help="for one row")
    parser.add_argument("--name", default="host", help="of the result files")
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    about = machine() | {
        "setting": f"one thread, bundled weights, load average {load:.0f} on {os.cpu_count()} processors"
    }
    rows = []
    for name in options.sets:
        for rule in options.rules:
            rows.append(measure(rule, name, options.seconds))
            print({key: round(x, 3) if isinstance(x, float) else x for key, x in rows[-1].items()}, flush=True)
    RESULTS.mkdir(exist_ok=True)
    write_record(RESULTS / f"{options.name}.json", {"about": about, "rows": rows})
    (RESULTS / f"{options.name}.md").write_text(markdown(about, rows))


if __name__ == "__main__":
    main()
