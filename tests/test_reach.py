"""How far a step can reach in a model, and what that makes of the step size of short runs."""

from __future__ import annotations

import itertools
import logging
import math
import warnings

import pytest
import torch
import transformers
from torch import nn
from transformers import Trainer

import architectures
import golden
import hf_cases as cases
import hf_lopt
from hf_lopt import rules
from hf_lopt.reach import reach_of
from hf_lopt.rules.base import FROM_SCRATCH
from hf_lopt.tensor_sizes import Size


REACH = 20.0  # of the documentation: from here on steps become shorter
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def llama(sd: float = 0.02) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=257, num_key_value_heads=1, initializer_range=sd, **SIZES)
    return transformers.LlamaForCausalLM(config)


def t5() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(vocab_size=97, decoder_start_token_id=0, **sizes)
    return transformers.T5ForConditionalGeneration(config)


def moved_outputs(model: nn.Module) -> float:
    """What linear layers do to an input of ones whose signs suit them, where all elements have the layer's size."""
    squares = []
    for layer in (m for m in model.modules() if isinstance(m, nn.Linear)):
        size = layer.weight.detach().square().mean().sqrt().item()
        uniform = torch.full_like(layer.weight, size)
        squares.append((uniform @ torch.ones(layer.in_features))[0].item() ** 2)
    return math.sqrt(sum(squares))


def own(model: nn.Module) -> list[tuple[torch.Tensor, dict]]:
    return [(p, {}) for p in model.parameters() if p.requires_grad]


def test_of_a_transformer_it_is_that_of_its_linear_layers():
    model = llama()
    inner = moved_outputs(model.model)  # without the output embeddings
    assert reach_of(own(model)) == pytest.approx(inner, rel=1e-6)


def test_convolutions_count_their_kernel_and_depthwise_ones_nothing_else():
    def check(layer: nn.Module, n_in: int) -> None:
        size = layer.weight.detach().double().square().mean().sqrt().item()
        assert reach_of(own(nn.Sequential(layer))) == pytest.approx(size * n_in, rel=1e-6)

    check(nn.Conv2d(6, 8, 3), 6 * 9)
    check(nn.Conv1d(6, 8, 5), 6 * 5)
    check(nn.ConvTranspose2d(6, 8, 3), 6 * 9)
    check(nn.Conv2d(6, 6, 7, groups=6), 49)
    check(transformers.pytorch_utils.Conv1D(8, 6), 6)  # (out, in) of the constructor; its weight is (in, out)


def test_what_belongs_to_no_module_counts_by_its_shape():
    draw = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(8, 6, generator=draw))
    size = p.detach().square().mean().sqrt().item()
    for order, count in (("torch", 6), ("jax", 8)):
        assert reach_of([(p, {"axis_order": order})]) == pytest.approx(size * count, rel=1e-6)
    stack = nn.Parameter(p.detach().view(2, 4, 6))
    assert reach_of([(stack, {"axis_order": "jax"})]) == pytest.approx(size * 4, rel=1e-6)
    assert reach_of([(nn.Parameter(torch.ones(7)), {}), (nn.Parameter(torch.ones(1, 7)), {})]) == 0.0


def test_tables_norms_biases_and_adapters_do_not_count():
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Embedding(9, 7), nn.LayerNorm(7))
    assert reach_of(own(model)) == 0.0
    adapted = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"], r=2))
    assert len(own(adapted)) == 4 and reach_of(own(adapted)) == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_without_finite_values_steps_are_not_made_longer(value):
    assert reach_of([(nn.Parameter(torch.full((3, 4), value)), {})]) == math.inf
    on_meta = nn.Parameter(torch.empty(3, 4, device="meta"))
    assert reach_of([(on_meta, {})]) == math.inf
    assert rules.get("velo").run_lengths[FROM_SCRATCH].multiplier(30, math.inf) == 1.0


def by_hand(steps: int, reach: float, published_celo: bool = False) -> float:
    of_length = math.sqrt((300 if published_celo else 1000) / steps)
    found = max(of_length, 1.0) * min(1.0, REACH / reach) ** 1.5
    return min(max(found, 0.7 if published_celo else 1.0), 5.0)


@pytest.mark.parametrize("rule", ["velo", "celo", "velo_s"])
@pytest.mark.parametrize("steps", [10, 50, 300])
@pytest.mark.parametrize("sd", [0.02, 0.3, 0.6, 1.0])
def test_the_multiplier_of_a_short_run(rule, steps, sd):
    model = llama(sd)
    reach = moved_outputs(model.model)
    optimizer = hf_lopt.LearnedOptimizer(model.parameters(), rule, num_training_steps=steps, weights="bundled")
    expected = pytest.approx(by_hand(steps, reach), rel=1e-6)
    assert optimizer.length_multiplier == expected  # before it is decided, too
    ids = torch.arange(1, 13).view(2, 6)
    for _ in range(2):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss)
        assert optimizer.length_multiplier == expected  # the first step has changed the sizes
    optimizer.num_training_steps = 2 * steps
    assert optimizer.length_multiplier == pytest.approx(by_hand(2 * steps, reach), rel=1e-6)


def test_published_weights():
    file = golden.OUTSIDE / "weights" / "celo.theta.state"
    if not file.is_file():
        pytest.skip("the published weights of Celo are not part of the repository")
    found = {}
    for sd, steps in itertools.product((0.02, 0.35, 0.9), (30, 300, 5000)):
        model = llama(sd)
        optimizer = hf_lopt.Celo(model.parameters(), num_training_steps=steps, weights=str(file))
        wanted = by_hand(steps, moved_outputs(model.model), published_celo=True)
        found[sd, steps] = optimizer.length_multiplier
        assert found[sd, steps] == pytest.approx(wanted, rel=1e-6)
    assert found[0.02, 5000] == 1.0 and 0.7 < found[0.35, 5000] < 1.0 and found[0.9, 5000] == 0.7


def test_trainer(tmp_path, caplog):
    """Of two models with the same shapes, one starts at 1 / sqrt(width), as T5 does: it gets the shorter steps."""
    found = {}
    for name, sd in (("small", 0.02), ("large", 1.0)):
        model = llama(sd)
        args = cases.arguments(tmp_path / name, max_steps=6, optim="velo", optim_args="weights=bundled")
        trainer = Trainer(model, args, train_dataset=cases.byte_rows(8))
        reach = moved_outputs(model.model)
        with caplog.at_level(logging.INFO, "hf_lopt"):
            trainer.train()
        found[name] = trainer.optimizer.optimizer.length_multiplier
        assert found[name] == pytest.approx(by_hand(6, reach), rel=1e-6)
    assert found["small"] == 5.0 > found["large"] > 1.0


def test_a_t5_trains_as_with_an_lr_of_one():
    """Its tensors start at full size: with 5 times the step it forgets what it reads (benchmarks/run_length.py)."""
    model = t5()
    assert reach_of(own(model)) > 2 * REACH
    optimizer = hf_lopt.VeLO(model.parameters(), num_training_steps=50, weights="bundled")
    assert 1.0 <= optimizer.length_multiplier < 1.5


@pytest.mark.parametrize("kind", architectures.ARCHITECTURES)
def test_every_architecture_has_one(kind, monkeypatch):
    """On meta, with elements of size 1: more than the widest layer of torch's alone, less than if every tensor were
    one matrix with its shortest axis as output."""
    cls = getattr(transformers, architectures.ARCHITECTURES[kind], None)
    if cls is None:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    monkeypatch.setattr("hf_lopt.reach.sizes_of", lambda params: [Size(1.0, False)] * len(params))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = architectures.build(kind, cls)
    widest = max(
        (m.in_features for m in model.modules() if isinstance(m, nn.Linear) and m.out_features > 1), default=1
    )
    shapes = [[n for n in p.shape if n > 1] for p in model.parameters()]
    most = math.sqrt(sum((math.prod(shape) / min(shape)) ** 2 for shape in shapes if len(shape) > 1))
    assert widest <= reach_of(own(model)) <= most
