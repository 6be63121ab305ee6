"""Everything that needs a GPU, in one command: tests, memory checks, launches, graphs, time and bandwidth.

    python -m benchmarks.gpu                           # all parts: writes benchmarks/results/cuda.{json,md,png}
    python -m benchmarks.gpu --only golden properties  # some of them; results of the others stay in the files
    python -m benchmarks.gpu --only speed --sizes 355M --rules velo

A part that fails is recorded, with the end of what it printed, and the next one runs; files are written after every
result, so what was interrupted can be run again by itself. Parts, with about the minutes that they may take:

* golden (3)      reference trajectories on the GPU;
* properties (8)  kernels against plain PyTorch in all types, layouts and sizes, the same bits again, 64-bit offsets;
* sanitizer (10)  compute-sanitizer, memcheck and racecheck, over a few steps of every rule;
* graph (3)       captured steps against eager ones;
* launches (3)    launches, copies and waits of a step by the profiler, for few tensors and for many;
* speed (10)      step time beside fused AdamW at GPT-2 sizes, in turns in one process.

Time is that of the device between two events around a few steps, the median over rounds. Achieved bandwidth counts the
bytes that three passes must move (72 per parameter in float32, 60 with 16-bit parameters and gradients).
``--device cpu`` rehearses all this without a GPU, on tensors of a few numbers; ``--not-run`` writes the empty table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import hf_lopt
from benchmarks.step import RESULTS, build, gpt2
from benchmarks.storing import use_palette
from hf_lopt import rules
from hf_lopt.kernels import dispatch


ROOT = Path(__file__).parents[1]
SIZES = {"124M": gpt2(768, 12, 50_257), "355M": gpt2(1024, 24, 50_257), "1.3B": gpt2(2048, 24, 50_257)}
# Stands for all of them in a rehearsal.
TINY = gpt2(8, 1, 16, context=4)
RULES = ("velo", "small_fc_lopt", "celo_adam", "celo2_base", "celo2")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Bytes of the floor per parameter where there are three passes: gradient three times, parameter read twice and written
# once, the state likewise.
FLOOR = {"fp32": 72, "bf16": 60}
THREE_PASSES = ("velo", "small_fc_lopt")
TARGETS = {("velo", "355M", "fp32"): 6.5, ("velo", "355M", "bf16"): 5.5, ("small_fc_lopt", "355M", "fp32"): 9.0}

PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
# The operators on the backend "cuda", and whole steps.
OPERATORS = [f"tests/test_{name}.py" for name in ("kernels", "kernels_small", "kernel_arguments", "cuda")]
GRAPH, LAUNCHES = "captured", "profiler or waits"
SANITIZER = "compute-sanitizer"
SMALL_STEPS = [sys.executable, "-m", "benchmarks.gpu", "--small-steps"]
# Part -> its checks: name and command.
CHECKS: dict[str, dict[str, list[str]]] = {
    "golden": {"golden": [*PYTEST, "tests/test_golden.py", "-k", "cuda"]},
    "properties": {"properties": [*PYTEST, *OPERATORS, "-k", f"cuda and not ({GRAPH} or {LAUNCHES})"]},
    "sanitizer": {
        tool: [SANITIZER, "--tool", tool, "--error-exitcode", "9", *SMALL_STEPS] for tool in ("memcheck", "racecheck")
    },
    "graph": {"graph": [*PYTEST, "tests/test_cuda.py", "-k", GRAPH]},
    "launches": {"launches": [*PYTEST, "tests/test_cuda.py", "-k", LAUNCHES]},
}
PARTS = (*CHECKS, "speed")
SMALL_SHAPES = [(), (7,), (600,), (33, 70), (300, 130), (130, 300), (8, 4, 3, 3), (6, 3, 7, 7), (3, 20, 36)]


def parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: str) -> list[torch.nn.Parameter]:
    generator = torch.Generator(device=device).manual_seed(0)
    params = []
    for s in shapes:
        p = torch.nn.Parameter((torch.randn(s, generator=generator, device=device) * 0.02).to(dtype))
        p.grad = (torch.randn(s, generator=generator, device=device) * 1e-3).to(dtype)
        params.append(p)
    return params


def small_steps(device: str) -> None:
    """A few steps of every rule on small tensors of all kinds: what compute-sanitizer looks at."""
    for name in rules.names():
        if name == "rnn_mlp":  # has no kernels
            continue
        for dtype in DTYPES.values():
            params = parameters(SMALL_SHAPES, dtype, device)
            optimizer = build(name, params)
            for _ in range(2):
                optimizer.step(torch.tensor(1.0, device=device))
            assert all(p.isfinite().all() for p in params), name
    synchronize(device)


# ---- measurements --------------------------------------------------------------------------------------------------


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(step: Callable[[], Any], count: int, device: str) -> float:
    """Time of the device for a step, over ``count`` of them."""
    if device != "cuda":
        start = time.perf_counter()
        for _ in range(count):
            step()
        return 1e3 * (time.perf_counter() - start) / count
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / count


def count_calls(step: Callable[[], Any], device: str) -> dict[str, int]:
    """Launches, copies and waits of one step, by the profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else []
    synchronize(device)
    with torch.profiler.profile(activities=activities) as profile:
        step()
    names = [event.name for event in profile.events()]
    waits = sum("Synchronize" in n for n in names)
    return {
        "launches": sum(n.startswith(("cudaLaunch", "cuLaunch")) for n in names),
        "copies": sum(n.startswith("cudaMemcpy") for n in names),
        "waits": max(waits - 1, 0),  # without the profiler's own
    }


def replay_of(step: Callable[[], Any]) -> Callable[[], Any]:
    """The step as a graph that can be replayed; there must have been usual steps before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def measure(rule: str, size: str, dtype: str, seconds: float, device: str) -> dict[str, Any]:
    """One row of the table of times, in about ``seconds``."""
    shapes = SIZES[size] if device == "cuda" else TINY
    numel = sum(math.prod(s) for s in shapes)
    optimizer = build(rule, parameters(shapes, DTYPES[dtype], device))
    loss = torch.tensor(2.0, device=device)
    adamw = torch.optim.AdamW(parameters(shapes, DTYPES[dtype], device), fused=True)

    def step() -> None:
        optimizer.step(loss)

    for _ in range(3):
        step()
        adamw.step()
    synchronize(device)
    once = milliseconds(step, 1, device) + milliseconds(adamw.step, 1, device)
    steps = min(max(int(1e3 * seconds / once), 3), 150)
    per_round = min(10, max(1, steps // 15))
    pairs = [
        (milliseconds(step, per_round, device), milliseconds(adamw.step, per_round, device))
        for _ in range(max(3, steps // per_round))
    ]
    ours, theirs = (statistics.median(x) for x in zip(*pairs, strict=True))
    row = {"elements": numel, "step_ms": ours, "adamw_ms": theirs, "ratio": ours / theirs}
    row["step_ms_quartiles"] = statistics.quantiles([x for x, _ in pairs])[::2]
    if rule in THREE_PASSES:
        row["gb_per_s"] = FLOOR[dtype] * numel / ours / 1e6
    row |= count_calls(step, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        row["peak_extra_bytes"] = (torch.cuda.max_memory_allocated() - before) / numel
        row |= attempt(time_of_graph, step, per_round)
    return row


def time_of_graph(step: Callable[[], Any], per_round: int) -> dict[str, Any]:
    replay = replay_of(step)
    return {"graph_ms": statistics.median(milliseconds(replay, per_round, "cuda") for _ in range(5))}


def count_launches(rule: str, layers: int, device: str) -> dict[str, Any]:
    """One row of the table of launches: a GPT-2 of so many layers."""
    shapes = gpt2(64 if device == "cuda" else 8, layers, 1000 if device == "cuda" else 16, context=4)
    optimizer = build(rule, parameters(shapes, torch.float32, device))
    loss = torch.tensor(1.0, device=device)
    for _ in range(3):
        optimizer.step(loss)
    return {"tensors": len(shapes), **count_calls(lambda: optimizer.step(loss), device)}


# ---- parts ----------------------------------------------------------------------------------------------------------


def check(command: list[str], limit: float, rehearsal: bool) -> dict[str, Any]:
    """Runs a check: "passed", or what it was, and the end of its output. ``rehearsal``: only finds the tests."""
    if command[0] == SANITIZER and not rehearsal and not shutil.which(SANITIZER):
        return {"result": f"not run: no {SANITIZER}"}
    if rehearsal:
        command = [*SMALL_STEPS, "--device", "cpu"] if command[0] == SANITIZER else [*command, "--collect-only"]
        if "cuda" in command:  # there are none where there is no GPU
            command = [c if c != "cuda" else "cpu" for c in command]
    start = time.monotonic()
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=limit
        )
        output, result = done.stdout, "passed" if done.returncode == 0 else f"failed ({done.returncode})"
    except subprocess.TimeoutExpired as error:
        output, result = error.stdout or b"", f"stopped after {limit:.0f} s"
    text = output.decode(errors="replace")
    print(text[-4000:], flush=True)
    found = {"result": result, "seconds": round(time.monotonic() - start, 1), "last_lines": text.splitlines()[-3:]}
    if result != "passed":
        found["output"] = text[-4000:]
    return found


def attempt(function: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """What it returns, or how it failed."""
    try:
        return function(*args)
    except Exception as error:  # whatever it is: the others are to run
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"[:500]}
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class Report:
    """The result files, which are read at first and written after every result."""

    def __init__(self, files: dict[str, Path], about: dict[str, Any]):
        self.files = files
        self.content = not_run()
        if files["json"].exists():
            old = json.loads(files["json"].read_text())
            self.content |= {key: old[key] for key in ("checks", "launches", "rows") if key in old}
            self.content["checks"] = not_run()["checks"] | self.content["checks"]
        self.content["about"] = about

    def put(self, table: str, key: dict[str, Any], found: dict[str, Any]) -> None:
        """A row, in the place of an earlier one of this key."""
        entry = key | found | {"date": datetime.date.today().isoformat()}
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in entry.items() if k != "output"}, flush=True)
        rows = self.content[table]
        same = [i for i, row in enumerate(rows) if all(row.get(k) == v for k, v in key.items())]
        rows[same[0] : same[0] + 1] = [entry] if same else []
        if not same:
            rows.append(entry)
        self.write()

    def put_check(self, name: str, found: dict[str, Any]) -> None:
        self.content["checks"][name] = found | {"date": datetime.date.today().isoformat()}
        self.write()

    def write(self) -> None:
        texts = {"json": json.dumps(self.content, indent=1) + "\n", "md": markdown(self.content)}
        for kind, text in texts.items():
            unfinished = self.files[kind].with_suffix(f".{kind}.part")
            unfinished.write_text(text)
            os.replace(unfinished, self.files[kind])


def machine(device: str) -> dict[str, Any]:
    about = {"hf_lopt": hf_lopt.__version__, "torch": torch.__version__, "cuda": torch.version.cuda or "none"}
    about |= {"python": platform.python_version(), "device": "cpu: a rehearsal, no measurement"}
    if device == "cuda":
        about["device"] = torch.cuda.get_device_name()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        if shutil.which(query[0]):
            about["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip().split("\n")[0]
    return about | {"date": datetime.date.today().isoformat(), "command": "python -m benchmarks.gpu"}


def not_run() -> dict[str, Any]:
    rows = [{"rule": r, "size": s, "dtype": d} for s in SIZES for r in RULES for d in DTYPES]
    launches = [{"rule": r, "layers": layers} for r in RULES for layers in (1, 12)]
    checks = {name: {"result": "not run"} for own in CHECKS.values() for name in own}
    return {"about": {"command": "python -m benchmarks.gpu"}, "checks": checks, "launches": launches, "rows": rows}


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    return ["", *(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows))]


def cell(row: dict[str, Any], key: str, form: str) -> str:
    return format(row[key], form) if key in row else "failed" if "failed" in row else "not run"


def markdown(content: dict[str, Any]) -> str:
    """The results as tables; what has not been measured is "not run"."""
    about = content["about"]
    setting = ", ".join(f"{key} {value}" for key, value in about.items() if key != "command")
    lines = [f"`{about['command']}`: {setting or 'not run yet'}."]
    checks = [
        [name, x["result"], str(x.get("seconds", "")), x.get("date", "")] for name, x in content["checks"].items()
    ]
    lines += table(["check", "result", "seconds", "date"], checks)
    counts = ("launches", "copies", "waits")
    launches = [
        [r["rule"], str(r["layers"]), *(cell(r, key, "d") for key in ("tensors", *counts))]
        for r in content["launches"]
    ]
    lines += table(["rule", "layers", "tensors", *counts], launches)
    heads = ["rule", "parameters", "type", "step, ms", "target, ms", "replayed graph, ms", "AdamW (fused), ms"]
    heads += ["ratio", "GB/s of the floor", "launches", "copies", "waits", "peak extra bytes/param", "date"]
    rows = []
    for r in content["rows"]:
        target = TARGETS.get((r["rule"], r["size"], r["dtype"]), "")
        cells = [r["rule"], r["size"], r["dtype"], cell(r, "step_ms", ".2f"), str(target)]
        cells += [cell(r, key, ".2f") for key in ("graph_ms", "adamw_ms", "ratio")]
        cells.append(cell(r, "gb_per_s", ".0f") if r["rule"] in THREE_PASSES else "")
        cells += [cell(r, key, "d") for key in counts]
        rows.append([*cells, cell(r, "peak_extra_bytes", ".2f"), r.get("date", "")])
    return "\n".join([*lines, *table(heads, rows)]) + "\n"


def draw(content: dict[str, Any], path: Path) -> None:
    """Step time beside AdamW's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in content["rows"] if "step_ms" in r]
    if not rows:
        return
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
    use_palette(path)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS, metavar="PART")
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=RULES)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--seconds", type=float, default=6.0, help="for one row of the table of times")
    parser.add_argument("--limit", type=float, default=570.0, help="seconds that a check may take")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal")
    parser.add_argument("--out", type=Path, help="folder of the result files (default: benchmarks/results)")
    parser.add_argument("--name", default="cuda", help="of the result files")
    parser.add_argument("--not-run", action="store_true", help="only write the tables of what is to be measured")
    parser.add_argument("--small-steps", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    device = options.device
    if device == "cpu" and options.out is None and not (options.not_run or options.small_steps):
        parser.error("a rehearsal measures nothing: name another folder for its files with --out")
    options.out = options.out or RESULTS
    files = {kind: options.out / f"{options.name}.{kind}" for kind in ("json", "md", "png")}
    options.out.mkdir(parents=True, exist_ok=True)
    if options.not_run:
        files["json"].unlink(missing_ok=True)
        Report(files, not_run()["about"]).write()
        return
    if device == "cuda" and not (torch.cuda.is_available() and dispatch.loaded("cuda")):
        raise SystemExit("no GPU, or no CUDA kernels (see docs/kernels.md): nothing was run")
    if options.small_steps:
        small_steps(device)
        return
    report = Report(files, machine(device))
    for part in [part for part in PARTS if part in options.only]:
        for name, command in CHECKS.get(part, {}).items():
            report.put_check(name, check(command, options.limit, device == "cpu"))
        if part == "launches":
            for rule in options.rules:
                for layers in (1, 12):
                    found = attempt(count_launches, rule, layers, device)
                    report.put("launches", {"rule": rule, "layers": layers}, found)
        if part == "speed":
            for size in options.sizes:
                for rule in options.rules:
                    for dtype in DTYPES:
                        found = attempt(measure, rule, size, dtype, options.seconds, device)
                        report.put("rows", {"rule": rule, "size": size, "dtype": dtype}, found)
            draw(report.content, files["png"])
    report.write()
    print(f"wrote {', '.join(str(f) for f in files.values() if f.exists())}")


if __name__ == "__main__":
    main()
