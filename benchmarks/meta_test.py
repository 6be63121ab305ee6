"""Weights that a search left, against the constructed ones on the test tasks: opened once for each of them.

    python -m benchmarks.meta_test small_fc_lopt FOLDER     # -> benchmarks/results/meta_test_small_fc_lopt.json

One thread. The first seven tasks had been opened before for other weights, the others never.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.meta_experiments import judge, without_runs, write
from hf_lopt.meta import evaluate, mixtures, table
from hf_lopt.meta.theta import starting_weights


OPENED_BEFORE = 7


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rule")
    parser.add_argument("folders", nargs="+", help="saved weights, as weights=... takes them")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=4)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = {"constructed": starting_weights(args.rule, "constructed")}
    found |= {Path(folder).name: starting_weights(args.rule, folder) for folder in args.folders}
    if args.rule in mixtures.MIXTURES:  # the same functions, computed faster
        found = {name: mixtures.narrowed(args.rule, weights) for name, weights in found.items()}
    judged = judge(args.rule, found, "test", args.steps, args.seeds)
    record = without_runs(judged)
    new = dict(list(judged["results"].items())[OPENED_BEFORE:])
    record["new tasks"] = {}
    for name in found:
        total = evaluate.over_tasks(list(table.comparisons(new, name, "constructed").values()))
        record["new tasks"][name] = {"ratio": total.ratio, "interval": total.interval()}
        print("new tasks:", name, f"{total.ratio:.4f}", [f"{x:.4f}" for x in total.interval()], flush=True)
    write(f"meta_test_{args.rule}", record, f"{args.rule} FOLDER ...", "meta_test")


if __name__ == "__main__":
    main()
