"""Everything that needs a GPU, in one command: tests, memory checks, launches, time and bandwidth.

    python -m benchmarks.gpu                  # on a GPU machine: writes benchmarks/results/cuda.{json,md,png}
    python -m benchmarks.gpu --quick          # the checks and one size

Time is that of the device between two events around a few steps, the median over rounds in which AdamW (fused) and
ours take turns. Achieved bandwidth counts the bytes that the three passes must move (72 per parameter in float32, 60
with 16-bit parameters and gradients). Without a GPU it says so; ``--not-run`` writes the table with "not run" in it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import hf_lopt
from benchmarks.step import RESULTS, build, gpt2
from hf_lopt import _load


ROOT = Path(__file__).parents[1]
SIZES = {"124M": gpt2(768, 12, 50_257), "355M": gpt2(1024, 24, 50_257), "1.3B": gpt2(2048, 24, 50_257)}
RULES = ("velo", "small_fc_lopt", "celo_adam", "celo2")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Bytes of the floor per parameter where there are three passes: gradient three times, parameter read twice and written
# once, the state likewise.
FLOOR = {"fp32": 72, "bf16": 60}
THREE_PASSES = ("velo", "small_fc_lopt")
TARGETS = {("velo", "355M", "fp32"): 6.5, ("velo", "355M", "bf16"): 5.5, ("small_fc_lopt", "355M", "fp32"): 9.0}
CHECKS = {
    "tests on the GPU": [sys.executable, "-m", "pytest", "-q", "tests/test_cuda.py", "tests/test_golden.py"],
    "memcheck": ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"],
    "racecheck": ["compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "9"],
}
SANITIZED = [sys.executable, "-m", "pytest", "-q", "tests/test_cuda.py", "-k", "follow_the_plain_ones or any_strides"]


def parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator(device="cuda").manual_seed(0)
    params = []
    for s in shapes:
        p = torch.nn.Parameter((torch.randn(s, generator=generator, device="cuda") * 0.02).to(dtype))
        p.grad = (torch.randn(s, generator=generator, device="cuda") * 1e-3).to(dtype)
        params.append(p)
    return params


def milliseconds(step, count: int) -> float:
    """Device time of a step, over ``count`` of them."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / count


def count_calls(step) -> dict[str, int]:
    """Launches, copies and waits of one step, by the profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        step()
    names = [event.name for event in profile.events()]
    return {
        "launches": sum(n.startswith(("cudaLaunch", "cuLaunch")) for n in names),
        "copies": sum(n.startswith("cudaMemcpy") for n in names),
        "waits": sum("Synchronize" in n for n in names) - 1,  # the profiler's own
    }


def measure(rule: str, size: str, dtype: str, rounds: int, per_round: int) -> dict[str, Any]:
    """One row of the table."""
    shapes = SIZES[size]
    numel = sum(math.prod(s) for s in shapes)
    optimizer = build(rule, parameters(shapes, DTYPES[dtype]))
    loss = torch.tensor(2.0, device="cuda")
    adamw = torch.optim.AdamW(parameters(shapes, DTYPES[dtype]), fused=True)

    def step() -> None:
        optimizer.step(loss)

    for _ in range(3):
        step()
        adamw.step()
    torch.cuda.synchronize()
    pairs = [(milliseconds(step, per_round), milliseconds(adamw.step, per_round)) for _ in range(rounds)]
    ours, theirs = (statistics.median(x) for x in zip(*pairs, strict=True))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    peak = torch.cuda.max_memory_allocated() - before
    row = {"rule": rule, "size": size, "dtype": dtype, "elements": numel, "step_ms": ours, "adamw_ms": theirs}
    row |= {"ratio": ours / theirs, "peak_extra_bytes": peak / numel}
    if rule in THREE_PASSES:
        row["gb_per_s"] = FLOOR[dtype] * numel / ours / 1e6
    return row | count_calls(step)


def check(name: str) -> str:
    """Runs one of the checks: "passed", or what it was."""
    command = CHECKS[name]
    if command[0] != sys.executable:
        if not shutil.which(command[0]):
            return f"not run: no {command[0]}"
        command = [*command, *SANITIZED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-2000:], done.stderr[-2000:], flush=True)
    return "passed" if done.returncode == 0 else f"failed ({done.returncode})"


def machine() -> dict[str, Any]:
    about = {"hf_lopt": hf_lopt.__version__, "torch": torch.__version__, "cuda": torch.version.cuda or "none"}
    if torch.cuda.is_available():
        about["device"] = torch.cuda.get_device_name()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        if shutil.which(query[0]):
            about["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip().split("\n")[0]
    return about | {"date": datetime.date.today().isoformat(), "command": "python -m benchmarks.gpu"}


def not_run() -> dict[str, Any]:
    rows = [{"rule": r, "size": s, "dtype": d} for s in SIZES for r in RULES for d in DTYPES]
    return {"about": {"command": "python -m benchmarks.gpu"}, "checks": dict.fromkeys(CHECKS, "not run"), "rows": rows}


def markdown(content: dict[str, Any]) -> str:
    """The results as tables; what has not been measured is "not run"."""

    def cell(row: dict[str, Any], key: str, form: str = ".2f") -> str:
        return format(row[key], form) if key in row else "not run"

    about = content["about"]
    setting = ", ".join(f"{key} {value}" for key, value in about.items() if key != "command")
    lines = [f"`{about['command']}`: {setting or 'not run yet'}.", "", "| check | result |", "| --- | --- |"]
    lines += [f"| {name} | {result} |" for name, result in content["checks"].items()]
    lines += [
        "",
        "| rule | parameters | type | step, ms | target, ms | AdamW (fused), ms | ratio | GB/s of the floor |",
    ]
    lines[-1] += " launches | copies | waits | peak extra bytes/param |"
    lines += ["| --- " * 12 + "|"]
    for r in content["rows"]:
        target = TARGETS.get((r["rule"], r["size"], r["dtype"]))
        cells = [r["rule"], r["size"], r["dtype"], cell(r, "step_ms"), f"{target}" if target else ""]
        cells += [
            cell(r, "adamw_ms"),
            cell(r, "ratio"),
            cell(r, "gb_per_s", ".0f") if r["rule"] in THREE_PASSES else "",
        ]
        cells += [cell(r, key, "d") for key in ("launches", "copies", "waits")]
        lines.append("| " + " | ".join([*cells, cell(r, "peak_extra_bytes")]) + " |")
    return "\n".join(lines) + "\n"


def draw(content: dict[str, Any], path: Path) -> None:
    """Step time beside AdamW's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in content["rows"] if "step_ms" in r]
    figure, axes = pyplot.subplots(figsize=(8, 0.9 + 0.5 * len(rows)), layout="constrained")
    series = (("AdamW (fused)", "adamw_ms", "#8c8c8c"), ("hf_lopt", "step_ms", "#2a6fbb"))
    for i, (label, key, color) in enumerate(series):
        places = [j + 0.36 * (i - 0.5) for j in range(len(rows))]
        bars = axes.barh(places, [r[key] for r in rows], height=0.34, color=color, label=label)
        axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
    axes.set_yticks(range(len(rows)), [f"{r['rule']} {r['size']} {r['dtype']}" for r in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds per step (log scale)")
    axes.set_title(f"{content['about'].get('device')}, torch {content['about'].get('torch')}", size=9)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=RULES)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="one size, few rounds")
    parser.add_argument("--no-checks", action="store_true", help="only time")
    parser.add_argument("--name", default="cuda", help="of the result files")
    parser.add_argument("--not-run", action="store_true", help="only write the table of what is to be measured")
    options = parser.parse_args()
    files = {kind: RESULTS / f"{options.name}.{kind}" for kind in ("json", "md", "png")}
    if options.not_run:
        content = not_run()
    else:
        if not (torch.cuda.is_available() and _load.loaded("cuda")):
            raise SystemExit("no GPU, or no CUDA kernels (see docs/kernels.md): nothing was run")
        sizes, rounds = (["124M"], 5) if options.quick else (options.sizes, options.rounds)
        content = {"about": machine(), "checks": {}, "rows": []}
        for name in CHECKS:
            content["checks"][name] = "not run" if options.no_checks else check(name)
        for size in sizes:
            for rule in options.rules:
                for dtype in DTYPES:
                    row = measure(rule, size, dtype, rounds, per_round=10)
                    content["rows"].append(row)
                    print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
                    torch.cuda.empty_cache()
        draw(content, files["png"])
    RESULTS.mkdir(exist_ok=True)
    files["json"].write_text(json.dumps(content, indent=1) + "\n")
    files["md"].write_text(markdown(content))


if __name__ == "__main__":
    main()
