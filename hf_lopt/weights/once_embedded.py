"""Weights that an earlier version of the package embedded, for the checkpoints that were made with them."""

from __future__ import annotations

from dataclasses import replace

from hf_lopt.weights import loading, reading
from hf_lopt.weights.checks import Shapes
from hf_lopt.weights.loading import Weights


FOLDER = "earlier"


def earlier(rule_name: str, sha256: str, shapes: Shapes | None = None) -> Weights | None:
    """The weights of this content that were once embedded for a rule; None if none were.

    Raises:
        ValueError: the file is damaged.
    """
    file = loading.EMBEDDED / FOLDER / f"{rule_name}.{sha256[:12]}.safetensors"
    if not file.is_file():
        return None
    found = loading.load(rule_name, file, shapes)
    if found.sha256 != sha256:
        raise ValueError(f"embedded weights are not as they were shipped; install hf_lopt again: {file}")
    record = reading.read_json(file.with_suffix(".json"))
    own = {key: record[key] for key in ("settings", "finetune_lr", "finetune_settings")}
    return replace(found, source=f"bundled:{rule_name}@{sha256[:12]}", origin="bundled", **own)
