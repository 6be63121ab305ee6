"""Ranks that do not train the same thing; run by test_sharding.py. Writes the message of every rank for every case.

torchrun --nproc_per_node 3 sharded_errors.py RESULT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import test_rules as single  # noqa: E402
from ranks import leave  # noqa: E402


CASES = ("nothing", "weights", "horizon", "rule", "shape", "missing", "gradient", "lr", "lr_scales", "later")


def attempt(case: str) -> str:
    """Steps whose last rank differs in one thing; the message of the error, "" for none."""
    odd = dist.get_rank() == dist.get_world_size() - 1
    name = "velo_s" if odd and case == "rule" else "velo"
    settings = {"weights": single.theta("velo")}
    if odd and case == "weights":
        settings["weights"] = {key: leaf * 1.5 for key, leaf in settings["weights"].items()}
    if odd and case == "horizon":
        settings["num_training_steps"] = 30
    if odd and case == "lr":
        settings["lr"] = 0.5
    shapes = [(3, 4), (5, 2) if odd and case == "shape" else (2, 5), (6,)]
    params = single.make_params(shapes=shapes[:2] if odd and case == "missing" else shapes)
    optimizer = single.make(name, params, **settings)
    if odd and case == "lr_scales":
        optimizer.param_groups[0]["lr_scales"] = (1.0, 2.0, 1.0)
    try:
        for t in range(2):
            for i, (p, g) in enumerate(zip(params, single.gradients(params, t), strict=True)):
                absent = i == 1 and odd and case == "gradient" or i == 2 and case == "later" and t == 1
                p.grad = None if absent else g
            optimizer.step(1.0)
    except ValueError as error:
        return str(error)
    return ""


def main(result: Path) -> None:
    dist.init_process_group("gloo")
    found = {}
    for case in CASES:
        found[case] = [None] * dist.get_world_size()
        dist.all_gather_object(found[case], attempt(case))
    if dist.get_rank() == 0:
        result.write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
