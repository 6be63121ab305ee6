"""Everything that needs a GPU, in one command: tests, memory checks, launches, graphs, time and bandwidth.

    python -m benchmarks.gpu                              # all parts: writes benchmarks/results/cuda.{json,md,png}
    python -m benchmarks.gpu --quick --budget 840 --out DIR  # what fits in a quarter of an hour, the best first
    python -m benchmarks.gpu --only golden properties     # some of them; results of the others stay in the files
    python -m benchmarks.gpu --only speed --sizes 355M --rules velo

A part that fails is recorded, with the end of what it printed, and the next one runs; files are written after every
result, so what was interrupted can be run again by itself. What does not fit into the budget is "not run: time".
Parts, in the order of their value, with the seconds that they may take:

* load (20)        the card, the libraries, one launch; without it nothing else is run;
* golden (60)      reference trajectories on the GPU; ``--quick`` ends if they fail;
* kernels (60)     bandwidth of a copy; time of the device by kernel, time of the host;
* speed (15 a row) step time beside fused AdamW at GPT-2 sizes, in turns in one process, eager and as a graph;
* host (60)        time of the host for many small tensors, beside both forms of AdamW;
* training (30)    tokens per second of a GPT-2 with VeLO and with AdamW;
* graph (60)       captured steps against eager ones;
* launches (60)    launches, copies and waits of a step by the profiler, for few tensors and for many;
* properties (480) kernels against plain PyTorch in all types, layouts and sizes, the same bits again, 64-bit offsets;
* sanitizer (600)  compute-sanitizer, memcheck and racecheck, over a few steps of every rule.

Time is that of the device between two events around a few steps, the median over rounds. Achieved bandwidth counts the
bytes that three passes must move (72 per parameter in float32, 60 with 16-bit parameters and gradients); it is
compared with that of a copy in the same run. It needs torch and the built libraries; pytest and hypothesis for graph,
launches and properties, transformers for training, matplotlib and Pillow for the picture.
``--device cpu`` rehearses all this without a GPU, on tensors of a few numbers; ``--not-run`` writes the empty table.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import hf_lopt
from benchmarks import gpu_measure
from benchmarks.gpu_measure import DTYPES, HOST_SETS, SIZES, attempt, small_steps
from benchmarks.gpu_report import HOST_RULES, RULES, Report, draw, not_run
from benchmarks.step import RESULTS
from hf_lopt.kernels import dispatch


ROOT = Path(__file__).parents[1]
QUICK = {
    "sizes": ["355M"],
    "rules": ["velo", "velo:bfloat16", "velo:int8", "small_fc_lopt", "small_fc_lopt:tf32", "celo2", "celo2:auto"],
    "seconds": 1.5,
    "limit": 150.0,
}
THOROUGH = {"sizes": list(SIZES), "rules": list(RULES), "seconds": 6.0, "limit": 570.0}
NO_TIME = {"result": "not run: time"}

PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
# The operators on the backend "cuda", and whole steps.
OPERATORS = [
    f"tests/test_{name}.py" for name in ("kernels", "kernels_small", "kernel_arguments", "kernel_formats", "cuda")
]
GRAPH, LAUNCHES = "captured", "profiler or waits"
SANITIZER = "compute-sanitizer"
OURS = [sys.executable, "-m", "benchmarks.gpu"]
# Only our kernels are looked at; the sanitizer sees each tensor where torch does not divide large pieces into them.
FILTER = ["--kernel-regex", "kns=hf_lopt", "--error-exitcode", "9", "--print-limit", "20"]
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


@dataclass(frozen=True)
class Check:
    """A command whose end tells whether something holds, and the seconds without which it is not begun."""

    command: list[str]
    needs: float = 15.0


# Part -> its checks by name.
CHECKS: dict[str, dict[str, Check]] = {
    "golden": {"golden": Check([*OURS, "--golden"])},
    "graph": {"graph": Check([*PYTEST, "tests/test_cuda.py", "-k", GRAPH])},
    "launches": {"launches": Check([*PYTEST, "tests/test_cuda.py", "-k", LAUNCHES])},
    "properties": {"properties": Check([*PYTEST, *OPERATORS, "-k", f"cuda and not ({GRAPH} or {LAUNCHES})"], 60.0)},
    "sanitizer": {
        tool: Check([SANITIZER, "--tool", tool, *FILTER, *OURS, "--small-steps"], 45.0)
        for tool in ("memcheck", "racecheck")
    },
}
PARTS = ("load", "golden", "kernels", "speed", "host", "training", "graph", "launches", "properties", "sanitizer")


class Deadline:
    """When all parts have to be done."""

    def __init__(self, budget: float | None):
        self.end = None if budget is None else time.monotonic() + budget

    def left(self) -> float:
        return float("inf") if self.end is None else self.end - time.monotonic()


def golden(device: str) -> None:
    """The reference trajectories, with or without pytest; in a rehearsal the first of each rule."""
    sys.path.insert(0, str(ROOT / "tests"))
    if importlib.util.find_spec("pytest") is None:
        sys.modules["pytest"] = _stand_in_for_pytest()
    import cases
    import golden as files
    import test_golden

    failed, passed = [], 0
    found = [case for case in cases.CASES if files.find(case.file)]
    for case in found if device == "cuda" else found[:1]:
        for order in test_golden.AXIS_ORDERS:
            try:
                test_golden.test_follows_the_reference(case, order, device)
                passed += 1
            except Exception:  # whatever it is: the others are to run
                traceback.print_exc()
                failed.append(f"{case.file} {order}")
    print(f"{passed} trajectories follow their reference, {len(failed)} do not: {', '.join(failed) or 'none'}")
    if failed or not passed:
        raise SystemExit(1)


def _stand_in_for_pytest() -> types.ModuleType:
    """What the files with the reference trajectories take from pytest: marks, and lists of parameters."""

    class Mark:
        def __getattr__(self, name: str) -> Mark:
            return self

        def __call__(self, *args: Any, **_: Any) -> Any:
            return args[0] if len(args) == 1 and callable(args[0]) else self

    module = types.ModuleType("pytest")
    module.mark = Mark()  # type: ignore[attr-defined]
    module.param = lambda *values, **_: values  # type: ignore[attr-defined]
    return module


def rehearsal_of(command: list[str]) -> list[str]:
    """What is run instead where there is no GPU: tests are only found, and the small steps are made on the CPU."""
    if command[0] == SANITIZER:
        return [*OURS, "--small-steps", "--device", "cpu"]
    if command[:3] == OURS:
        return [*command, "--device", "cpu"]
    return [c.replace("cuda and", "emulated and") if " and " in c else c for c in command] + ["--collect-only"]


def check(command: list[str], limit: float, rehearsal: bool) -> tuple[dict[str, Any], str]:
    """Runs a check: "passed" or what it was, with the end of its output; and all of the output."""
    if command[0] == SANITIZER and not rehearsal and not shutil.which(SANITIZER):
        return {"result": f"not run: no {SANITIZER}"}, ""
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    environment |= UNCACHED if "memcheck" in command else {}
    if rehearsal:
        command = rehearsal_of(command)
    elif "pytest" in command and importlib.util.find_spec("xdist") and "tests/test_kernels.py" in command:
        command = [*command, "-n", str(min(os.cpu_count() or 1, 10))]
    start = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=limit
        )
        output, result = done.stdout, "passed" if done.returncode == 0 else f"failed ({done.returncode})"
    except subprocess.TimeoutExpired as error:
        output, result = error.stdout or b"", f"stopped after {limit:.0f} s"
    text = output.decode(errors="replace")
    print(text[-2000:], flush=True)
    found = {"result": result, "seconds": round(time.monotonic() - start, 1), "last_lines": text.splitlines()[-3:]}
    if result != "passed":
        found["output"] = text[-4000:]
    return found, text


def machine(device: str) -> dict[str, Any]:
    """Card, versions, and which sources and libraries they are."""
    about = {"hf_lopt": hf_lopt.__version__, "torch": torch.__version__, "cuda": torch.version.cuda or "none"}
    about |= {"python": platform.python_version(), "device": "cpu: a rehearsal, no measurement"}
    if device == "cuda":
        about["device"] = torch.cuda.get_device_name()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        if shutil.which(query[0]):
            about["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip().split("\n")[0]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    about["commit"] = commit.stdout.strip() or "unknown"
    for library in sorted((ROOT / "hf_lopt").glob("_C*.abi3.so")):
        about[library.name.split(".")[0]] = hashlib.sha256(library.read_bytes()).hexdigest()[:12]
    return about | {"date": datetime.date.today().isoformat(), "command": "python -m benchmarks.gpu"}


def load(device: str) -> dict[str, Any]:
    """Whether the kernels are there and run on this card."""
    if device != "cuda":
        return {"result": "passed"}
    if not torch.cuda.is_available():
        return {"result": "failed: no GPU"}
    if not dispatch.loaded("cuda"):
        return {"result": "failed: no CUDA kernels, see docs/kernels.md"}
    from hf_lopt.kernels import cards

    return {
        "result": f"failed: {problem}" if (problem := cards.find_problem(torch.cuda.current_device())) else "passed"
    }


def timed(deadline: Deadline, needs: float, function: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    return attempt(function, *args) if deadline.left() >= needs else NO_TIME


def run_part(part: str, options: argparse.Namespace, deadline: Deadline, report: Report) -> None:
    device, rehearsal = options.device, options.device == "cpu"
    for name, one in CHECKS.get(part, {}).items():
        found, text = NO_TIME, ""
        if deadline.left() >= one.needs:
            found, text = check(one.command, min(options.limit, deadline.left()), rehearsal)
        report.put_check(name, found)
        report.log(name, text)
    if part == "kernels":
        if deadline.left() >= 10:
            report.content["copy_gb_per_s"] = gpu_measure.copy_bandwidth(device)
        for rule in options.rules:
            for dtype in DTYPES:
                size = "355M" if "355M" in options.sizes else options.sizes[0]
                bandwidth = report.content.get("copy_gb_per_s")
                found = timed(deadline, 8, gpu_measure.kernels, rule, size, dtype, device, bandwidth)
                report.put("kernels", {"rule": rule, "size": size, "dtype": dtype}, found)
    if part == "speed":
        bandwidth = report.content.get("copy_gb_per_s")
        for size in options.sizes:
            for rule in options.rules:
                for dtype in DTYPES:
                    needs = 3 * options.seconds + 5
                    arguments = (rule, size, dtype, options.seconds, device, bandwidth)
                    found = timed(deadline, needs, gpu_measure.measure, *arguments)
                    report.put("rows", {"rule": rule, "size": size, "dtype": dtype}, found)
        attempt(draw, report.content, report.files["png"])
    if part == "host":
        for tensors in HOST_SETS:
            for rule in HOST_RULES:
                found = timed(deadline, 5, gpu_measure.host, rule, tensors, device)
                report.put("host", {"rule": rule, "tensors": tensors}, found)
    if part == "training":
        for name in ("adamw", "velo"):
            found = timed(deadline, 15, gpu_measure.training, name, options.seconds, device)
            report.put("training", {"optimizer": name}, found)
    if part == "launches":
        for rule in options.rules:
            for layers in (1, 12):
                found = timed(deadline, 8, gpu_measure.count_launches, rule, layers, device)
                report.put("launches", {"rule": rule, "layers": layers}, found)


def options_from(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="355M; VeLO, small_fc and Celo2; fewer rounds")
    parser.add_argument("--budget", type=float, help="seconds for all parts together (default: no limit)")
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS, metavar="PART")
    parser.add_argument("--rules", nargs="+", choices=RULES)
    parser.add_argument("--sizes", nargs="+", choices=SIZES)
    parser.add_argument("--seconds", type=float, help="for one row of the table of times")
    parser.add_argument("--limit", type=float, help="seconds that a check may take")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal")
    parser.add_argument("--out", type=Path, help="folder of the result files (default: benchmarks/results)")
    parser.add_argument("--name", default="cuda", help="of the result files")
    parser.add_argument("--not-run", action="store_true", help="only write the tables of what is to be measured")
    parser.add_argument("--small-steps", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--golden", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name, value in (QUICK if options.quick else THOROUGH).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    only_part = options.not_run or options.small_steps or options.golden
    if options.device == "cpu" and options.out is None and not only_part:
        parser.error("a rehearsal measures nothing: name another folder for its files with --out")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = options_from(arguments)
    if options.small_steps or options.golden:
        (small_steps if options.small_steps else golden)(options.device)
        return
    deadline = Deadline(options.budget)
    folder = options.out or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    files = {kind: folder / f"{options.name}.{kind}" for kind in ("json", "md", "png", "log")}
    if options.not_run:
        files["json"].unlink(missing_ok=True)
        Report(files, not_run()["about"]).write()
        return
    loaded = load(options.device)
    if loaded["result"] != "passed":
        raise SystemExit(f"{loaded['result']}: nothing was run")
    report = Report(files, machine(options.device))
    report.put_check("load", loaded)
    for part in [part for part in PARTS[1:] if part in options.only]:
        run_part(part, options, deadline, report)
        if part == "golden" and options.quick and report.content["checks"]["golden"]["result"].startswith("failed"):
            print("the reference trajectories are not followed: what else there is to measure can wait")
            break
    report.write()
    print(f"wrote {', '.join(str(f) for f in files.values() if f.exists())}")


if __name__ == "__main__":
    main()
