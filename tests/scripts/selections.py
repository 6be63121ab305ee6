"""Ranks that lose or gain gradients alone or together, with ordinary tensors. Writes what each rank saw, as JSON."""

from __future__ import annotations

import json
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import hf_lopt
from hf_lopt import rules


sys.path.insert(0, str(Path(__file__).parents[1]))

from ranks import leave  # noqa: E402


# What happens at the third step -> which gradients each rank has then.
CASES = {
    "one lost": ((0, 1, 2), (0, 2)),
    "others": ((0, 1), (1, 2)),
    "all lost": ((0, 1, 2), ()),
    "lost together": ((0, 2), (0, 2)),
    "all lost together": ((), ()),
}
GAINED = "one gained"  # the ranks begin without the second gradient


def run(name: str, case: str) -> dict[str, object]:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape)) for shape in ((6, 5), (7,), (5, 6))]
    settings = {"num_training_steps": 10} if rules.get(name).needs_horizon else {}
    optimizer = hf_lopt.LearnedOptimizer(params, name, weights="bundled", **settings)
    rank = dist.get_rank()
    before, message = params, ""
    try:
        for t in range(4):
            chosen = (0, 2) if case == GAINED else (0, 1, 2)
            if t == 2:
                chosen = ((0, 1, 2), (0, 2))[rank] if case == GAINED else CASES[case][rank]
            for i, p in enumerate(params):
                p.grad = torch.full_like(p, 0.1 * (t + 1)) if i in chosen else None
            before = [p.detach().clone() for p in params]
            optimizer.step(1.0)
    except (RuntimeError, ValueError) as error:
        message = f"{type(error).__name__}: {error}"
    unchanged = all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    return {"message": message, "unchanged": unchanged, "steps": optimizer.steps_done}


def main(path: str, names: list[str]) -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    found = {name: {case: run(name, case) for case in (*CASES, GAINED)} for name in names}
    Path(f"{path}.{dist.get_rank()}").write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
