"""The least size that a relative step assumes: by what a tensor is, decided once, through every door."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import transformers
from torch import nn

import golden
import hf_lopt
from hf_lopt import least_sizes


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
STEPS = 6


def gemma() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GemmaConfig(vocab_size=16, num_key_value_heads=1, head_dim=8, **SIZES)
    return transformers.GemmaForCausalLM(config)


class Zeros(nn.Module):
    """One tensor of each kind, and some that need nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.batch_norm, self.layer_norm = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.LayerNorm(4)
        self.last = nn.Linear(4, 4)
        self.position_embeddings = nn.Parameter(torch.zeros(1, 3, 4))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.relative_position_bias_table = nn.Parameter(torch.zeros(5, 2))
        self.layer_scale_parameter = nn.Parameter(1e-6 * torch.ones(4))
        self.gate = nn.Parameter(torch.zeros(1))
        self.small = nn.Parameter(0.02 * torch.ones(3, 4))
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        nn.init.zeros_(self.batch_norm.weight)


WANTED = {
    "batch_norm.weight": least_sizes.NORM.floor,
    "last.weight": least_sizes.PROJECTION.floor,
    "position_embeddings": least_sizes.TABLE.floor,
    "cls_token": least_sizes.TABLE.floor,
    "relative_position_bias_table": least_sizes.TABLE.floor,
    "layer_scale_parameter": least_sizes.SCALE.floor,
    "gate": least_sizes.GATE.floor,
}


def step(optimizer: hf_lopt.LearnedOptimizer, seed: int = 0) -> None:
    draw = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=draw).to(p.dtype)
    optimizer.step(1.0)


def floors(optimizer: hf_lopt.LearnedOptimizer, model: nn.Module) -> dict[str, float]:
    """Those above zero."""
    found = {name: float(optimizer.state[p]["min_param_scale"]) for name, p in model.named_parameters()}
    return {name: pytest.approx(floor) for name, floor in found.items() if floor}


def made(params, rule: str = "velo", **settings) -> hf_lopt.LearnedOptimizer:
    settings = {"lr": 1.0, "weights": "bundled", "num_training_steps": STEPS} | settings
    return hf_lopt.LearnedOptimizer(params, rule, **settings)


@pytest.mark.parametrize("rule", ["velo", "velo_s", "celo"])
@pytest.mark.parametrize("door", ["plain", "named", "groups"])
def test_kinds_by_the_module(rule, door, caplog):
    model = Zeros()
    doors = {
        "plain": lambda: model.parameters(),
        "named": lambda: model.named_parameters(),
        "groups": lambda: hf_lopt.param_groups(model, rule),
    }
    optimizer = made(doors[door](), rule)
    caplog.set_level("INFO", "hf_lopt")
    with pytest.warns(UserWarning, match="min_param_scale: ") as caught:
        step(optimizer)
        step(optimizer)
    assert floors(optimizer, model) == WANTED
    assert all(w.filename == __file__ for w in caught)
    (text,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("min_param_scale")]
    assert f"3 tables ({least_sizes.TABLE.floor:g})" in text and f"1 gates ({least_sizes.GATE.floor:g})" in text


def test_norms_stored_as_one_plus_w_move():
    model, reference = gemma(), gemma()
    optimizer, plain = made(model.parameters()), made(reference.parameters(), min_param_scale=0)
    with pytest.warns(UserWarning, match=r"min_param_scale: 3 norms stored as 1 \+ w \(1\)"):
        step(optimizer)
    step(plain)
    assert set(floors(optimizer, model)) == {name for name, _ in model.named_parameters() if "norm" in name}
    # A step is the size times what the network says, which is the same here and there: 3.2e-5 against 1.
    size = reference.model.norm.weight.norm() / model.model.norm.weight.norm()
    assert size.item() == pytest.approx(1e-9**0.5, rel=1e-3)
    assert torch.equal(model.model.embed_tokens.weight, reference.model.embed_tokens.weight)
    assert not any("min_param_scale" in state for state in plain.state.values())


def test_without_modules_names_decide_and_without_names_values(monkeypatch):
    monkeypatch.setattr(least_sizes, "models_of", lambda params: [])
    model = Zeros()
    optimizer = made(model.named_parameters())
    with pytest.warns(UserWarning, match="min_param_scale"):
        step(optimizer)
    assert floors(optimizer, model) == WANTED | {"batch_norm.weight": 1.0}  # no name tells how a norm is stored
    model = Zeros()
    optimizer = made(model.parameters())
    with pytest.warns(UserWarning, match="min_param_scale"):
        step(optimizer)
    found = floors(optimizer, model)
    assert found.keys() == WANTED.keys() - {"batch_norm.weight"}  # a vector of zeros may be a bias
    assert found["layer_scale_parameter"] == least_sizes.SCALE.floor


def test_a_model_without_such_tensors_is_left_alone():
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    nn.init.zeros_(model[0].bias)
    reference = copy.deepcopy(model)
    optimizer, plain = made(model.parameters()), made(reference.parameters(), min_param_scale=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(3):
            step(optimizer, seed)
            step(plain, seed)
    assert floors(optimizer, model) == {}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:hf_lopt: ")
def test_the_decision_survives_a_resume_into_tensors_that_have_grown(dtype):
    model = Zeros().to(dtype)
    optimizer = made(model.parameters())
    for seed in range(3):
        step(optimizer, seed)
    saved = copy.deepcopy(optimizer.state_dict())
    again = copy.deepcopy(model)
    with torch.no_grad():
        again.position_embeddings.add_(0)  # not zero any more
    resumed = made(again.parameters())
    resumed.load_state_dict(saved)
    for seed in range(3, STEPS):
        step(optimizer, seed)
        step(resumed, seed)
    assert floors(resumed, again) == floors(optimizer, model) == WANTED
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_checkpoint_that_has_a_number_goes_on_with_it():
    model = Zeros()
    old = made(model.parameters(), min_param_scale=0.0)
    step(old)
    again = copy.deepcopy(model)
    resumed = made(again.parameters())
    resumed.load_state_dict(copy.deepcopy(old.state_dict()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(resumed, 1)
    step(old, 1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:hf_lopt: ")
def test_a_damaged_floor_is_refused():
    optimizer = made([nn.Parameter(torch.zeros(3, 3))])
    step(optimizer)
    for damage in (torch.tensor(float("nan")), torch.tensor(-1.0), torch.ones(2), None):
        saved = copy.deepcopy(optimizer.state_dict())
        saved["state"][0]["min_param_scale"] = damage
        if damage is None:
            del saved["state"][0]["min_param_scale"]
        with pytest.raises(ValueError, match="min_param_scale"):
            optimizer.load_state_dict(saved)


@pytest.mark.filterwarnings("ignore:hf_lopt: ")
def test_a_number_is_taken_literally_also_between_steps():
    """A group that changes to a number and back: the tensor's own floor waits in its state."""
    p, q = (nn.Parameter(torch.zeros(3, 3)) for _ in range(2))
    first = made([p])
    second = made([q], min_param_scale=0.3)
    for i, number in enumerate((0.3, None, 0.3)):
        first.param_groups[0]["min_param_scale"] = number
        second.param_groups[0]["min_param_scale"] = least_sizes.PROJECTION.floor if number is None else number
        step(first, i)
        step(second, i)
        assert torch.equal(p, q)


@pytest.mark.filterwarnings("ignore:hf_lopt: ")
@pytest.mark.parametrize("named", [False, True], ids=["by their layer", "by their names"])
@pytest.mark.parametrize("trained", [False, True], ids=["new", "trained before"])
def test_adapters(named, trained):
    """B, which starts at zero, has a least size, also where it is not zero any more; A has its own."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(gemma(), peft.LoraConfig(target_modules=["q_proj"], r=2))
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if trained:
        for p in adapters.values():
            nn.init.normal_(p, std=0.01)
    if named:  # alone, as a program might keep them
        adapters = {name: nn.Parameter(p.detach().clone()) for name, p in adapters.items()}
    optimizer = made(adapters.items() if named else adapters.values())
    step(optimizer)
    assert len(adapters) == 2
    for name, p in adapters.items():
        wanted = 0.05 if ".lora_B." in name else 0.0
        assert optimizer.state[p]["min_param_scale"].item() == pytest.approx(wanted), name


def test_published_weights_get_the_same():
    file = golden.OUTSIDE / "weights" / "celo.theta.state"
    if not file.is_file():
        pytest.skip("the published weights of Celo are not part of the repository")
    model = Zeros()
    optimizer = made(model.parameters(), "celo", weights=str(file))
    with pytest.warns(UserWarning, match="min_param_scale"):
        step(optimizer)
    assert floors(optimizer, model) == WANTED


@pytest.mark.parametrize("text", ["min_param_scale=auto", "min_param_scale=0", "min_param_scale=0.5"])
def test_optim_args(text):
    from hf_lopt import rules
    from hf_lopt.hf.arguments import read_optim_args

    given, _ = read_optim_args(rules.get("velo"), text)
    value = text.partition("=")[2]
    assert given == {"min_param_scale": None if value == "auto" else float(value)}
