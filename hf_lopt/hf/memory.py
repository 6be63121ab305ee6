"""``python -m hf_lopt --memory MODEL``: bytes of parameters, gradients and state, without loading the model.

Counted are the tensors themselves, made on the device "meta" by the very functions that a step calls. Activations and
what an allocator keeps are not.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from hf_lopt import rules
from hf_lopt.hf.groups_table import empty_model
from hf_lopt.optimizers import OPTIMIZERS
from hf_lopt.param_groups import param_groups
from hf_lopt.step.accumulators import STATE_DTYPES, factored_axes, matrix_shape, without_view


GIB = 2**30
_BNB_BLOCK, _BNB_LEAST = 256, 4096


def _share(p: Tensor, ranks: int) -> float:
    """The part of a parameter that the first of several ranks holds, which cut it along its first axis."""
    return 1.0 if not p.dim() else -(-p.shape[0] // ranks) / p.shape[0]


def state_bytes(model: nn.Module, rule_name: str, state_dtype: str, ranks: int = 1) -> int:
    """Bytes of the state that a rule keeps for a model on the first of ``ranks`` (FSDP)."""
    rule, total = rules.get(rule_name), 0.0
    theta = rule.load_weights("bundled").theta
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of widths that nobody gave, which take no memory
        groups = param_groups(model, rule_name, state_dtype=state_dtype)
    for group in groups:
        settings = {**rule.defaults, **group}
        for p in group["params"]:
            order = settings["axis_order"]
            axes = factored_axes(matrix_shape(p.shape, order), without_view(order))
            whole = {"lstm_hidden", "lstm_cell", "from_mlp"}
            # A factored accumulator without the first axis is the same on all ranks.
            whole |= {name for name, axis in zip(("factored_row", "factored_col"), axes, strict=True) if axis == 0}
            state = rule.init_state(torch.empty(p.shape, dtype=p.dtype, device="meta"), settings, theta)
            total += sum(x.nbytes * (1.0 if key in whole else _share(p, ranks)) for key, x in state.items())
    return round(total)


def adamw_bytes(model: nn.Module, bits: int, ranks: int = 1) -> int:
    """Bytes of the state of AdamW with 32 or 8 bits (bitsandbytes: blocks of 256, small tensors in 32 bits)."""
    total = 0.0
    for p in (p for p in model.parameters() if p.requires_grad):
        small = bits == 32 or p.numel() < _BNB_LEAST
        each = 8 * p.numel() if small else 2 * (p.numel() + 4 * math.ceil(p.numel() / _BNB_BLOCK))
        total += each * _share(p, ranks)
    return round(total)


def rows(model: nn.Module, names: Sequence[str], ranks: int = 1) -> Iterator[tuple[str, list[int | None]]]:
    """Of each optimizer its name, and the bytes of its state by ``STATE_DTYPES``."""
    for name in names:
        yield name, [state_bytes(model, name, kind, ranks) for kind in STATE_DTYPES]
    yield "AdamW", [adamw_bytes(model, 32, ranks), None, None]
    yield "8-bit AdamW", [None, None, adamw_bytes(model, 8, ranks)]


def report(name: str, optim: str | None = None, ranks: int = 1) -> str:
    """The table for a model by its name, see :func:`hf_lopt.hf.groups_table.empty_model`, of one optimizer or of all.

    Raises:
        ValueError: for what :func:`empty_model` refuses.
    """
    model = empty_model(name)
    trainable = [p for p in model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trainable)
    local = sum(p.numel() * _share(p, ranks) for p in trainable)
    lines = [f"{type(model).__name__}: {count:,} trainable parameters" + _of_ranks(ranks)]
    lines += [f"GiB   float32 {4 * local / GIB:.2f}, bfloat16 {2 * local / GIB:.2f}: parameters, and gradients again"]
    title = ["state in GiB (bytes per parameter)", *STATE_DTYPES]
    found = [title]
    for label, sizes in rows(model, [optim] if optim else sorted(OPTIMIZERS), ranks):
        cells = ["-" if x is None else f"{x / GIB:.2f} ({x / max(local, 1):.2f})" for x in sizes]
        found.append([label, *cells])
    widths = [max(len(row[i]) for row in found) for i in range(len(title))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in found]
    return "\n".join(lines)


def _of_ranks(ranks: int) -> str:
    return f", on each of {ranks} ranks that share them (FSDP)" if ranks > 1 else ""
