"""What every rule has to do beyond its numbers, and the numbers of rules that have no reference file.

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
    return golden.read(FILES.get(name, name) + ".npz").theta


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

    cls = hf_lopt.optimizer.PUBLIC_CLASSES[name]
    optimizer = cls(make_params(), weights=theta(name))
    assert type(optimizer).__name__ == rules.get(name).class_name
    assert isinstance(optimizer, getattr(hf_lopt, rules.get(name).class_name))
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


# ---- rules without a reference file: float64, from the formulas ----------------------------------------------------


def normal(x: np.ndarray, eps: float, axes=None) -> np.ndarray:
    return x / np.sqrt(eps + (x**2).mean(axes, keepdims=True))


def accumulators64(grads: list[np.ndarray], v_decay: float):
    """(m, v, R or D, C or D) after these gradients of a matrix with more columns than rows, or of a vector."""
    decays = (0.9, 0.99, 0.999)
    m, v = [np.zeros_like(grads[0])] * 3, np.zeros_like(grads[0])
    row, col = [0.0] * 3, [0.0] * 3
    for g in grads:
        q = g**2 + 1e-30
        m = [b * x + (1 - b) * g for b, x in zip(decays, m, strict=True)]
        v = v_decay * v + (1 - v_decay) * g**2
        matrix = g.ndim == 2
        row = [b * x + (1 - b) * (q.mean(1, keepdims=True) if matrix else q) for b, x in zip(decays, row, strict=True)]
        col = [b * x + (1 - b) * (q.mean(0, keepdims=True) if matrix else q) for b, x in zip(decays, col, strict=True)]
    return m, v, row, col


def factors64(row, col, matrix: bool):
    if not matrix:
        return [np.maximum(d + 1e-9, 1e-9) ** -0.5 for d in row]
    r = [np.maximum(x / (x.mean(0, keepdims=True) + 1e-9), 1e-9) ** -0.5 for x in row]
    return [a * np.maximum(c, 1e-9) ** -0.5 for a, c in zip(r, col, strict=True)]


def test_elo_against_float64():
    """ELO: the small_fc network without decay offsets, p <- p - lr (o0 exp(0.001 o1) + wd p), three steps."""
    weights = theta("elo") | {
        k: np.zeros(3 if "rms" not in k else 1, np.float32) for k in theta("elo") if "decays" in k
    }
    t64 = {k: v.astype(np.float64) for k, v in weights.items()}
    rng = np.random.default_rng(1)
    lr, wd = 2e-3, 0.1
    for shape in ((4, 6), (5,)):
        p = rng.standard_normal(shape).astype(np.float32).astype(np.float64)
        grads = [rng.standard_normal(shape).astype(np.float32).astype(np.float64) for _ in range(3)]
        parameter = nn.Parameter(torch.tensor(p, dtype=torch.float32))
        optimizer = make("elo", [parameter], weights=weights, lr=lr, weight_decay=wd, axis_order="jax")
        for i, g in enumerate(grads):
            m, v, row, col = accumulators64(grads[: i + 1], 0.999)
            f, root = factors64(row, col, p.ndim == 2), (v + 1e-6) ** -0.5
            last = [x * y for x, y in zip(m, f, strict=True)] if p.ndim == 2 else None
            last = last or [x * (d + 1e-6) ** -0.5 for x, d in zip(m, row, strict=True)]
            columns = [g, p, *m, v, *(x * root for x in m), root, *(g * y for y in f), *row, *col]
            columns += [*((x + 1e-8) ** -0.5 for x in row), *((x + 1e-8) ** -0.5 for x in col), *last]
            features = [normal(np.broadcast_to(x, shape), 1e-5).ravel() for x in columns]
            scales = np.array([1, 3, 10, 30, 100, 300, 1000, 3000, 1e4, 3e4, 1e5])
            z = np.concatenate([np.array(features).T, np.tile(np.tanh(i / scales - 1), (p.size, 1))], 1)
            for layer in range(3):
                z = z @ t64[f"nn/~/w{layer}"] + t64[f"nn/~/b{layer}"]
                z = np.maximum(z, 0) if layer < 2 else z
            p = p - lr * ((z[:, 0] * np.exp(0.001 * z[:, 1])).reshape(shape) + wd * p)
            parameter.grad = torch.tensor(g, dtype=torch.float32)
            optimizer.step()
        np.testing.assert_allclose(parameter.detach().numpy(), p, rtol=0, atol=1e-6 * np.abs(p).max())


def test_elo_celo2_against_float64():
    """ELO-Celo2: global-norm clip at 1, weight decay 0.1, Celo2's network on a matrix, the usual Adam on a vector."""
    weights = theta("elo_celo2")
    t64 = {k: v.astype(np.float64) for k, v in weights.items()}
    rng = np.random.default_rng(2)
    start = [rng.standard_normal(s).astype(np.float32).astype(np.float64) for s in ((4, 6), (5,))]
    raw = [[rng.standard_normal(s).astype(np.float32).astype(np.float64) for s in ((4, 6), (5,))] for _ in range(3)]
    parameters = [nn.Parameter(torch.tensor(p, dtype=torch.float32)) for p in start]
    optimizer = make("elo_celo2", parameters, lr=3e-3, axis_order="jax")
    matrix, vector = start
    clipped, m, v = [], np.zeros(5), np.zeros(5)
    for t, pair in enumerate(raw, 1):
        norm = np.sqrt(sum((g**2).sum() for g in pair))
        g, h = (g * min(1.0, 1.0 / (norm + 1e-6)) for g in pair)
        clipped.append(g)
        # Adam, at 20 times lr, decay included.
        m, v = 0.9 * m + 0.1 * h, 0.95 * v + 0.05 * h**2
        step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
        vector = vector - 20 * 3e-3 * (step + 0.1 * vector)
        # The network.
        ms, vs, row, col = accumulators64(clipped, 0.95)
        f, root = factors64(row, col, True), (vs + 1e-8) ** -0.5
        columns = [g, g.clip(-0.1, 0.1), matrix, *ms, vs, *(x * root for x in ms), root, *(g * y for y in f)]
        columns += [g * root, *row, *col, *((x + 1e-8) ** -0.5 for x in row), *((x + 1e-8) ** -0.5 for x in col)]
        columns += [x * y for x, y in zip(ms, f, strict=True)]
        z = np.array([normal(np.broadcast_to(x, g.shape), 1e-9).ravel() for x in columns]).T
        first = np.concatenate([t64[f"ff_mod_stack/~/w0__{k}"] for k in range(14)])
        for layer, w in enumerate((first, t64["ff_mod_stack/~/w1"], t64["ff_mod_stack/~/w2"])):
            z = z @ w + t64[f"ff_mod_stack/~/b{layer}"]
            z = np.maximum(z, 0) if layer < 2 else z
        x = z[:, 0].reshape(g.shape)
        x = x / (np.linalg.norm(x) + 1e-8)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        matrix = matrix - 3e-3 * (normal(x, 1e-9) + 0.1 * matrix)
        for p, gradient in zip(parameters, pair, strict=True):
            p.grad = torch.tensor(gradient, dtype=torch.float32)
        optimizer.step()
    for p, want in zip(parameters, (matrix, vector), strict=True):
        np.testing.assert_allclose(p.detach().numpy(), want, rtol=0, atol=3e-6 * np.abs(want).max())


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
    with pytest.raises(ValueError, match="ns_dtype.*float32, bfloat16.*'float16'"):
        make("celo2", params, ns_dtype="float16")


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
