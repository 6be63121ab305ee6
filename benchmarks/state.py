"""Accumulators in bfloat16 and int8 beside float32: bytes, errors, time of a step.

    python -m benchmarks.state                         # all parts: writes benchmarks/results/state.*
    python -m benchmarks.state --only error --rules velo celo2

``bytes``  of optimizer state per parameter at 26M.
``error``  relative RMS of each accumulator after 1,000 steps against float32: of the same gradient at every step, what
           rounding to nearest stalls on, and of independent gradients at every step, whose rounding errors an
           average with a decay of 0.999 sums over 1,000 steps. The bounds below were written down before measuring.
``time``   of the compiled operators at 26M on one thread, as CPU time: medians of turns, relative to float32.

Losses of whole runs: `python -m benchmarks.state_loss`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hf_lopt
from benchmarks.step import SIZES, parameters, random_weights, timed_operators
from benchmarks.storing import write_record
from hf_lopt import rules
from hf_lopt.kernels.reference import formats


RESULTS = Path(__file__).parent / "results"
KINDS = ("float32", "bfloat16", "int8")
STEPS = 1000
# Relative RMS of momenta and of second moments, in percent, for the same gradient at every step.
BOUNDS = {"bfloat16": (1.0, 3.0), "int8": (3.0, 6.0)}
SHAPES = [(64, 512), (96, 256)]


def optimizer_of(name: str, params: Sequence[nn.Parameter], kind: str, **settings: Any) -> hf_lopt.LearnedOptimizer:
    rule = rules.get(name)
    settings = {"weights": random_weights(rule)} | settings
    if rule.needs_horizon:
        settings = {"num_training_steps": STEPS} | settings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hf_lopt.LearnedOptimizer(list(params), name, state_dtype=kind, **settings)


def loaded(state: dict[str, Any], name: str) -> torch.Tensor:
    return formats.Accumulator(state.get(name, state.get(f"{name}_codes")), state.get(f"{name}_scales")).load()


def errors(name: str, noisy: bool) -> dict[str, dict[str, list[float]]]:
    """Format -> accumulator -> relative RMS in percent of each decay, over all tensors."""
    generator = torch.Generator().manual_seed(0)
    scales = [torch.randn(s, generator=generator).exp() for s in SHAPES]
    fixed = [torch.randn(s, generator=generator) * x * 0.01 for s, x in zip(SHAPES, scales, strict=True)]
    lists = {
        kind: [nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(1))) for s in SHAPES]
        for kind in KINDS
    }
    optimizers = {kind: optimizer_of(name, params, kind, lr=1e-6) for kind, params in lists.items()}
    for _ in range(STEPS):
        grads = fixed
        if noisy:
            grads = [torch.randn(s, generator=generator) * x * 0.01 for s, x in zip(SHAPES, scales, strict=True)]
        for kind, optimizer in optimizers.items():
            for p, g in zip(lists[kind], grads, strict=True):
                p.grad = g.clone()
            optimizer.step(1.0)
    found: dict[str, dict[str, list[float]]] = {}
    for kind in KINDS[1:]:
        found[kind] = {}
        for part in ("momentum", "second_moment"):
            pairs = [
                (loaded(optimizers[kind].state[p], part), loaded(optimizers["float32"].state[q], part))
                for p, q in zip(lists[kind], lists["float32"], strict=True)
            ]
            squares = [
                (sum((x[d] - y[d]).square().sum() for x, y in pairs), sum(y[d].square().sum() for _, y in pairs))
                for d in range(len(pairs[0][0]))
            ]
            found[kind][part] = [100 * math.sqrt(float(a / b)) for a, b in squares]
    return found


def state_bytes(name: str) -> dict[str, float]:
    count = sum(math.prod(s) for s in SIZES["26M"])
    found = {}
    for kind in KINDS:
        rule, theta = rules.get(name), random_weights(rules.get(name))
        settings = {**rule.defaults, "state_dtype": kind}
        metas = [torch.empty(s, device="meta") for s in SIZES["26M"]]
        found[kind] = sum(x.nbytes for p in metas for x in rule.init_state(p, settings, theta).values()) / count
    return found


def times(name: str, turns: int) -> dict[str, Any]:
    """Nanoseconds per parameter inside the compiled operators, and the ratio to float32."""
    torch.set_num_threads(1)
    shapes = SIZES["26M"]
    count = sum(math.prod(s) for s in shapes)
    optimizers = {kind: optimizer_of(name, parameters(shapes), kind) for kind in KINDS}
    spent: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(turns + 1):
        for kind, optimizer in optimizers.items():
            parts: dict[str, float] = {}
            with timed_operators(parts, time.thread_time):
                optimizer.step(1.0)
            if turn:
                spent[kind].append(sum(parts.values()) / count * 1e9)
    found: dict[str, Any] = {kind: statistics.median(values) for kind, values in spent.items()}
    for kind in KINDS[1:]:
        pairs = zip(spent[kind], spent["float32"], strict=True)
        found[f"{kind} ratio"] = statistics.median(a / b for a, b in pairs)
    return found


def table(title: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [title, ["---"] * len(title), *rows])


def numbers(xs: Sequence[float]) -> str:
    return ", ".join(f"{x:.2f}" for x in xs)


def write(found: dict[str, Any], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_record(out / "state.json", found)
    parts = [f"`python -m benchmarks.state`, torch {torch.__version__}, CPU kernels."]
    if "bytes" in found:
        rows = [[f"`{n}`", *(f"{x[k]:.2f}" for k in KINDS)] for n, x in found["bytes"].items()]
        parts += ["Bytes of state per parameter at 26M:", table(["optim", *KINDS], rows)]
    for part, title in (
        ("error", "the same gradient at every step"),
        ("noise", "independent gradients at every step, for which there are no bounds"),
    ):
        if part in found:
            rows = []
            for n, x in found[part].items():
                for kind, both in x.items():
                    m, v = both["momentum"], both["second_moment"]
                    bounds = BOUNDS[kind]
                    kept = "yes" if max(m) <= bounds[0] and max(v) <= bounds[1] else "no"
                    rows.append([f"`{n}`", kind, numbers(m), numbers(v), *([kept] if part == "error" else [])])
            head = [
                "optim",
                "state_dtype",
                "momenta",
                "second moments",
                *(["within bounds"] if part == "error" else []),
            ]
            parts += [f"Relative RMS error in percent after {STEPS:,} steps by decay, {title}:", table(head, rows)]
    if "time" in found:
        rows = [
            [f"`{n}`", *(f"{x[k]:.2f}" for k in KINDS), *(f"{x[f'{k} ratio']:.2f}" for k in KINDS[1:])]
            for n, x in found["time"].items()
        ]
        head = ["optim", *KINDS, "bfloat16 / float32", "int8 / float32"]
        parts += ["Compiled operators at 26M, ns per parameter, one thread, CPU time:", table(head, rows)]
    (out / "state.md").write_text("\n\n".join(parts) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=["bytes", "error", "noise", "time"])
    parser.add_argument("--rules", nargs="+", default=list(rules.names()), choices=rules.names())
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    path = args.out / "state.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    parts: dict[str, Callable[[str], Any]] = {
        "bytes": state_bytes,
        "error": lambda name: errors(name, noisy=False),
        "noise": lambda name: errors(name, noisy=True),
        "time": lambda name: times(name, args.turns),
    }
    for part in args.only or parts:
        for name in args.rules:
            found.setdefault(part, {})[name] = parts[part](name)
            write(found, args.out)


if __name__ == "__main__":
    main()
