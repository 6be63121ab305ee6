"""What it costs to look at saved state before it is loaded: ``python -m benchmarks.loading``.

VeLO's state of a GPT of about 26M parameters goes through a file. All is timed in one process, one after another in
each round, in processor time of one thread; the file is in the page cache. "one pass" is a bare sum over the same
memory, which no exact look at the numbers can be cheaper than. "from disk" is the same share in wall-clock time, with
the file thrown out of the page cache before it is read.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import hf_lopt
from benchmarks.step import gpt2, parameters
from benchmarks.storing import rounded, write_record
from hf_lopt.saved_state import check_saved_state, checked_groups


RESULTS = Path(__file__).parent / "results" / "loading.json"


def timed(times: list[float], call: Callable[[], Any]) -> Any:
    start = time.process_time()
    result = call()
    times.append(time.process_time() - start)
    return result


def measure(rounds: int) -> dict[str, Any]:
    """Medians in seconds, and of the shares of each round."""
    torch.set_num_threads(1)
    params = parameters(gpt2(512, 5, 20_000, context=512))
    optimizer = hf_lopt.VeLO(params, num_training_steps=100, weights="bundled")
    optimizer.step(1.0)
    initial = optimizer._run_state.initial_values()
    read: list[float] = []
    load: list[float] = []
    check: list[float] = []
    one_pass: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "optimizer.pt"
        torch.save(optimizer.state_dict(), file)
        size = file.stat().st_size

        def check_only(saved: Any) -> None:
            checked_groups(saved)
            check_saved_state(optimizer.rule, optimizer.weights.theta, optimizer.param_groups, initial, saved)

        for _ in range(rounds + 1):
            saved = timed(read, lambda: torch.load(file, weights_only=True))
            timed(check, lambda: check_only(saved))  # noqa: B023
            values = [x for state in saved["state"].values() for x in state.values()]
            timed(one_pass, lambda: [x.sum() for x in values])  # noqa: B023
            timed(load, lambda: optimizer.load_state_dict(saved))  # noqa: B023
            saved = values = None  # the next round's are not to be a second copy
        from_disk = [_share_from_disk(file, check_only, optimizer) for _ in range(rounds)]
    rows = list(zip(read, load, check, one_pass, strict=True))[1:]  # the first round warms up
    names = ("torch.load", "load_state_dict", "of that the check", "one pass")
    return {
        "parameters": sum(p.numel() for p in params),
        "bytes": size,
        "seconds": {name: statistics.median(x) for name, x in zip(names, zip(*rows, strict=True), strict=True)},
        "share of the check": statistics.median(check / (read + load) for read, load, check, _ in rows),
        "from disk": statistics.median(from_disk),
        "share of one pass": statistics.median(bare / (read + load) for read, load, _, bare in rows),
    }


def _share_from_disk(file: Path, check: Callable[[Any], None], optimizer: hf_lopt.LearnedOptimizer) -> float:
    descriptor = os.open(file, os.O_RDWR)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    start = time.perf_counter()
    saved = torch.load(file, weights_only=True)
    optimizer.load_state_dict(saved)
    whole = time.perf_counter() - start
    start = time.perf_counter()
    check(saved)
    return (time.perf_counter() - start) / whole


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loading", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    result = {
        "command": f"python -m benchmarks.loading --rounds {args.rounds}",
        "torch": torch.__version__,
        "machine": platform.machine(),
        **measure(args.rounds),
    }
    write_record(RESULTS, rounded(result, 3))
    print(RESULTS.read_text())


if __name__ == "__main__":
    main()
