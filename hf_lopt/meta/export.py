"""Trained weights as a folder that ``weights=...`` takes, with where they come from."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from hf_lopt import rules, weights
from hf_lopt.meta import atomic
from hf_lopt.meta.config import from_dict
from hf_lopt.meta.search import search
from hf_lopt.meta.theta import starting_weights
from hf_lopt.meta.train import CHECKPOINT


PROVENANCE = "meta_training.json"


def _config_hash(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def load(run: str | os.PathLike, last: bool = False) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The weights of a training folder and their provenance.

    ``last``: the weights of the last step instead of those that were selected on the validation tasks.

    Raises:
        ValueError: there is no checkpoint, or it holds no weights yet.
    """
    path = Path(run) / CHECKPOINT
    if not path.is_file():
        raise ValueError(f"{run} holds no {CHECKPOINT}: give the output folder of `python -m hf_lopt.meta train`")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    config = from_dict(saved["config"])
    best = saved["best"] if not last else {}
    if best:
        theta, step = dict(best["theta"]), best["step"]
    else:
        found = search(config)
        found.load_state_dict(saved["search"])
        theta, step = found.theta(), found.steps
    start = starting_weights(config.rule, config.start)
    record = {
        "origin": "meta-trained",
        "rule": config.rule,
        "sha256": weights.content_sha256(theta),
        "generator": "python -m hf_lopt.meta train",
        "config": saved["config"],
        "config_sha256": _config_hash(saved["config"]),
        "outer_step": step,
        "selected": bool(best),
        "start": config.start,
        "start_sha256": weights.content_sha256(start),
        "torch": torch.__version__,
    }
    return {name: leaf.clone() for name, leaf in theta.items()}, record


def export(
    run: str | os.PathLike, folder: str | os.PathLike, format: str = "theta_state", last: bool = False
) -> list[Path]:
    """Write the weights of a training folder, as :func:`hf_lopt.weights.save` does, and where they come from."""
    theta, record = load(run, last)
    settings = {k: v for k, v in record["config"]["settings"].items() if k in rules.get(record["rule"]).defaults}
    written = weights.save(theta, folder, format=format, rule=record["rule"], settings=settings)
    target = Path(folder).expanduser() / PROVENANCE
    atomic.replace(target, lambda path: path.write_text(json.dumps(record, indent=2) + "\n"))
    return [*written, target]
