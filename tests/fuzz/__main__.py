"""The command line: ``python -m tests.fuzz --minutes 5``, or ``--case TARGET:SEED`` to repeat one input."""

from __future__ import annotations

import argparse
import os
import secrets
import time
from collections import Counter


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="in all, shared by the targets")
    parser.add_argument("--seed", type=int, help="of everything; default: a random one, which is printed")
    parser.add_argument("--targets", nargs="*", help="default: all")
    parser.add_argument("--case", metavar="TARGET:SEED", help="run one input and print what came of it")
    args = parser.parse_args()
    # Before torch is imported: no hub, and tensors too small for threads.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from . import runner
    from .outcomes import BAD
    from .targets import TARGETS

    if unknown := set(args.targets or ()) - set(TARGETS):
        parser.error(f"no target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    if args.case:
        name, _, seed = args.case.partition(":")
        result = runner.run_case(name, int(seed))
        print(result)
        return int(result.outcome in BAD)
    seed = secrets.randbelow(1 << 32) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    names = args.targets or list(TARGETS)
    counts: Counter[tuple[str, str, str]] = Counter()
    for name in names:
        end = time.monotonic() + 60 * args.minutes / len(names)
        for case, result in runner.cases(name, seed):
            counts[name, result.what, result.outcome] += 1
            if result.outcome in BAD:
                print(f"{result.outcome}: --case {name}:{case} ({result.what}) {result.detail[:400]}", flush=True)
            if time.monotonic() > end:
                break
    for (name, what, outcome), count in sorted(counts.items()):
        print(f"{count:8d}  {name:18} {what:34} {outcome}")
    total: Counter[str] = Counter()
    for (_, _, outcome), count in counts.items():
        total[outcome] += count
    print(", ".join(f"{outcome}: {count}" for outcome, count in total.most_common()))
    return int(any(outcome in BAD for outcome in total))


if __name__ == "__main__":
    raise SystemExit(main())
