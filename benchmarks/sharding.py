"""What a step costs when the parameters are sharded: measured on gloo processes, and a model for many GPUs.

    python -m benchmarks.sharding           # 1, 2 and 4 processes, 26M parameters; writes results/sharding.*
    python -m benchmarks.sharding --model   # prints the tables of results/sharding_model.md

Processes on one machine share its cores, so the times say what a step costs in total, not how it scales; the bytes are
counted from what torch.distributed was given. The model is arithmetic on shapes. Its bytes are those that the tests
count; its times are bandwidth and latency, and nothing in them has been measured.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.step import SIZES, build
from benchmarks.storing import write_record
from hf_lopt import features
from hf_lopt.step.accumulators import factored_axes


RESULTS = Path(__file__).parent / "results"
WORLDS, RULES = (1, 2, 4), ("velo", "celo_adam", "small_fc_lopt", "celo2")

# ---- the model ------------------------------------------------------------------------------------------------------

# Assumed of the network: each GPU sends and receives at 25 GB/s (one 200 Gbit/s adapter); a message takes 10 µs, the
# all-reduce of a small buffer 2 log2(GPUs) of them; an all-to-all takes 1 µs for each peer. Of a GPU: 100 TFLOP/s in
# float32 matrix products (TF32).
BANDWIDTH, LATENCY, PEER, FLOPS = 25e9, 10e-6, 1e-6, 100e12
LSTM_UNITS, VOCABULARY = 512, 128_256


def llama(width: int, layers: int, inner: int, key_value: int, vocabulary: int, tied: bool) -> list[tuple[int, ...]]:
    """Shapes of the parameters of a Llama, (out, in)."""
    shapes: list[tuple[int, ...]] = [(vocabulary, width)] * (1 if tied else 2)
    for _ in range(layers):
        shapes += [(width, width), (key_value, width), (key_value, width), (width, width)]
        shapes += [(inner, width), (inner, width), (width, inner), (width,), (width,)]
    return [*shapes, (width,)]


MODELS = {
    "1B": llama(2048, 16, 8192, 512, VOCABULARY, tied=True),
    "70B": llama(8192, 80, 28_672, 1024, VOCABULARY, tied=False),
}


def reduction_bytes(shapes: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Bytes of VeLO's two all-reduces for tensors that are cut along their first axis."""
    first = 0
    for shape in shapes:
        a, b = factored_axes(shape)
        if a == 0:
            first += 4 * math.prod(shape) // shape[a]  # row sums
        elif b == 0:
            first += 4 * (math.prod(shape) // shape[b] + 4 * math.prod(shape) // (shape[a] * shape[b]))
    decays = features.VELO.decays
    statistics_ = 3 + 2 * (len(decays.momentum) + len(decays.second_moment))
    return first, 8 * (5 + len(shapes) * (statistics_ + sum(features.VELO.widths())))


@dataclass
class Cost:
    """Per step and rank: bytes, seconds; bytes of state that stay, and bytes that Celo2 needs during a step."""

    reduced: int
    reduce_time: float
    exchanged: float
    exchange_time: float
    orthogonalise_time: float
    sharded_state: float
    replicated_state: int
    working: float


def cost(shapes: Sequence[Sequence[int]], gpus: int) -> Cost:
    """VeLO's reductions and state, and what Celo2's matrices add, on a mesh of one dimension.

    Embeddings are in Celo2's Adam branch, as ``hf_lopt.param_groups`` has it.
    """
    reduced = sum(reduction_bytes(shapes))
    hops = 2 * math.ceil(math.log2(gpus))
    matrices = [shape for shape in shapes if len(shape) == 2 and VOCABULARY not in shape]
    flops = [5 * (4 * min(s) * math.prod(s) + 2 * min(s) ** 3) for s in matrices]
    total = 4 * sum(math.prod(s) for s in matrices)
    # The owner of most has at least its share, and at least the largest matrix.
    share = max(total / gpus, 4 * max(math.prod(s) for s in matrices))
    work = max(sum(flops) / gpus, max(flops))
    numel = sum(math.prod(s) for s in shapes)
    vectors = sum(3 * 4 * (math.prod(s) // s[axis]) for s in shapes if len(s) == 2 for axis in factored_axes(s))
    return Cost(
        reduced=reduced,
        reduce_time=2 * hops * LATENCY + 2 * reduced / BANDWIDTH,
        exchanged=2 * share,
        exchange_time=2 * (gpus - 1) * PEER + 2 * share / BANDWIDTH,
        orthogonalise_time=work / FLOPS,
        sharded_state=(16 * numel + vectors) / gpus,
        replicated_state=len(shapes) * 2 * LSTM_UNITS * 4,
        working=3 * share + 2 * total / gpus,
    )


def model_tables() -> str:
    """The tables of benchmarks/results/sharding_model.md."""
    rows = [
        "| model | GPUs | bytes reduced | time | state, sharded | state, on every rank |",
        "|---|---|---|---|---|---|",
    ]
    more = ["| model | GPUs | received, busiest rank | time | Newton-Schulz | memory |", "|---|---|---|---|---|---|"]
    for name, shapes in MODELS.items():
        for gpus in (8, 64, 256, 1024):
            c = cost(shapes, gpus)
            where = f"| {name} | {gpus:,} "
            rows.append(
                where + f"| {c.reduced / 1e6:.2f} MB | {c.reduce_time * 1e3:.2f} ms | {c.sharded_state / 1e9:,.2f} GB "
                f"| {c.replicated_state / 1e6:.1f} MB |"
            )
            more.append(
                where + f"| {c.exchanged / 1e9:,.2f} GB | {c.exchange_time * 1e3:,.0f} ms "
                f"| {c.orthogonalise_time * 1e3:,.0f} ms | {c.working / 1e9:,.1f} GB |"
            )
    return "\n".join(["All rules but the Celo2 family:", "", *rows, "", "Celo2 and ELO-Celo2, on top:", "", *more])


# ---- the measurement ------------------------------------------------------------------------------------------------


def worker(result: Path, size: str, steps: int) -> None:
    """One of the processes; the first writes {rule: [median seconds of a step, bytes given to collectives]}."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sent = count_bytes()
    found = {}
    for name in RULES:
        generator = torch.Generator().manual_seed(0)
        params = []
        for shape in SIZES[size]:
            rows = torch.arange(shape[0]).chunk(dist.get_world_size())
            own = len(rows[dist.get_rank()]) if dist.get_rank() < len(rows) else 0
            values = [torch.randn(own, *shape[1:], generator=generator) * 0.02 for _ in range(2)]
            stride = torch.empty(shape, device="meta").stride()
            p, g = (
                DTensor.from_local(x, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride)
                for x in values
            )
            params.append(torch.nn.Parameter(p))
            params[-1].grad = g
        optimizer = build(name, params)
        optimizer.step(1.0)  # compares the ranks and allocates
        times = []
        for _ in range(steps):
            dist.barrier()
            sent.clear()
            start = time.perf_counter()
            optimizer.step(1.0)
            times.append(time.perf_counter() - start)
        found[name] = [statistics.median(times), sum(sent)]
        del optimizer, params
    if dist.get_rank() == 0:
        result.write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # the teardown of gloo is no part of this


def count_bytes() -> list[int]:
    """A list that grows by the bytes of each collective: of an all-reduce its buffer, of an all-to-all its input."""
    sent: list[int] = []
    for name, place in (("all_reduce", 0), ("all_to_all_single", 1)):
        original = getattr(dist, name)

        def counted(*args, original=original, place=place, **kwargs):
            sent.append(args[place].numel() * args[place].element_size())
            return original(*args, **kwargs)

        setattr(dist, name, counted)
    return sent


def measure(size: str, steps: int) -> dict[int, dict[str, list[float]]]:
    found = {}
    for world in WORLDS:
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "result.json"
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
            command += ["-m", "benchmarks.sharding", "--worker", str(result), "--size", size, "--steps", str(steps)]
            root = str(Path(__file__).resolve().parents[1])
            subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, cwd=root)
            found[world] = json.loads(result.read_text())
    return found


def report(found: dict[int, dict[str, list[float]]], size: str, steps: int) -> str:
    lines = [
        f"Sharded step, GPT-2 shapes of {size} parameters cut along the first axis over gloo processes of one thread "
        f"on one machine ({os.cpu_count()} CPUs, {platform.machine()}, torch {torch.__version__}, "
        f"{datetime.date.today()}); median of {steps} steps. Bytes: given to collectives by the first process.",
        "",
        "| rule | " + " | ".join(f"{w} process{'es' if w > 1 else ''}: step, bytes" for w in WORLDS) + " |",
        "|---|" + "---|" * len(WORLDS),
    ]
    for name in RULES:
        cells = [f"{found[w][name][0] * 1e3:,.0f} ms, {found[w][name][1]:,}" for w in WORLDS]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", action="store_true", help="print the tables of the model and do nothing else")
    parser.add_argument("--size", choices=list(SIZES), default="26M")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.model:
        print(model_tables())
    elif args.worker:
        worker(args.worker, args.size, args.steps)
    else:
        found = measure(args.size, args.steps)
        RESULTS.mkdir(exist_ok=True)
        write_record(RESULTS / "sharding.json", found)
        text = report(found, args.size, args.steps)
        (RESULTS / "sharding.md").write_text(text)
        print(text)


if __name__ == "__main__":
    main()
