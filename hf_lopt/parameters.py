"""What a model says about its parameters: which are matrices, how their axes lie, which are tables, norms, biases.

A learned optimizer sees a tensor's shape only. What the shape does not tell comes from the modules. A layer of torch
is known by its class. A parameter that a module holds by itself, a *bare* one, counts as a matrix only where something
says so: its module is a kind of linear layer, router or experts, or it is called a weight, a kernel or a projection.
Everything else of several axes is a table: positions, latent queries, prompts, offsets of an attention bias, the decay
rates of a state space model. Adam suits any tensor, an orthogonalised step suits matrices only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from hf_lopt.step.accumulators import matrix_shape, reference_shape, without_view


ROLES = ("matrix", "depthwise", "embedding", "table", "norm", "bias", "vector")

TABLES = (nn.Embedding, nn.EmbeddingBag)
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _NormBase)
_LAYERS = (nn.Linear, _ConvNd, *TABLES)
_OTHER_LAYERS = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, nn.Bilinear)
# Norms of transformers are classes of their own, such as LlamaRMSNorm.
_NORM_CLASS = re.compile(r"norm(?!al)", re.IGNORECASE)
_EXPERTS_CLASS = re.compile(r"expert", re.IGNORECASE)
# Expert stacks (E, in, out) that do not say so; others of transformers have an attribute is_transposed.
_TRANSPOSED_EXPERTS = ("Llama4TextExperts",)
# attention_biases, relative_position_bias_table, ….
_BIAS_NAME = re.compile(r"(^|_)bias(es)?(_|$)")
# Tables that are bare parameters: position_embeddings, cls_token, pos_embed, lora_embedding_A, rel_pos_h, ….
_TABLE_NAME = re.compile(r"(^|_)(emb(ed)?(ding)?s?|pos|position(al)?|tokens?|latents?|prompts?|quer(y|ies))(_|$)")
# What holds a table as its weight and is no nn.Embedding: QuantEmbedding, AxialPositionEmbeddings.
_TABLE_CLASS = re.compile(r"(embedding|position|positional|encoding)s?$|quantizer", re.IGNORECASE)
# Modules whose bare parameters are matrices: QuantLinear, JetMoeParallelExperts, MixtralTopKRouter.
_MATRIX_CLASS = re.compile(r"(linear|dense|router)$|expert", re.IGNORECASE)
_MATRIX_NAME = re.compile(
    r"(^|_)(w|weights?|kernels?|mat(rix|rices)?|proj(ection)?s?|heads?|lora|qkv|kv|fc|linear|dense|fn)\d*(_|$)"
)
# As they are called in the formula of attention; elsewhere such a letter may stand for anything.
_ATTENTION_NAME = re.compile(r"(w_?)?[qkvor]")
_SCALE_NAME = re.compile(r"(^|_)(scales?|gammas?|static|logits?)(_|$)")
_HEAD_COUNTS = ("n_head", "n_heads", "num_heads", "num_attention_heads")
# Bare matrices that do not tell how their axes lie: class, attribute -> role, axis order. The first match counts.
_KNOWN = (
    # x @ weight, so (in, out).
    (r".*", r"mm_input_projection_weight|prompts_visual_projection", "matrix", "jax"),
    # A column for each distance, so a table of positions.
    (r"Inkling\d*RelativeLogits", r"proj", "table", "jax"),
    # A head for each codebook.
    (r"CsmCodebooksHead", r"weight", "embedding", "jax"),
    # weight @ x, one for each head.
    (r"ZambaMambaMixer", r"(x|dt)_proj_weight", "matrix", "torch_stacked"),
    # w1, v1 (E hidden, in) and w2 (E hidden, out); the experts' sizes are attributes.
    (r"DbrxExpertGLU", r"[wv]1", "matrix", "torch_stacked/{moe_num_experts}"),
    (r"DbrxExpertGLU", r"w2", "matrix", "jax/{moe_num_experts}"),
    (r"\w*GroupedLinear", r"weight", "matrix", "torch_stacked/{n_groups}"),
    # A gate of the size of a linear layer's weight.
    (r"\w*Indexer", r"index_kpool_compress_gate", "matrix", "torch"),
    (r"OmDetTurbo\w*", r"text_projection", "matrix", "jax"),
)
# Linear layers of LayoutLM whose columns are looked up by the distance of two tokens.
_TABLE_IN_LINEAR = re.compile(r"(^|\.)rel_pos(_[xy])?_bias\.weight$")
# Names that Trainer leaves out of weight decay (transformers, Trainer.get_decay_parameter_names).
_NO_DECAY_NAME = re.compile(r"bias|layernorm|rmsnorm|(^|\.|_)norm($|\.)")


@dataclass(frozen=True)
class Parameter:
    """What a model says about one of its trainable parameters.

    Attributes:
        name: as in ``named_parameters``.
        tensor: the parameter.
        role: one of ``ROLES``. "matrix", of linear and convolution layers and of stacks of them; "depthwise",
            convolutions of each channel by itself; "embedding", the input tables and the output embeddings; "table",
            other tensors that no layer multiplies with: positions, latents, prompts, states; "norm"; "bias"; "vector"
            (at most one axis longer than 1).
        axis_order: how its axes lie, see :func:`hf_lopt.step.accumulators.reference_axes`.
        decays: whether weight decay applies: not to norms and biases, as in Trainer.
        in_layer: whether it belongs to a linear, convolution or embedding layer, not to a module as a bare parameter.
        owner: the module whose attribute it is; of a tied one the table.
        leaf: the name of that attribute.
        of_rank: whether the input of a matrix is the rank of an adapter, which does not grow with the model.
        of_adapter: whether a layer of PEFT has added it.
    """

    name: str
    tensor: Tensor
    role: str
    axis_order: str
    decays: bool
    in_layer: bool
    owner: nn.Module
    leaf: str
    of_rank: bool = False
    of_adapter: bool = False

    @property
    def fan_in(self) -> int:
        """Width of the input of a matrix; for a convolution its channels, without the kernel."""
        return self._reference_shape()[-2]

    @property
    def summands(self) -> int:
        """How many products each output of a matrix adds up: the width of its input, times the size of a kernel."""
        return summands(self.tensor.shape, self.axis_order)

    @property
    def fan_out(self) -> int:
        """Width of the output of a matrix."""
        return self._reference_shape()[-1]

    def _reference_shape(self) -> tuple[int, ...]:
        return _matrix_as_reference(self.tensor.shape, self.axis_order)


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
    outer = tables(model, "get_input_embeddings") | tables(model, "get_output_embeddings")
    adapted, adapters = _layers_of_adapters(model), _adapters_in(model)
    found = []
    for name, p in named:
        owner, leaf = owners[id(p)]
        role, axis_order = _role_and_order(owner, leaf, p, id(p) in outer)
        if isinstance(owner, nn.Linear) and _TABLE_IN_LINEAR.search(name):
            role = "table"
        decays = role not in ("norm", "bias") and not _NO_DECAY_NAME.search(name.lower())
        in_layer = isinstance(owner, _LAYERS) or _is_conv1d(owner)
        one = Parameter(name, p, role, axis_order, decays, in_layer, owner, leaf, of_adapter=id(p) in adapters)
        found.append(replace(one, of_rank=True) if _takes_rank(one, adapted) else one)
    return found


def summands(shape: Sequence[int], axis_order: str) -> int:
    """See :attr:`Parameter.summands`; of a tensor with at least two axes."""
    *rest, n_in, _ = _matrix_as_reference(shape, axis_order)
    return n_in * (prod(rest) if without_view(axis_order) in ("torch", "torch_transposed") else 1)  # else of a stack


def _matrix_as_reference(shape: Sequence[int], axis_order: str) -> tuple[int, ...]:
    return reference_shape(matrix_shape(shape, axis_order), without_view(axis_order))


def long_axes(p: Tensor) -> int:
    """How many axes of a tensor are longer than 1."""
    return sum(n > 1 for n in p.shape)


def tables(model: nn.Module, method: str) -> set[int]:
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
            if found is None or (isinstance(module, TABLES) and not isinstance(found[0], TABLES)):
                owners[id(p)] = owner
    return owners


def _role_and_order(owner: nn.Module, leaf: str, p: Tensor, is_outer: bool) -> tuple[str, str]:
    for class_name, attribute, role, axis_order in _KNOWN:
        if re.fullmatch(class_name, type(owner).__name__) and re.fullmatch(attribute, leaf):
            return role, axis_order.format_map(vars(owner))
    role = _role(owner, leaf, p, is_outer)
    return role, _axis_order(owner, leaf, p, role)


def _role(owner: nn.Module, leaf: str, p: Tensor, is_outer: bool) -> str:
    if isinstance(owner, NORMS) or (_NORM_CLASS.search(type(owner).__name__) and not isinstance(owner, _LAYERS)):
        return "norm"
    if _BIAS_NAME.search(leaf):
        return "bias"
    if is_outer or isinstance(owner, TABLES):
        return "embedding"
    if isinstance(owner, _LAYERS) or _is_conv1d(owner):
        if long_axes(p) < 2:
            return "vector"
        depthwise = isinstance(owner, _ConvNd) and 1 < owner.groups == owner.in_channels
        return "depthwise" if depthwise else "matrix"
    return _bare_role(owner, leaf, p)


def _bare_role(owner: nn.Module, leaf: str, p: Tensor) -> str:
    """The role of a parameter that is not the weight of one of torch's layers."""
    if isinstance(owner, _OTHER_LAYERS):
        found = "matrix"
    elif _is_called_table(owner, leaf):
        return "table"
    elif _SCALE_NAME.search(leaf):
        found = "table"
    else:
        found = "matrix" if _is_called_matrix(owner, leaf) else "table"
    return found if long_axes(p) >= 2 else "vector"


def _is_called_table(owner: nn.Module, leaf: str) -> bool:
    if _TABLE_CLASS.search(type(owner).__name__):
        return True
    return bool(_TABLE_NAME.search(leaf)) and not re.search(r"_(proj(ection)?|kernel)$", leaf)


def _is_called_matrix(owner: nn.Module, leaf: str) -> bool:
    classes = [cls.__name__ for cls in type(owner).__mro__]
    if any(_MATRIX_CLASS.search(name) for name in classes) or _MATRIX_NAME.search(leaf.lower()):
        return True
    return any("attention" in name.lower() for name in classes) and bool(_ATTENTION_NAME.fullmatch(leaf.lower()))


def _is_conv1d(owner: nn.Module) -> bool:
    """Whether ``owner`` is the Conv1D of transformers: a linear layer whose weight is (in, out)."""
    return any(cls.__name__ == "Conv1D" for cls in type(owner).__mro__)


def _axis_order(owner: nn.Module, leaf: str, p: Tensor, role: str) -> str:
    if p.dim() < 2:
        return "torch"  # of no effect, and the same for all vectors
    if isinstance(owner, _ConvTransposeNd):
        return "torch_transposed"
    if isinstance(owner, (nn.Linear, _ConvNd)):
        return "torch"
    if isinstance(owner, TABLES) or role == "table" or _is_conv1d(owner):
        return "jax"
    if role in ("bias", "embedding"):
        return "jax" if not isinstance(owner, _OTHER_LAYERS) else "torch"
    if p.dim() == 2:
        return "torch"  # routers, torch.nn's recurrent and attention weights
    name = type(owner).__name__
    if _EXPERTS_CLASS.search(name):
        transposed = getattr(owner, "is_transposed", name in _TRANSPOSED_EXPERTS)
        return "jax" if transposed else "torch_stacked"
    if p.dim() == 3 and "attention" in name.lower() and _heads(owner) == p.shape[1]:
        # (d_model, heads, d_head), of einsum("ibh,hnd->ibnd"), and of the output einsum("ibnd,hnd->ibh").
        return "torch_merged" if re.search(r"(^|_)o(ut)?(_|$)", leaf.lower()) else "jax_merged"
    return "jax"


def _heads(owner: nn.Module) -> int | None:
    """How many heads an attention module has, if it says so."""
    places = (owner, getattr(owner, "config", None))
    return next((getattr(x, key) for x in places for key in _HEAD_COUNTS if hasattr(x, key)), None)


def _adapters_in(model: nn.Module) -> set[int]:
    """ids of the tensors that layers of PEFT add, without those of the layers inside."""
    found: set[int] = set()
    for module in model.modules():
        if any(cls.__name__ == "BaseTunerLayer" for cls in type(module).__mro__):
            inside = getattr(module, "base_layer", None)
            own = {id(p) for p in module.parameters()}
            found |= own - ({id(p) for p in inside.parameters()} if isinstance(inside, nn.Module) else set())
    return found


def _layers_of_adapters(model: nn.Module) -> dict[str, int]:
    """Prefix of the names in each layer that an adapter wraps -> the width of the layer's input."""
    found = {}
    for name, module in model.named_modules():
        base = getattr(module, "base_layer", None)
        if not isinstance(base, nn.Module):
            continue
        for weight in (p for key, p in base.named_parameters() if key.endswith("weight") and p.dim() >= 2):
            width = getattr(module, "in_features", None) or max(weight.shape)
            found[f"{name}."] = int(width)
            break
    return found


def _takes_rank(p: Parameter, layers: dict[str, int]) -> bool:
    """Whether the input of a matrix inside of an adapter's layer is the adapter's rank and not that of the layer."""
    layer = max((prefix for prefix in layers if p.name.startswith(prefix)), key=len, default=None)
    if layer is None or p.role != "matrix":
        return False
    path = p.name.removeprefix(layer)
    if path.startswith(("base_layer.", "modules_to_save.")):
        return False
    # Where the rank is as large as the layer, the name has to tell: (out, r) is B in LoRA and its relatives.
    return p.fan_in != layers[layer] or bool(re.search(r"(^|[._])[Bb]([._]|$)", path))
