"""Parameter groups that know the model: which tensors are matrices, how their axes lie, how wide their layer is.

A learned optimizer sees a tensor's shape only. What the shape does not tell comes from the modules: the order of the
axes (a (6, 6) weight may be (out, in) or (in, out)), embeddings and norms, which celo2 leaves to Adam, and the width
that μP scales steps with.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from hf_lopt import rules
from hf_lopt.rules.base import Rule
from hf_lopt.step.accumulators import reference_axes


_TABLES = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _NormBase)
_LAYERS = (nn.Linear, _ConvNd, *_TABLES)
# Norms of transformers are classes of their own, such as LlamaRMSNorm.
_NORM_CLASS = re.compile(r"norm(?!al)", re.IGNORECASE)
_EXPERTS_CLASS = re.compile(r"expert", re.IGNORECASE)
# Expert stacks (E, in, out) that do not say so; others of transformers have an attribute is_transposed.
_TRANSPOSED_EXPERTS = ("Llama4TextExperts",)
_BIAS_NAME = re.compile(r"(^|_)bias(_|$)")
# Tables that are bare parameters: position_embeddings, cls_token, pos_embed, lora_embedding_A, ….
_TABLE_NAME = re.compile(r"(^|_)(embed(ding)?s?|pos|position(al)?|tokens?)(_|$)")
# Names that Trainer leaves out of weight decay (transformers, Trainer.get_decay_parameter_names).
_NO_DECAY_NAME = re.compile(r"bias|layernorm|rmsnorm|(^|\.|_)norm($|\.)")


@dataclass(frozen=True)
class Parameter:
    """What a model says about one of its trainable parameters.

    Attributes:
        name: as in ``named_parameters``.
        tensor: the parameter.
        role: "embedding" (input tables and output embeddings), "norm", "bias", "vector" (at most one axis longer than
            1) or "matrix", of linear and convolution layers and of stacks of them.
        axis_order: how its axes lie, see :func:`hf_lopt.step.accumulators.reference_axes`.
        decays: whether weight decay applies: not to norms and biases, as in Trainer.
        in_layer: whether it belongs to a linear, convolution or embedding layer, not to a module as a bare parameter.
    """

    name: str
    tensor: Tensor
    role: str
    axis_order: str
    decays: bool
    in_layer: bool

    @property
    def fan_in(self) -> int:
        """Width of the input of a matrix; for a convolution its channels, without the kernel."""
        return self.tensor.shape[reference_axes(self.tensor.dim(), self.axis_order)[-2]]

    @property
    def fan_out(self) -> int:
        """Width of the output of a matrix."""
        return self.tensor.shape[reference_axes(self.tensor.dim(), self.axis_order)[-1]]


def param_groups(
    model: nn.Module,
    rule: str = "celo2",
    *,
    weight_decay: float | None = None,
    base_width: float | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Groups of all trainable parameters of ``model`` for the optimizer of ``rule``; each parameter is in one group.

    - ``branch`` (celo2, elo_celo2): "adam" for embeddings, the head that ``get_output_embeddings`` names, norms,
      biases and other vectors, "network" for the rest. Rules that send everything through the network keep doing so.
    - ``axis_order`` (all rules): by the module that owns the parameter.
    - ``step_scale`` (mulo, small_fc_lopt, elo): from ``base_width``, or from what the ``mup`` package attached to the
      parameters: 1 / width_mult of the tensors with two infinite dimensions, 1 for the others.
    - ``weight_decay``: 0 for norms and biases.

    ``base_width / fan_in`` is the multiplier of a hidden matrix; embeddings, the first and the last layer and all
    vectors have 1. A layer counts as first (last) if it is what ``get_input_embeddings`` (``get_output_embeddings``)
    returns; in a model that does not tell, if it is the first (last) linear or convolution layer and no other matrix
    has its input (output) width on the other side. Anything else of finite width, such as a router, needs mup. The
    reference of μLO has a plain 1 / fan_in, a constant factor of ``base_width`` less: ``base_width=1`` is the same.

    Args:
        model: any module.
        rule: name of the rule, one of :func:`hf_lopt.available`.
        weight_decay: for matrices, embeddings and vectors other than norms and biases; None: the rule's own.
        base_width: width for which the learning rate was tuned, for rules with ``step_scale``.
        settings: ``lr`` or settings that the rule has per group, for all groups; they replace what is derived here.

    Returns:
        parameter groups; those with weight decay first, otherwise in the order of ``named_parameters``.

    Raises:
        ValueError: for a model without trainable parameters, an unknown rule, and settings that the rule does not have
            per group.
    """
    rule_ = rules.get(rule)
    _check(rule_, base_width, settings)
    found = describe(model)
    scales = _step_scales(found, model, rule_, base_width) if "step_scale" in rule_.per_group else {}
    if weight_decay is None:
        weight_decay = rule_.defaults["weight_decay"]
    groups: dict[tuple, dict[str, Any]] = {}
    for parameter in found:
        values: dict[str, Any] = {"weight_decay": weight_decay if parameter.decays else 0.0}
        if "axis_order" in rule_.per_group:
            values["axis_order"] = parameter.axis_order
        if rule_.defaults.get("branch") == "auto":
            values["branch"] = "network" if parameter.role == "matrix" else "adam"
        if scales:
            values["step_scale"] = scales[parameter.name]
        values |= settings
        # Whether it decays is part of the key, so that the groups do not depend on the number.
        key = (not parameter.decays, *values.values())
        groups.setdefault(key, {"params": [], **values})["params"].append(parameter.tensor)
    return [groups[key] for key in sorted(groups, key=lambda key: key[0])]


def describe(model: nn.Module) -> list[Parameter]:
    """What ``model`` says about each of its trainable parameters, in the order of ``named_parameters``.

    Raises:
        ValueError: if it has none.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        some = any(True for _ in model.parameters())
        why = "all of its parameters have requires_grad=False" if some else "it has no parameters at all"
        raise ValueError(f"{type(model).__name__} has nothing to train: {why}. Pass the model that is to be trained.")
    owners = _owners(model)
    tables = _tables(model, "get_input_embeddings") | _tables(model, "get_output_embeddings")
    found = []
    for name, p in named:
        owner, leaf = owners[id(p)]
        role = _role(owner, leaf, p, id(p) in tables)
        decays = role not in ("norm", "bias") and not _NO_DECAY_NAME.search(name.lower())
        in_layer = isinstance(owner, _LAYERS) or _is_conv1d(owner)
        found.append(Parameter(name, p, role, _axis_order(owner, leaf, p), decays, in_layer))
    return found


def _check(rule: Rule, base_width: float | None, settings: Mapping[str, Any]) -> None:
    valid = ("lr", *rule.per_group)
    unknown = [key for key in settings if key not in valid]
    if unknown:
        raise ValueError(
            f"{rule.name} has no {', '.join(unknown)} per group; it has {', '.join(valid)} and weight_decay. Pass the "
            f"rest to {rule.class_name}(...)."
        )
    if base_width is None:
        return
    if "step_scale" not in rule.per_group:
        raise ValueError(
            f"base_width={base_width!r}: {rule.name} has no width multipliers (step_scale); mulo has them"
        )
    number = isinstance(base_width, (int, float)) and not isinstance(base_width, bool)
    if not (number and math.isfinite(base_width) and base_width > 0):
        raise ValueError(f"base_width must be a positive number, got {base_width!r}")


def _owners(model: nn.Module) -> dict[int, tuple[nn.Module, str]]:
    """id of a parameter -> the module whose attribute it is, and the attribute; of a tied one the table."""
    owners: dict[int, tuple[nn.Module, str]] = {}
    for name, module in model.named_modules():
        holder, attribute = module, ""
        # torch.nn.utils.parametrize keeps the tensors of `layer.weight` under layer.parametrizations.weight.
        match = re.fullmatch(r"(?:(.*)\.)?parametrizations\.(.+)", name)
        if match is None and name and isinstance(module, (nn.ParameterDict, nn.ParameterList)):
            match = re.fullmatch(r"(?:(.*)\.)?([^.]+)", name)
        if match is not None:
            holder, attribute = model.get_submodule(match[1] or ""), match[2]
        for leaf, p in module._parameters.items():
            if p is None:
                continue
            owner = (holder, attribute or leaf)
            found = owners.get(id(p))
            if found is None or (isinstance(module, _TABLES) and not isinstance(found[0], _TABLES)):
                owners[id(p)] = owner
    return owners


def _tables(model: nn.Module, method: str) -> set[int]:
    """ids of the parameters of what ``method`` of the model, or of a model inside of it, returns."""
    found: set[int] = set()
    for module in model.modules():
        if not hasattr(module, method):
            continue
        try:
            table = getattr(module, method)()
        except (NotImplementedError, AttributeError):  # transformers: models without one
            continue
        if isinstance(table, nn.Module) and table is not module:
            found.update(id(p) for p in table.parameters())
    return found


def _role(owner: nn.Module, leaf: str, p: Tensor, is_table: bool) -> str:
    if isinstance(owner, _NORMS) or (_NORM_CLASS.search(type(owner).__name__) and not isinstance(owner, _LAYERS)):
        return "norm"
    if _BIAS_NAME.search(leaf):
        return "bias"
    if is_table or isinstance(owner, _TABLES) or (not isinstance(owner, _LAYERS) and _TABLE_NAME.search(leaf)):
        return "embedding"
    return "matrix" if sum(n > 1 for n in p.shape) >= 2 else "vector"


def _is_conv1d(owner: nn.Module) -> bool:
    """Whether ``owner`` is the Conv1D of transformers: a linear layer whose weight is (in, out)."""
    return any(cls.__name__ == "Conv1D" for cls in type(owner).__mro__)


def _axis_order(owner: nn.Module, leaf: str, p: Tensor) -> str:
    if p.dim() < 2:
        return "torch"  # of no effect, and the same for all vectors
    if isinstance(owner, _ConvTransposeNd):
        return "torch_transposed"
    if isinstance(owner, (nn.Linear, _ConvNd)):
        return "torch"
    if isinstance(owner, _TABLES) or _TABLE_NAME.search(leaf) or _BIAS_NAME.search(leaf):
        return "jax"
    if _is_conv1d(owner):
        return "jax"
    if p.dim() == 2:
        return "torch"  # routers, torch.nn's recurrent and attention weights
    name = type(owner).__name__
    if _EXPERTS_CLASS.search(name):
        transposed = getattr(owner, "is_transposed", name in _TRANSPOSED_EXPERTS)
        return "jax" if transposed else "torch_stacked"
    return "jax"


def _step_scales(found: list[Parameter], model: nn.Module, rule: Rule, base_width: float | None) -> dict[str, float]:
    """Name -> multiplier of the step."""
    with_mup = [p for p in found if getattr(p.tensor, "infshape", None) is not None]
    if with_mup:
        if base_width is not None:
            warnings.warn(
                f"base_width={base_width:g} is dropped: the parameters carry the widths that mup has set (infshape)",
                stacklevel=3,
            )
        scales = dict.fromkeys((p.name for p in found), 1.0)
        return scales | {p.name: _mup_scale(p.tensor.infshape) for p in with_mup}
    if base_width is None:
        if rule.name == "mulo":
            warnings.warn(
                "mulo has no widths to scale its steps with, so every step_scale is 1: pass base_width=... (through "
                "Trainer: optim_args='base_width=...'), or set base shapes with the mup package",
                stacklevel=3,
            )
        return {}
    hidden = set(_hidden(found, model))
    return {p.name: base_width / p.fan_in if p.name in hidden else 1.0 for p in found}


def _mup_scale(infshape: Any) -> float:
    return 1.0 / float(infshape.width_mult()) if infshape.ninf() == 2 else 1.0


def _hidden(found: list[Parameter], model: nn.Module) -> Iterator[str]:
    """Names of the matrices between the first and the last layer."""
    # One input channel, as in a depthwise convolution, does not grow with the width.
    matrices = [p for p in found if p.role == "matrix" and p.fan_in > 1]
    # Bare parameters of a module are listed before its layers, wherever they are used.
    layers = [p for p in matrices if p.in_layer]
    outer = set()
    if layers and not _tables(model, "get_input_embeddings"):
        first = layers[0]
        outer |= {first.name} if all(p.fan_out != first.fan_in for p in matrices if p is not first) else set()
    if layers and not _tables(model, "get_output_embeddings"):
        last = layers[-1]
        outer |= {last.name} if all(p.fan_in != last.fan_out for p in matrices if p is not last) else set()
    return (p.name for p in matrices if p.name not in outer)
