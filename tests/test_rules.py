"""What every rule has to do beyond its numbers.

Weights are the synthetic ones of the reference files, so nothing here depends on what is embedded.
"""

from __future__ import annotations

import copy
import io
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import golden
import hf_lopt
from hf_lopt import LearnedOptimizer, rules
from hf_lopt.features import CELO2
from hf_lopt.optimizers import OPTIMIZERS
from hf_lopt.rules import celo2
from hf_lopt.step import orthogonal


FILES = {
    "velo": "velo_s",
    "celo": "celo_synth",
    "celo_adam": "celo_adam_synth",
    "mulo": "small_fc_lopt",
    "elo": "small_fc_lopt",
    "celo2_base": "celo2",
    "elo_celo2": "celo2",
}
SHAPES = [(), (7,), (5, 9), (3, 4, 5), (4, 3, 2, 2)]


def theta(name: str) -> dict[str, np.ndarray]:
    return golden.theta(FILES.get(name, name) + ".npz")


def make(name: str, params, **settings) -> LearnedOptimizer:
    own = {"num_training_steps": 20} if rules.get(name).needs_horizon else {}
    own |= {"bank_scale": 1.0} if name == "velo" else {}
    return LearnedOptimizer(params, name, **(own | {"weights": theta(name)} | settings))


def make_params(dtype: torch.dtype = torch.float32, shapes=SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter((torch.randn(shape, generator=generator) * 0.3).to(dtype)) for shape in shapes]


def gradients(params, t: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + t)
    return [torch.randn(p.shape, generator=generator).to(p.dtype) for p in params]


def train(optimizer, params, steps: range) -> None:
    for t in steps:
        for p, g in zip(params, gradients(params, t), strict=True):
            p.grad = g
        optimizer.step(3.0 / (t + 1) + 0.1 * (t % 3))


def equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


every_rule = pytest.mark.parametrize("name", rules.names())


def test_every_published_name_is_there():
    names = "celo celo2 celo2_base celo_adam elo elo_celo2 mulo rnn_mlp small_fc_lopt velo velo_s"
    assert list(hf_lopt.available()) == names.split() == list(rules.names())
    classes = ("SmallFC", "MuLO", "Celo", "CeloAdam", "Celo2", "RNNMLP", "ELO", "ELOCelo2", "VeLO")
    assert all(issubclass(getattr(hf_lopt, cls), LearnedOptimizer) for cls in classes)


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_from_a_file_is_bitwise(name, dtype):
    params = make_params(dtype)
    optimizer = make(name, params)
    train(optimizer, params, range(3))
    buffer = io.BytesIO()
    torch.save({"params": params, "optimizer": optimizer.state_dict()}, buffer)
    train(optimizer, params, range(3, 6))
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    resumed = [nn.Parameter(p) for p in saved["params"]]
    fresh = make(name, resumed)
    fresh.load_state_dict(saved["optimizer"])
    train(fresh, resumed, range(3, 6))
    assert equal(params, resumed)
    assert all(x.dtype == torch.float32 for state in fresh.state.values() for x in state.values())


@every_rule
def test_a_deep_copy_goes_its_own_way(name):
    params = make_params()
    optimizer = make(name, params)
    train(optimizer, params, range(2))
    twin_params, twin = copy.deepcopy((params, optimizer))
    train(twin, twin_params, range(2, 4))
    assert not equal(params, twin_params)
    train(optimizer, params, range(2, 4))
    assert equal(params, twin_params)


@every_rule
@pytest.mark.parametrize("bad", ["gradient", "loss"])
def test_a_non_finite_step_changes_nothing(name, bad):
    params = make_params()
    optimizer = make(name, params)
    if bad == "loss" and not optimizer.rule.needs_loss:
        pytest.skip("the rule does not look at the loss")
    train(optimizer, params, range(2))
    before = copy.deepcopy((params, dict(optimizer.state), optimizer.param_groups))
    for p, g in zip(params, gradients(params, 9), strict=True):
        p.grad = g
    if bad == "gradient":
        params[2].grad[0, 0] = math.inf
    with pytest.warns(RuntimeWarning, match="skipped a step"):
        optimizer.step(math.nan if bad == "loss" else 1.0)
    assert equal(params, before[0]) and optimizer.steps_done == 2
    assert optimizer.metrics()["update_rms"] == 0.0
    for p, q in zip(params, before[0], strict=True):
        assert all(torch.equal(value, before[1][q][key]) for key, value in optimizer.state[p].items())
    changed = {"nonfinite_steps", "nonfinite_in_a_row", "params"}
    for group, old in zip(optimizer.param_groups, before[2], strict=True):
        for key in group.keys() - changed:
            same = (
                torch.equal(group[key], old[key]) if isinstance(group[key], torch.Tensor) else group[key] == old[key]
            )
            assert same, key
    twin_params, twin = before[0], make(name, before[0])
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, params, range(2, 4))
    train(twin, twin_params, range(2, 4))
    assert equal(params, twin_params)


@pytest.mark.parametrize("name", [name for name in rules.names() if rules.get(name).nan_to_zero])
def test_nan_in_a_gradient_counts_as_zero_where_the_reference_has_it(name):
    params, clean = make_params(), make_params()
    optimizer, twin = make(name, params), make(name, clean)
    for p, q, g in zip(params, clean, gradients(params, 0), strict=True):
        p.grad, q.grad = g.clone(), g.clone()
    params[2].grad[1] = math.nan
    clean[2].grad[1] = 0.0
    optimizer.step()
    twin.step()
    assert equal(params, clean)


@every_rule
def test_lr_zero_changes_no_parameter(name):
    params = make_params()
    start = [p.detach().clone() for p in params]
    optimizer = make(name, params, lr=0.0)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()  # what checkpoint loading does: no loss, no gradient, no lr
    assert equal(start, params) and len(optimizer.state) == len(params)
    train(optimizer, params, range(2))
    assert equal(start, params)


@every_rule
def test_weight_decay(name):
    """Decoupled, scaled by lr: first steps differ by lr * weight_decay * p, 20 times that in Celo2's Adam branch."""
    lr = 0.5 if rules.get(name).own_schedule else 0.01
    params, decayed = make_params(), make_params()
    start = [p.detach().clone() for p in params]
    plain, optimizer = make(name, params, lr=lr, weight_decay=0.0), make(name, decayed, lr=lr, weight_decay=0.1)
    train(plain, params, range(1))
    train(optimizer, decayed, range(1))
    for p0, p, q in zip(start, params, decayed, strict=True):
        adam = name in ("celo2", "elo_celo2") and q.dim() < 2
        factor = lr * 0.1 * (20.0 if adam else 1.0)
        torch.testing.assert_close(p.detach() - q.detach(), factor * p0, rtol=2e-3, atol=2e-7)


@every_rule
def test_parameters_without_gradient_or_elements(name):
    params = make_params()
    extra = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.empty(0, 3)), nn.Parameter(torch.ones(2), False)]
    alone = make_params()
    optimizer, twin = make(name, [*params, *extra]), make(name, alone)
    extra[1].grad = torch.empty(0, 3)
    train(optimizer, params, range(3))
    train(twin, alone, range(3))
    assert equal(params, alone) and torch.equal(extra[0], torch.ones(3, 2))


@every_rule
def test_public_class_and_pickle(name):
    import pickle

    cls = OPTIMIZERS[name]
    optimizer = cls(make_params(), weights=theta(name))
    public = getattr(hf_lopt, rules.get(name).class_name)
    assert public.__name__ == rules.get(name).class_name
    assert cls is public or (name in ("velo_s", "celo2_base") and issubclass(cls, public))
    again = pickle.loads(pickle.dumps(optimizer))
    assert type(again) is cls and again.rule.name == name


def test_rank_limits():
    with pytest.raises(ValueError, match=r"\(1, 1, 1, 1, 2\)"):
        p = nn.Parameter(torch.ones(1, 1, 1, 1, 2))
        p.grad = torch.ones_like(p)
        make("rnn_mlp", [p]).step(1.0)


def test_unknown_branch():
    p = nn.Parameter(torch.ones(2, 2))
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="branch.*auto, network, adam.*'muon'"):
        make("celo2", [p], branch="muon").step()


# ---- orthogonal steps ----------------------------------------------------------------------------------------------


def test_newton_schulz_orthogonalises():
    """Singular values of a well-conditioned matrix end near 1, directions stay; a transposed matrix gives the same."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 8, 20, generator=generator)
    y = orthogonal.newton_schulz(x)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    singular = torch.linalg.svdvals(y)
    assert 0.6 < singular.min() and singular.max() < 1.3
    assert torch.linalg.matrix_norm(y - u @ v).max() < 0.35 * math.sqrt(8)
    torch.testing.assert_close(orthogonal.newton_schulz(x.mT), y.mT)


def test_newton_schulz_in_bfloat16_is_close():
    x = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0))
    half, _ = orthogonal.orthogonal(x, CELO2.norm_eps, torch.bfloat16)
    assert half.dtype == torch.float32
    whole, _ = orthogonal.orthogonal(x, CELO2.norm_eps)
    error = torch.linalg.matrix_norm(half - whole) / torch.linalg.matrix_norm(whole)
    assert 1e-4 < error.min() and error.max() < 0.1  # eight bits; a bound that float32 would miss below
    params = make_params()
    with pytest.raises(ValueError, match="ns_dtype.*float32, tf32, bfloat16, auto.*'float16'"):
        make("celo2", params, ns_dtype="float16")


def test_what_the_iteration_runs_in():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for setting, dtype, device, kind in (
        ("auto", torch.float32, cuda, "tf32"),
        ("auto", torch.float16, cuda, "tf32"),
        ("auto", torch.bfloat16, cuda, "bfloat16"),
        ("auto", torch.bfloat16, cpu, "float32"),
        ("tf32", torch.bfloat16, cuda, "tf32"),
        ("tf32", torch.float32, cpu, "float32"),
        ("bfloat16", torch.float32, cpu, "bfloat16"),
        ("float32", torch.bfloat16, cuda, "float32"),
    ):
        assert orthogonal.precision(setting, dtype, device) == kind
    before = torch.backends.cuda.matmul.fp32_precision
    with orthogonal._products_in("tf32"):
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert torch.backends.cuda.matmul.fp32_precision == before


def test_outputs_of_one_shape_are_a_stack_without_a_copy():
    shapes = [(3, 4), (5,), (3, 4), (4, 3), (3, 4)]
    out = orthogonal.new_stacks([torch.empty(s, dtype=torch.bfloat16) for s in shapes])
    assert [tuple(x.shape) for x in out] == shapes and all(x.dtype == torch.float32 for x in out)
    for i, x in enumerate(out):
        x.fill_(i)
    same = [out[0], out[2], out[4]]
    assert orthogonal._joined(same).data_ptr() == out[0].data_ptr()
    assert orthogonal._joined(same[1:]).data_ptr() == out[2].data_ptr()
    for some in (same, same[1:], same[::-1], same[::2], [same[0], torch.ones(3, 4)], [x.mT for x in same]):
        assert torch.equal(orthogonal._joined(some), torch.stack(some))


def test_matrices_of_transposed_shapes_go_together(monkeypatch):
    """As on a GPU: the batch has both, and each comes back as it was."""
    generator = torch.Generator().manual_seed(3)
    steps = [torch.randn(shape, generator=generator) for shape in ((6, 9), (9, 6), (6, 9), (9, 6), (4, 4))]
    pairs, kinds = [(0, 1)] * len(steps), ["float32"] * len(steps)
    alone, _ = orthogonal._orthogonalize(pairs, kinds, steps, 1e-9)
    shapes, call = [], orthogonal.orthogonal

    def record(x, *args):
        shapes.append(tuple(x.shape))
        return call(x, *args)

    monkeypatch.setattr(orthogonal, "orthogonal", record)
    monkeypatch.setattr(orthogonal, "_ALONE", frozenset())
    together, _ = orthogonal._orthogonalize(pairs, kinds, steps, 1e-9)
    assert shapes == [(4, 6, 9), (1, 4, 4)]
    for one, other in zip(alone, together, strict=True):
        assert other.is_contiguous()
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["small_fc_lopt", "mulo", "elo"])
def test_precision_is_a_word_that_changes_nothing_on_a_cpu(name):
    ends = []
    for precision in ("exact", "tf32"):
        params = make_params()
        optimizer = make(name, params, precision=precision)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        ends.append([p.detach() for p in params])
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))
    with pytest.raises(ValueError, match="precision must be one of exact, tf32, got 'high'"):
        make(name, params, precision="high")


@pytest.mark.parametrize("name", ["celo2", "celo2_base", "elo_celo2"])
def test_results_do_not_depend_on_what_is_finished_together(monkeypatch, name):
    runs = []
    for elements in (1 << 20, 30):
        monkeypatch.setattr(celo2, "_CHUNK_CPU", elements)
        monkeypatch.setattr(orthogonal, "_BATCH_CPU", elements)
        params = make_params()
        optimizer = make(name, params)
        for t in range(3):
            for p, g in zip(params, gradients(params, t), strict=True):
                p.grad = g
            optimizer.step()
        runs.append((params, optimizer.metrics()["update_rms"]))
    (params, rms), (others, other_rms) = runs
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-7)
    assert rms == pytest.approx(other_rms, rel=1e-6)


# ---- options of the reference packages -----------------------------------------------------------------------------


def test_global_norm_clip():
    params, clipped = make_params(), make_params()
    optimizer, twin = make("small_fc_lopt", params, max_grad_norm=0.5), make("small_fc_lopt", clipped)
    for p, q, g in zip(params, clipped, gradients(params, 0), strict=True):
        p.grad, q.grad = g.clone(), g.clone()
    nn.utils.clip_grad_norm_(clipped, 0.5)
    optimizer.step()
    twin.step()
    assert equal(params, clipped)


def test_step_scale_multiplies_the_final_step():
    params, scaled = make_params(), make_params()
    start = [p.detach().clone() for p in params]
    train(make("mulo", params), params, range(1))
    train(make("mulo", [{"params": scaled, "step_scale": 0.25}]), scaled, range(1))
    for p0, p, q in zip(start, params, scaled, strict=True):
        torch.testing.assert_close((p - p0).detach() * 0.25, (q - p0).detach(), rtol=2e-3, atol=1e-7)


def test_runs_beyond_the_trained_length_accumulate_gradients():
    """20 calls with max_training_steps=10 are 10 updates with the means of two gradients and losses, horizon 10."""
    params, means = make_params(), make_params()
    optimizer = make("velo", params, num_training_steps=20, max_training_steps=10)
    twin = make("velo", means, num_training_steps=10)
    for t in range(6):
        pair = gradients(params, 2 * t), gradients(params, 2 * t + 1)
        losses = (2.0 / (t + 1), 2.5 / (t + 1))
        for grads, loss in zip(pair, losses, strict=True):
            for p, g in zip(params, grads, strict=True):
                p.grad = g.clone()
            optimizer.step(loss)
            if grads is pair[0]:  # a checkpoint between the two calls of an update
                fresh = make("velo", params, num_training_steps=20, max_training_steps=10)
                fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
                optimizer = fresh
        for p, a, b in zip(means, *pair, strict=True):
            p.grad = (a + b) / 2
        twin.step(sum(losses) / 2)
    assert optimizer.steps_done == 6
    for p, q in zip(params, means, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        short, same = make_params(), make_params()
        train(make("velo", short, max_training_steps=20), short, range(3))
        train(make("velo", same), same, range(3))
    assert equal(short, same)


def test_reset_state_forgets_an_update_that_takes_more_calls():
    params, fresh = make_params(), make_params()
    optimizer = make("velo", params, num_training_steps=20, max_training_steps=10)
    train(optimizer, params, range(3))
    optimizer.reset_state()
    for p, q in zip(fresh, params, strict=True):
        p.data.copy_(q.data)
    twin = make("velo", fresh, num_training_steps=20, max_training_steps=10)
    train(optimizer, params, range(4))
    train(twin, fresh, range(4))
    assert equal(params, fresh) and optimizer.steps_done == 2
