"""Which group each parameter of a model is in, by name: branch, axis order, weight decay and width multiplier."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import nn

from hf_lopt import LearnedOptimizer
from hf_lopt.param_groups import describe, param_groups
from hf_lopt.step.accumulators import reference_axes


def tiny(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    ids = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    llama = ids | {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama |= {"num_key_value_heads": 2, "tie_word_embeddings": False}
    bert = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model, config, settings = {
        "gpt2": ("GPT2LMHeadModel", "GPT2Config", ids | {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8}),
        "llama": ("LlamaForCausalLM", "LlamaConfig", llama),
        "bert": ("BertForSequenceClassification", "BertConfig", bert | {"vocab_size": 32}),
        "bert_mlm": ("BertForMaskedLM", "BertConfig", bert | {"vocab_size": 32}),
        "vit": ("ViTForImageClassification", "ViTConfig", bert | {"image_size": 8, "patch_size": 4}),
        "t5": (
            "T5ForConditionalGeneration",
            "T5Config",
            {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2},
        ),
        "mixtral": ("MixtralForCausalLM", "MixtralConfig", llama | {"num_local_experts": 4}),
        "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", llama | {"num_local_experts": 4, "head_dim": 8}),
        "llama4": (
            "Llama4ForCausalLM",
            "Llama4TextConfig",
            llama | {"intermediate_size_mlp": 24, "num_local_experts": 4, "head_dim": 8},
        ),
    }[kind]
    return getattr(transformers, model)(getattr(transformers, config)(**settings))


# Pattern of the name -> branch of celo2, axis order, whether weight decay applies. Exactly one pattern matches.
VECTOR = ("adam", "torch", False)
MATRIX = ("network", "torch", True)
TABLE = ("adam", "jax", True)
HEAD = ("adam", "torch", True)
EXPECTED = {
    "gpt2": {
        r"transformer\.w[tp]e\.weight": TABLE,  # wte is the head, too
        r".*\.(c_attn|c_proj|c_fc)\.weight": ("network", "jax", True),  # Conv1D
        r".*\.(c_attn|c_proj|c_fc)\.bias": VECTOR,
        r".*ln_[12f]\.(weight|bias)": VECTOR,
    },
    "llama": {
        r"model\.embed_tokens\.weight": TABLE,
        r".*_proj\.weight": MATRIX,
        r".*norm\.weight": VECTOR,
        r"lm_head\.weight": HEAD,
    },
    "bert": {
        r".*_embeddings\.weight": TABLE,
        r".*LayerNorm\.(weight|bias)": VECTOR,
        r".*(query|key|value|dense)\.weight": MATRIX,
        r"classifier\.weight": MATRIX,
        r".*(query|key|value|dense|classifier)\.bias": VECTOR,
    },
    "bert_mlm": {
        r".*_embeddings\.weight": TABLE,
        r".*LayerNorm\.(weight|bias)": VECTOR,
        r".*(query|key|value|dense)\.weight": MATRIX,
        r".*(query|key|value|dense|predictions)\.bias": VECTOR,
    },
    "vit": {
        r".*(cls_token|position_embeddings)": TABLE,
        r".*patch_embeddings\.projection\.weight": HEAD,  # what get_input_embeddings returns: a convolution
        r".*(_proj|fc[12]|classifier|dense|query|key|value)\.weight": MATRIX,
        r".*layernorm\w*\.(weight|bias)": VECTOR,
        r"(?!.*layernorm).*\.bias": VECTOR,
    },
    "t5": {
        r"shared\.weight": TABLE,
        r".*relative_attention_bias\.weight": ("adam", "jax", False),  # Trainer goes by the name
        r".*\.(q|k|v|o|wi|wo)\.weight": MATRIX,
        r".*layer_norm\.weight": VECTOR,
    },
    "mixtral": {
        r"model\.embed_tokens\.weight": TABLE,
        r".*self_attn\.\w_proj\.weight": MATRIX,
        r".*mlp\.gate\.weight": MATRIX,
        r".*experts\.(gate_up|down)_proj": ("network", "torch_stacked", True),  # (E, out, in)
        r".*norm\.weight": VECTOR,
        r"lm_head\.weight": HEAD,
    },
    "gpt_oss": {
        r"model\.embed_tokens\.weight": TABLE,
        r".*self_attn\.sinks": ("adam", "torch", True),
        r".*self_attn\.\w_proj\.weight": MATRIX,
        r".*self_attn\.\w_proj\.bias": VECTOR,
        r".*router\.weight": MATRIX,
        r".*router\.bias": VECTOR,
        r".*experts\.(gate_up|down)_proj": ("network", "jax", True),  # (E, in, out)
        r".*experts\.(gate_up|down)_proj_bias": ("adam", "jax", False),  # (E, out)
        r".*norm\.weight": VECTOR,
        r"lm_head\.weight": HEAD,
    },
    "llama4": {
        r"model\.embed_tokens\.weight": TABLE,
        r".*self_attn\.\w_proj\.weight": MATRIX,
        r".*experts\.(gate_up|down)_proj": ("network", "jax", True),
        r".*shared_expert\.\w+_proj\.weight": MATRIX,
        r".*router\.weight": MATRIX,
        r".*norm\.weight": VECTOR,
        r"lm_head\.weight": HEAD,
    },
}


def by_name(model: nn.Module, rule: str = "celo2", **settings) -> dict[str, dict]:
    """Name -> its group, after a check that every trainable parameter is in exactly one."""
    groups = param_groups(model, rule, **settings)
    listed = [id(p) for group in groups for p in group["params"]]
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    assert len(listed) == len(set(listed)) and set(listed) == set(names)
    assert all(group["params"] for group in groups)
    return {names[id(p)]: group for group in groups for p in group["params"]}


@pytest.mark.parametrize("kind", EXPECTED)
def test_every_parameter_of_a_model(kind):
    rows = dict(EXPECTED[kind])
    used = set()
    for name, group in by_name(tiny(kind), weight_decay=0.1).items():
        matching = [row for row in rows if re.fullmatch(row, name)]
        assert len(matching) == 1, (name, matching)
        used.update(matching)
        branch, axis_order, decays = rows[matching[0]]
        got = (group["branch"], group["axis_order"], group["weight_decay"])
        assert got == (branch, axis_order, 0.1 if decays else 0.0), name
    assert used == rows.keys()


@pytest.mark.parametrize("kind", EXPECTED)
def test_weight_decay_is_split_as_in_trainer(kind):
    from transformers import Trainer

    model = tiny(kind)
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    assert {p.name for p in describe(model) if p.decays} == {n for n, _ in model.named_parameters() if n in decayed}


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.deep = nn.Conv1d(8, 8, 3)
        self.depthwise = nn.Conv1d(8, 8, 3, groups=8)
        self.group_norm = nn.GroupNorm(2, 8)
        self.rms = nn.RMSNorm(8)
        self.decode = nn.ConvTranspose2d(8, 8, 3)
        self.weight_normed = torch.nn.utils.parametrizations.weight_norm(nn.ConvTranspose1d(8, 4, 3))
        self.recurrent = nn.LSTM(4, 4)
        self.attention = nn.MultiheadAttention(8, 2)
        self.layer_scale = nn.Parameter(torch.ones(1, 8, 1, 1))
        self.pos_embed = nn.Parameter(torch.ones(1, 5, 8))
        self.heads = nn.Parameter(torch.ones(2, 4, 8))
        self.register_parameter("nothing", None)
        self.out = nn.Linear(8, 10)


def test_layers_of_torch():
    groups = by_name(Convolutions(), weight_decay=0.1)
    got = {name: (group["branch"], group["axis_order"], group["weight_decay"]) for name, group in groups.items()}
    matrices = {
        **dict.fromkeys(("encode.weight", "deep.weight", "out.weight"), "torch"),
        **dict.fromkeys(("recurrent.weight_ih_l0", "recurrent.weight_hh_l0", "attention.in_proj_weight"), "torch"),
        **dict.fromkeys(("attention.out_proj.weight",), "torch"),
        "decode.weight": "torch_transposed",
        "weight_normed.parametrizations.weight.original1": "torch_transposed",
        "heads": "jax",
    }
    for name, axis_order in matrices.items():
        assert got.pop(name) == ("network", axis_order, 0.1), name
    assert got.pop("depthwise.weight") == ("adam", "torch", 0.1)
    assert got.pop("layer_scale") == ("adam", "jax", 0.1)
    assert got.pop("pos_embed") == ("adam", "jax", 0.1)
    # (8, 1, 1): a norm for each input channel.
    assert got.pop("weight_normed.parametrizations.weight.original0") == ("adam", "torch_transposed", 0.1)
    # Also the batch norm, whose name does not tell.
    assert {(branch, decay) for branch, _, decay in got.values()} == {("adam", 0.0)}


def test_bag_and_subclasses_of_embeddings():
    class Positions(nn.Embedding):
        pass

    model = nn.ModuleDict({"bag": nn.EmbeddingBag(5, 4), "positions": Positions(5, 4), "linear": nn.Linear(4, 4)})
    groups = by_name(model)
    assert groups["bag.weight"] is groups["positions.weight"]
    assert (groups["bag.weight"]["branch"], groups["bag.weight"]["axis_order"]) == ("adam", "jax")


def test_tied_head_is_a_table_whichever_comes_first():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, 6, bias=False)
            self.table = nn.Embedding(6, 6)
            self.table.weight = self.head.weight

    (group,) = param_groups(Tied())
    assert (len(group["params"]), group["branch"], group["axis_order"]) == (1, "adam", "jax")


def test_models_inside_of_other_modules():
    """DDP, sentence-transformers and PEFT wrap the model that knows its embeddings."""
    model = nn.ModuleDict({"module": tiny("llama"), "extra": nn.Linear(4, 4)})
    groups = by_name(model)
    assert groups["module.lm_head.weight"]["branch"] == "adam"
    assert groups["extra.weight"]["branch"] == "network"


def test_frozen_parameters_and_adapters_are_sorted_by_their_own_layer():
    peft = pytest.importorskip("peft")
    targets = ["wte", "c_attn"]
    config = peft.LoraConfig(r=2, target_modules=targets, fan_in_fan_out=True, modules_to_save=["lm_head"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tied head
        model = peft.get_peft_model(tiny("gpt2"), config)
    groups = by_name(model)
    for name, group in groups.items():
        lora_of_layer = ".c_attn.lora_" in name
        assert group["branch"] == ("network" if lora_of_layer else "adam"), name
        assert group["axis_order"] == ("jax" if "lora_embedding" in name else "torch"), name
    assert any("lora_embedding_A" in name for name in groups) and any("modules_to_save" in name for name in groups)


def test_order_is_that_of_the_model_with_decaying_groups_first():
    model = tiny("llama")
    names = [name for name, _ in model.named_parameters()]
    for weight_decay in (0.0, 0.1):
        groups = param_groups(model, weight_decay=weight_decay)
        where = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
        placed = {name: where[id(p)] for name, p in model.named_parameters()}
        # embed_tokens, then the matrices, then the head, then all norms: whatever the number is.
        assert [placed[name] for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight")] == [
            *(0, 2, 3)
        ]
        for group in groups:
            own = [names.index(name) for p in group["params"] for name, q in model.named_parameters() if p is q]
            assert own == sorted(own)


@pytest.mark.parametrize(
    ("rule", "keys"),
    [
        ("velo", {"params", "weight_decay", "axis_order"}),
        ("celo_adam", {"params", "weight_decay", "axis_order"}),
        ("celo2", {"params", "weight_decay", "axis_order", "branch"}),
        ("elo_celo2", {"params", "weight_decay", "axis_order", "branch"}),
        ("celo2_base", {"params", "weight_decay", "axis_order"}),  # everything through the network
        ("small_fc_lopt", {"params", "weight_decay", "axis_order"}),
    ],
)
def test_groups_have_the_keys_of_the_rule(rule, keys):
    for group in param_groups(tiny("llama"), rule):
        assert group.keys() == keys


def test_weight_decay_of_the_rule_unless_given():
    assert {g["weight_decay"] for g in param_groups(tiny("llama"), "elo_celo2")} == {0.0, 0.1}
    assert {g["weight_decay"] for g in param_groups(tiny("llama"), "elo_celo2", weight_decay=0.0)} == {0.0}


def test_settings_for_all_groups_replace_derived_ones():
    groups = param_groups(tiny("gpt2"), branch="network", lr=0.01, axis_order="jax", weight_decay=0.1)
    assert {(g["branch"], g["lr"], g["axis_order"]) for g in groups} == {("network", 0.01, "jax")}
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]


# --- widths


def test_base_width_scales_what_is_between_the_first_and_the_last_layer():
    model = nn.Sequential(nn.Linear(28, 64), nn.ReLU(), nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 10))
    got = {name: group["step_scale"] for name, group in by_name(model, "mulo", base_width=16).items()}
    assert {name: s for name, s in got.items() if s != 1.0} == {"2.weight": 16 / 64, "3.weight": 16 / 32}


@pytest.mark.parametrize(
    ("kind", "scaled"),
    [
        ("gpt2", {r".*(c_attn|attn\.c_proj|c_fc)\.weight": 8 / 16, r".*mlp\.c_proj\.weight": 8 / 64}),
        ("llama", {r".*([qkvo]|gate|up)_proj\.weight": 8 / 16, r".*down_proj\.weight": 8 / 24}),
        (
            "bert",
            {r"(?!.*\d\.output).*(query|key|value|dense)\.weight": 8 / 16, r".*\d\.output\.dense\.weight": 8 / 24},
        ),
        ("mixtral", {r".*(self_attn\.\w_proj|gate)\.weight|.*gate_up_proj": 8 / 16, r".*experts.down_proj": 8 / 24}),
        ("gpt_oss", {r".*(self_attn\.\w_proj|router)\.weight|.*gate_up_proj": 8 / 16, r".*experts.down_proj": 8 / 24}),
    ],
)
def test_base_width_in_transformers(kind, scaled):
    groups = by_name(tiny(kind), "mulo", base_width=8)
    for name, group in groups.items():
        want = next((scale for pattern, scale in scaled.items() if re.fullmatch(pattern, name)), 1.0)
        assert group["step_scale"] == want, name
    assert {group["step_scale"] for group in groups.values()} == {1.0, *scaled.values()}


def test_a_body_without_a_head_has_no_last_layer():
    got = by_name(tiny("gpt2").transformer, "mulo", base_width=8)
    assert got["h.0.mlp.c_proj.weight"]["step_scale"] == 8 / 64


def test_widths_of_convolutions_are_channels():
    got = {name: group["step_scale"] for name, group in by_name(Convolutions(), "mulo", base_width=4).items()}
    assert got["encode.weight"] == 1.0  # the first layer
    assert got["deep.weight"] == got["decode.weight"] == 4 / 8
    assert got["depthwise.weight"] == 1.0  # one channel, however wide the model is
    assert got["out.weight"] == 1.0


class InfShape:
    """What the mup package attaches to a parameter."""

    def __init__(self, ninf, width_mult):
        self.infinite, self.mult = ninf, width_mult

    def ninf(self):
        return self.infinite

    def width_mult(self):
        return self.mult


def test_infshape_of_mup_decides():
    model = nn.Sequential(nn.Linear(28, 64), nn.Linear(64, 64), nn.Linear(64, 10))
    for name, p in model.named_parameters():
        p.infshape = InfShape(2 if name == "1.weight" else 1, 4.0)
    got = {name: group["step_scale"] for name, group in by_name(model, "mulo").items()}
    assert {name: s for name, s in got.items() if s != 1.0} == {"1.weight": 0.25}
    with pytest.warns(UserWarning, match="base_width=16"):
        assert by_name(model, "mulo", base_width=16)["1.weight"]["step_scale"] == 0.25


def test_mulo_without_widths_says_so():
    with pytest.warns(UserWarning, match="base_width"):
        groups = param_groups(tiny("llama"), "mulo")
    assert all("step_scale" not in group for group in groups)


# --- errors


class FrozenLinear(nn.Linear):
    def __init__(self):
        super().__init__(2, 2)
        self.requires_grad_(False)


@pytest.mark.parametrize(
    ("model", "rule", "settings", "message"),
    [
        (nn.ReLU(), "celo2", {}, "ReLU.*no parameters"),
        (FrozenLinear(), "celo2", {}, "requires_grad=False"),
        (nn.Linear(2, 2), "nothing", {}, "'nothing'"),
        (nn.Linear(2, 2), "velo", {"base_width": 4}, "velo.*width"),
        (nn.Linear(2, 2), "mulo", {"base_width": 0}, "base_width.*0"),
        (nn.Linear(2, 2), "mulo", {"base_width": float("nan")}, "base_width.*nan"),
        (nn.Linear(2, 2), "mulo", {"base_width": "4"}, "base_width.*'4'"),
        (nn.Linear(2, 2), "velo", {"branch": "adam"}, "velo.*branch.*lr, axis_order"),
        (nn.Linear(2, 2), "celo2", {"orthogonalize": False}, r"orthogonalize.*Celo2\("),
    ],
)
def test_mistakes(model, rule, settings, message):
    with pytest.raises(ValueError, match=message):
        param_groups(model, rule, **settings)


# --- what the groups do to a step


def one_step(rule, arrays, groups, theta):
    params = [nn.Parameter(a.clone()) for a in arrays]
    optimizer = LearnedOptimizer(
        [{"params": [p], **group} for p, group in zip(params, groups, strict=True)], rule, weights=theta
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for p, group in zip(params, groups, strict=True):
            # Gradients are drawn in the reference's layout.
            axes = reference_axes(p.dim(), group["axis_order"])
            g = torch.randn([p.shape[a] for a in axes], generator=generator)
            p.grad = g.permute([axes.index(i) for i in range(p.dim())]).contiguous()
        optimizer.step()
    return params


@pytest.mark.parametrize("rule", ["small_fc_lopt", "celo2"])
@pytest.mark.parametrize(
    ("axis_order", "shape"),
    [
        ("torch_stacked", (3, 6, 6)),
        ("torch_stacked", (2, 3, 6, 6)),
        ("torch_transposed", (6, 6, 3, 3)),
        ("torch_transposed", (6, 4, 3)),
        ("torch_transposed", (6, 6)),
    ],
)
def test_a_permuted_copy_takes_the_permuted_step(rule, axis_order, shape):
    import golden

    theta = golden.theta({"celo2": "celo2.npz", "small_fc_lopt": "small_fc_lopt.npz"}[rule])
    axes = reference_axes(len(shape), axis_order)
    p = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    (ours,) = one_step(rule, [p], [{"axis_order": axis_order}], theta)
    (reference,) = one_step(rule, [p.permute(axes).contiguous()], [{"axis_order": "jax"}], theta)
    assert (reference - p.permute(axes)).abs().max() > 1e-4
    torch.testing.assert_close(ours.permute(axes), reference, rtol=1e-5, atol=2e-6)
    # As a plain convolution the same tensor takes another step.
    (other,) = one_step(rule, [p.permute(axes).contiguous()], [{"axis_order": "torch"}], theta)
    assert (other - reference).abs().max() > 1e-5


def test_groups_go_into_the_optimizer():
    import golden

    model = tiny("mixtral")
    groups = param_groups(model, "celo2", weight_decay=0.01)
    optimizer = LearnedOptimizer(groups, "celo2", weights=golden.theta("celo2.npz"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.randint(0, 32, (2, 6), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    for name, p in model.named_parameters():
        if p.grad is not None and p.grad.any():
            assert not torch.equal(p, before[name]) and torch.isfinite(p).all(), name
