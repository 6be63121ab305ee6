"""The least size that a relative step assumes for a tensor, where ``min_param_scale`` is left to the optimizer.

VeLO and Celo multiply a step with the size (root mean square) of its tensor. One that starts at or near zero would
stay there. What a tensor has to be taken for depends on what it is: a norm that is stored as 1 + w has a size of about
1, a table of position embeddings that of other embeddings, and biases start at zero in every model and do well without
a floor. So the floor is decided per tensor, once, when its state is made, from its size then and its kind. It is
part of the state, and a run that is resumed goes on with it, whatever the size of the tensor by then.

The kind comes from the module that owns the tensor, which is looked for among the live modules: all doors into the
optimizer give it tensors only, and FSDP replaces them. Where there is none it comes from names, the groups'
``param_names``, else from the shape and the values alone. Constants: ``python -m benchmarks.zero_init``.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_lopt import distributed, notices
from hf_lopt.live_modules import models_of
from hf_lopt.parameters import NORMS, TABLES, Parameter, describe, long_axes
from hf_lopt.tensor_sizes import Size, sizes_of


KEY = "min_param_scale"  # of settings, and of the state of a tensor
# Below it a tensor is at or near zero. The smallest random initialisations of real models are above (GPT-2 of 48
# layers: 0.002), layer scales, at 1e-4 and less, below.
NEAR_ZERO = 1e-3


@dataclass(frozen=True)
class Kind:
    """What a tensor is.

    Attributes:
        name: in the plural, for the log.
        floor: the least size that it counts as, in units of the parameter; 0 for none.
        always: whether also a tensor counts so that does not start near zero.
    """

    name: str
    floor: float
    always: bool = False


ONE_PLUS = Kind("norms stored as 1 + w", 1.0)
NORM = Kind("scales of norms", 1.0)
TABLE = Kind("tables", 0.1)
PROJECTION = Kind("projections", 0.1)
SCALE = Kind("layer scales", 0.3)
GATE = Kind("gates", 1.0)
BIAS = Kind("biases", 0.0)
VECTOR = Kind("vectors of zeros", 0.0)
# The output matrix of an adapter (B) starts at zero, and is small still if it was trained before. The input matrix (A)
# starts from random numbers, as other matrices do. Both by benchmarks/adapters.py: with A counted as 0.1, four times
# its size in a 135M language model, it moves too far there, and with 0.1 for B some runs end far above others.
ADAPTER = Kind("output matrices of adapters", 0.05, always=True)
OF_ADAPTER = Kind("tensors of adapters", 0.1)

_NORM_NAME = re.compile(r"norm|(^|[._])ln[_\d]*($|[._])", re.IGNORECASE)
_TABLE_NAME = re.compile(r"(^|_)(embed(ding)?s?|pos|position(al)?|tokens?|query|queries|latents?|table)(_|$)")
_SCALE_NAME = re.compile(r"scale|gamma|lambda|(^|_)ls\d*(_|$)")
_ADAPTER_NAME = re.compile(r"(^|\.)lora_(?P<output>B(\.|$))?")


def decide(pairs: Iterable[tuple[Tensor, Mapping[str, Any]]], state: MutableMapping[Tensor, Any], name: str) -> None:
    """Give each tensor whose group leaves it open, and that has none, its floor: ``state[p]["min_param_scale"]``, 0-d.

    The size is that of the whole tensor, so of sharded ones this is a collective. Waits for the device. A tensor
    without values (on the device "meta") gets 0.

    Args:
        pairs: tensors with their groups.
        state: of each tensor with elements.
        name: of the optimizer, for the line that tells what was decided.
    """
    new = [(p, g) for p, g in pairs if g.get(KEY, 0.0) is None and p.numel() and KEY not in state[p]]
    if not new:
        return
    sizes, told = sizes_of([p for p, _ in new]), Counter[Kind]()
    kinds = _kinds(new, sizes)
    for (p, _), size in zip(new, sizes, strict=True):
        kind = kinds[id(p)]
        floor = kind.floor if kind.always or size.rms < NEAR_ZERO else 0.0
        state[p][KEY] = torch.full((), floor, dtype=torch.float32, device=distributed.local(p).device)
        told[kind] += floor > 0
    parts = ", ".join(f"{count} {kind.name} ({kind.floor:g})" for kind, count in told.items() if count)
    if parts and distributed.rank() == 0:
        full = f"{name}'s step is relative to the size of a tensor, and these count as at least that large"
        notices.note(f"{KEY}: {parts}", f"{KEY}: {parts}: {full}. {KEY}=0 leaves it out.")


def _kinds(pairs: Sequence[tuple[Tensor, Mapping[str, Any]]], sizes: Sequence[Size]) -> dict[int, Kind]:
    """id of a tensor -> its kind; tensors that need none may be left out."""
    names = {
        id(p): n for _, group in pairs for p, n in zip(group["params"], group.get("param_names", ()), strict=False)
    }
    found = {
        id(p): _by_name(p, size, names[id(p)]) if id(p) in names else _by_value(p, size)
        for (p, _), size in zip(pairs, sizes, strict=True)
    }
    # The search for models looks at all objects: only for sizes below a floor. Adapters have one wherever they start.
    least = ADAPTER.floor if "peft" in sys.modules else NEAR_ZERO
    if all(size.rms >= least for size in sizes):
        return found
    by_id = {id(p): size for (p, _), size in zip(pairs, sizes, strict=True)}
    for model in reversed(models_of(p for p, _ in pairs)):  # the one that owns most of them decides
        for parameter in describe(model):
            size = by_id.get(id(parameter.tensor))
            if size is not None:
                found[id(parameter.tensor)] = _by_module(parameter, size)
    return found


def _by_module(parameter: Parameter, size: Size) -> Kind:
    p, role, leaf = parameter.tensor, parameter.role, parameter.leaf
    if parameter.of_adapter:
        return ADAPTER if parameter.of_rank else OF_ADAPTER
    if role == "norm":
        if "bias" in leaf:
            return BIAS
        return NORM if isinstance(parameter.owner, NORMS) else ONE_PLUS
    if role == "bias":
        return _bias(p, leaf)
    if role in ("embedding", "table"):
        of_layer = parameter.in_layer and not isinstance(parameter.owner, TABLES)
        return PROJECTION if of_layer else TABLE
    if parameter.in_layer:
        return PROJECTION
    return _bare(p, size, leaf)


def _bias(p: Tensor, leaf: str) -> Kind:
    """Those of positions are tables with a row for each."""
    is_table = long_axes(p) > 1 and (_TABLE_NAME.search(leaf) or "attention" in leaf)
    return TABLE if is_table else BIAS


def _bare(p: Tensor, size: Size, leaf: str) -> Kind:
    """The kind of a parameter of no layer that is not called a bias."""
    if _TABLE_NAME.search(leaf):
        return TABLE
    if long_axes(p) > 1:
        return PROJECTION
    return SCALE if p.numel() > 1 and (size.rms > 0 or _SCALE_NAME.search(leaf)) else GATE


def _by_name(p: Tensor, size: Size, name: str) -> Kind:
    path, _, leaf = name.rpartition(".")
    if adapter := _ADAPTER_NAME.search(name):
        return ADAPTER if adapter["output"] else OF_ADAPTER
    if "bias" in leaf:
        return _bias(p, leaf)
    if leaf != "weight":
        return _bare(p, size, leaf)
    if long_axes(p) > 1:
        return TABLE if _TABLE_NAME.search(path.rpartition(".")[2]) else PROJECTION
    return ONE_PLUS if _NORM_NAME.search(path.rpartition(".")[2]) else _by_value(p, size)


def _by_value(p: Tensor, size: Size) -> Kind:
    """Of a vector of zeros nobody can tell whether it is a bias or a norm stored as 1 + w."""
    if long_axes(p) > 1:
        return PROJECTION
    if p.numel() == 1:
        return GATE
    if size.rms > 0 and size.constant:
        return SCALE
    return VECTOR if p.dim() == 1 else TABLE
