"""Time and memory of a whole ``optimizer.step()`` on the CPU, beside ``torch.optim.AdamW(fused=True)``.

    python -m benchmarks.step                             # the table of the README: writes benchmarks/results/cpu.*
    python -m benchmarks.step --rules velo --sizes 26M --threads 1

Both optimizers step in turns in one process, on parameters of their own with the same gradients, and a ratio is the
median over these pairs: what else the machine does hits both. ``kernels`` is the time inside the compiled operators,
``rest`` everything else of a step. The plain PyTorch path is the same optimizer under ``HF_LOPT_KERNELS=torch``, which
works block by block; ``unfused`` is that path with all features of a whole tensor at once, as learned optimizers are
usually written. Peak memory is the growth of the process's resident set during one step.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import hf_lopt
from benchmarks.storing import use_palette, write_record
from hf_lopt import rules
from hf_lopt.kernels import dispatch, ops
from hf_lopt.kernels.arguments import Arguments
from hf_lopt.kernels.reference import passes
from hf_lopt.plot import log_ticks


OPERATORS = ("sums", "update_factored", "feature_sums", "apply_network", "adam_step", "descend")
RESULTS = Path(__file__).parent / "results"
PLAIN_LIMIT = 30_000_000  # elements; above it the plain path takes minutes per step


def gpt2(width: int, layers: int, vocabulary: int, context: int = 1024) -> list[tuple[int, ...]]:
    """Shapes of the parameters of a GPT-2: 12 per block, tied embeddings."""
    shapes: list[tuple[int, ...]] = [(vocabulary, width), (context, width)]
    for _ in range(layers):
        shapes += [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)]
        shapes += [(width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [*shapes, (width,), (width,)]


SIZES: dict[str, list[tuple[int, ...]]] = {
    "L2": [(128, 512)],
    "26M": gpt2(384, 6, 40_000),
    "124M": gpt2(768, 12, 50_257),
}


def random_weights(rule: rules.Rule) -> dict[str, torch.Tensor]:
    """Weights of the published sizes; the time of a step does not depend on their values."""
    letters = {"K": 256 if rule.name == "velo" else 1, "H": 512 if rule.name == "velo" else 64}
    letters["U"] = 32 if "nn/~/w0" in rule.shapes else 8
    letters["V"] = letters["U"]
    letters["R"] = 52 + letters["H"]  # inputs and state of rnn_mlp's LSTM
    generator = torch.Generator().manual_seed(0)

    def size(n: int | str) -> int:
        if isinstance(n, int):
            return n
        factor = n.rstrip("HKRUV")
        return int(factor or 1) * letters[n[len(factor) :]]

    return {
        name: torch.randn([size(n) for n in shape], generator=generator) * 0.05 for name, shape in rule.shapes.items()
    }


def build(rule_name: str, params: list[torch.nn.Parameter], **settings: Any) -> hf_lopt.LearnedOptimizer:
    rule = rules.get(rule_name)
    settings["weights"] = random_weights(rule)
    if rule.needs_horizon:
        settings["num_training_steps"] = 1000
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hf_lopt.LearnedOptimizer(params, rule_name, **settings)


def parameters(shapes: Sequence[tuple[int, ...]]) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator) * 0.02) for s in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator) * 1e-3
    return params


@contextlib.contextmanager
def timed_operators(spent: dict[str, float], clock: Callable[[], float]) -> Iterator[None]:
    """Adds the time inside each operator to ``spent``."""
    originals = {name: getattr(ops, name) for name in OPERATORS}

    def timed(name: str) -> Callable:
        def call(arguments: Arguments) -> Any:
            start = clock()
            result = originals[name](arguments)
            spent[name] = spent.get(name, 0.0) + clock() - start
            return result

        return call

    for name in OPERATORS:
        setattr(ops, name, timed(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(ops, name, original)


def resident(field: str) -> int | None:
    """A field of this process's memory in bytes, on Linux."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def peak_growth(step: Callable[[], None]) -> int | None:
    """Bytes by which the resident set grows at most during ``step``."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    except OSError:
        return None
    before = resident("VmRSS")
    step()
    after = resident("VmHWM")
    return None if before is None or after is None else max(0, after - before)


def measure(rule: str, size: str, threads: int, seconds: float, clock: Callable[[], float]) -> dict[str, Any]:
    """One row of the table."""
    torch.set_num_threads(threads)
    shapes = SIZES[size]
    numel = sum(math.prod(s) for s in shapes)
    ours, theirs = parameters(shapes), parameters(shapes)
    optimizer, adamw = build(rule, ours), torch.optim.AdamW(theirs, fused=True)

    def step() -> None:
        optimizer.step(1.0)

    for _ in range(2):
        step()
        adamw.step()
    samples: list[dict[str, float]] = []
    stop = time.perf_counter() + seconds
    while len(samples) < 5 or time.perf_counter() < stop:
        spent: dict[str, float] = {}
        t0 = clock()
        adamw.step()
        t1 = clock()
        with timed_operators(spent, clock):
            t2 = clock()
            step()
            t3 = clock()
        samples.append({"adamw": t1 - t0, "step": t3 - t2, "kernels": sum(spent.values()), **spent})

    def median(f: Callable[[dict[str, float]], float]) -> float:
        return statistics.median(map(f, samples))

    unit = 1e9 / numel
    row: dict[str, Any] = {"rule": rule, "size": size, "tensors": len(shapes), "elements": numel, "threads": threads}
    row |= {"pairs": len(samples), "adamw_ns": median(lambda s: s["adamw"]) * unit}
    row |= {"step_ns": median(lambda s: s["step"]) * unit, "kernels_ns": median(lambda s: s["kernels"]) * unit}
    row |= {"ratio": median(lambda s: s["step"] / s["adamw"])}
    row |= {"ratio_kernels": median(lambda s: s["kernels"] / s["adamw"])}
    row["phases_ns"] = {
        name: median(lambda s, n=name: s[n]) * unit for name in OPERATORS if all(name in s for s in samples)
    }
    row["rest_ns"] = median(lambda s: s["step"] - s["kernels"]) * unit
    grown = peak_growth(step)
    row["peak_extra_bytes"] = None if grown is None else grown / numel
    return row


def measure_plain(
    rule: str, size: str, threads: int, clock: Callable[[], float], unfused: bool = False
) -> tuple[float, float | None]:
    """Nanoseconds per element of a step in plain PyTorch, and its peak extra bytes per element."""
    torch.set_num_threads(threads)
    optimizer = build(rule, parameters(SIZES[size]))
    numel = sum(math.prod(s) for s in SIZES[size])
    times, limit = [], passes._BLOCK_CPU
    try:
        passes._BLOCK_CPU = 1 << 62 if unfused else limit
        with ops.plain():
            for _ in range(3 if numel < 1e6 else 2):
                start = clock()
                optimizer.step(1.0)
                times.append(clock() - start)
            grown = peak_growth(lambda: optimizer.step(1.0))
    finally:
        passes._BLOCK_CPU = limit
    return min(times) * 1e9 / numel, None if grown is None else grown / numel


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return {
        "processor": model,
        "kernels": torch.ops.hf_lopt.cpu_kernels("") if dispatch.loaded() else "plain PyTorch",
        "hf_lopt": hf_lopt.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def markdown(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The results as a table."""
    lines = [
        f"Whole `optimizer.step()` on {about['processor']} ({about['kernels']} kernels), {about['setting']}; "
        f"hf_lopt {about['hf_lopt']}, torch {about['torch']}, Python {about['python']}, {about['date']}. "
        "`python -m benchmarks.step`; nanoseconds per parameter, medians of interleaved pairs.",
        "",
        "| rule | parameters | threads | AdamW fused | step | ratio | kernels alone | ratio | plain PyTorch | "
        "speed-up | unfused | speed-up | peak extra bytes/param | unfused |",
        "| --- " * 14 + "|",
    ]
    for r in rows:
        cells = [r["rule"], r["size"], r["threads"], f"{r['adamw_ns']:.2f}", f"{r['step_ns']:.2f}"]
        cells += [f"{r['ratio']:.2f}", f"{r['kernels_ns']:.2f}", f"{r['ratio_kernels']:.2f}"]
        for slow in (r.get("plain_ns"), r.get("unfused_ns")):
            cells += [f"{slow:.0f}", f"{slow / r['step_ns']:.0f}x"] if slow else ["", ""]
        for grown in (r["peak_extra_bytes"], r.get("unfused_extra_bytes")):
            cells += ["" if grown is None else f"{grown:.2f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "Phases, nanoseconds per parameter:", ""]
    lines += ["| rule | parameters | threads | " + " | ".join(OPERATORS) + " | rest |"]
    lines += ["| --- " * (len(OPERATORS) + 4) + "|"]
    for r in rows:
        phases = [f"{r['phases_ns'][name]:.2f}" if name in r["phases_ns"] else "" for name in OPERATORS]
        cells = [r["rule"], r["size"], str(r["threads"]), *phases, f"{r['rest_ns']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(about: dict[str, Any], rows: list[dict[str, Any]], path: Path) -> None:
    """Time per parameter on a log scale: AdamW, the step, and the plain path where it was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in rows if r["threads"] == rows[0]["threads"]]
    rows = [r for r in rows if r["size"] != "L2"] or rows
    series = [("AdamW (fused)", "adamw_ns", "#8c8c8c"), ("hf_lopt", "step_ns", "#2a6fbb")]
    series += [
        ("hf_lopt, plain PyTorch in blocks", "plain_ns", "#e0a030"),
        ("unfused PyTorch", "unfused_ns", "#b04040"),
    ]
    figure, axes = pyplot.subplots(figsize=(8, 0.9 + 0.72 * len(rows)), layout="constrained")
    for i, (label, key, color) in enumerate(series):
        places = [(j + 0.21 * (i - 1.5), r[key]) for j, r in enumerate(rows) if r.get(key)]
        if places:
            bars = axes.barh(*zip(*places, strict=True), height=0.19, color=color, label=label)
            axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
    axes.set_yticks(range(len(rows)), [f"{r['rule']}\n{r['size']}" for r in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.margins(x=0.12)
    log_ticks(axes.xaxis)
    axes.set_xlabel("nanoseconds per parameter and step (log scale)")
    threads = rows[0]["threads"]
    axes.set_title(
        f"{about['processor']}, {threads} thread{'s' if threads > 1 else ''}, torch {about['torch']}", size=9
    )
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    use_palette(path, 64)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rules", nargs="+", default=["velo", "small_fc_lopt", "celo2_base", "celo2"], choices=rules.names()
    )
    parser.add_argument("--sizes", nargs="+", default=["L2", "26M", "124M"], choices=SIZES)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=20.0, help="for one row, without set-up")
    parser.add_argument("--no-plain", action="store_true", help="do not time the plain PyTorch path")
    parser.add_argument("--cpu-time", action="store_true", help="time of the process on the CPU over the threads")
    parser.add_argument("--name", default="cpu", help="of the result files")
    parser.add_argument("--redraw", action="store_true", help="only write the table and the picture again")
    options = parser.parse_args()

    files = {kind: RESULTS / f"{options.name}.{kind}" for kind in ("json", "md", "png")}
    if options.redraw:
        content = json.loads(files["json"].read_text())
        about, rows = content["about"], content["rows"]
    else:
        about, rows = machine(), []
        about["setting"] = "CPU time of the process over its threads" if options.cpu_time else "wall-clock time"
        for size in options.sizes:
            for rule in options.rules:
                for threads in options.threads:

                    def clock(threads: int = threads) -> float:
                        return time.process_time() / threads if options.cpu_time else time.perf_counter()

                    row = measure(rule, size, threads, options.seconds, clock)
                    if not options.no_plain and row["elements"] <= PLAIN_LIMIT and threads == options.threads[0]:
                        row["plain_ns"], _ = measure_plain(rule, size, threads, clock)
                        row["unfused_ns"], row["unfused_extra_bytes"] = measure_plain(rule, size, threads, clock, True)
                    rows.append(row)
                    print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    RESULTS.mkdir(exist_ok=True)
    write_record(files["json"], {"about": about, "rows": rows})
    files["md"].write_text(markdown(about, rows))
    draw(about, rows, files["png"])
    print(f"wrote {', '.join(map(str, files.values()))}")


if __name__ == "__main__":
    main()
