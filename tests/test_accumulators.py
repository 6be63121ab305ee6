"""Hand-computed cases: which axes are factored, what the accumulators and their factors are, what a feature is."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_lopt import _ops, _plain, accumulators, features


@pytest.mark.parametrize(
    ("shape", "jax", "torch_"),
    [
        ((), (-1, -1), (-1, -1)),
        ((7,), (-1, -1), (-1, -1)),
        ((5, 9), (1, 0), (1, 0)),
        ((9, 5), (0, 1), (0, 1)),
        ((6, 6), (1, 0), (0, 1)),  # (out, in) is stored (in, out) there: the largest axis is out
        ((3, 4, 5), (2, 1), (2, 1)),
        ((8, 8, 3, 3), (1, 0), (0, 1)),
        ((3, 3, 8, 8), (3, 2), (3, 2)),
        ((4, 4, 4), (2, 1), (0, 1)),
        ((4, 1, 4), (2, 0), (0, 2)),
        ((1, 1), (1, 0), (0, 1)),
        ((1, 6), (1, 0), (1, 0)),
        ((2, 3, 4, 5, 6), (4, 3), (4, 3)),
    ],
)
def test_factored_axes(shape, jax, torch_):
    assert accumulators.factored_axes(shape, "jax") == jax
    # For rank > 2 torch order looks at (2, 3, ..., 1, 0) and keeps the last of equals.
    order = [*range(2, len(shape)), 1, 0] if len(shape) >= 2 else []
    if len(shape) >= 2:
        ranked = sorted(order, key=lambda axis: (shape[axis], order.index(axis)))
        assert (ranked[-1], ranked[-2]) == torch_
    assert accumulators.factored_axes(shape, "torch") == torch_


@pytest.mark.parametrize(
    ("shape", "axis_order", "reference", "axes"),
    [
        # A transposed convolution (in, out, *kernel) is (*kernel, in, out) there: out is the later of equals.
        ((8, 8, 3, 3), "torch_transposed", [2, 3, 0, 1], (1, 0)),
        ((4, 4, 4), "torch_transposed", [2, 0, 1], (1, 0)),
        ((6, 6), "torch_transposed", [0, 1], (1, 0)),
        ((9, 5, 3), "torch_transposed", [2, 0, 1], (0, 1)),
        # A stack (*stack, out, in) keeps its leading axes.
        ((2, 6, 6), "torch_stacked", [0, 2, 1], (1, 2)),
        ((4, 4, 4), "torch_stacked", [0, 2, 1], (1, 2)),
        ((9, 5, 3), "torch_stacked", [0, 2, 1], (0, 1)),
        ((2, 3, 6, 6), "torch_stacked", [0, 1, 3, 2], (2, 3)),
        ((6, 6), "torch_stacked", [1, 0], (0, 1)),
        ((5,), "torch_stacked", [0], (-1, -1)),
        ((), "torch_transposed", [], (-1, -1)),
    ],
)
def test_other_layouts(shape, axis_order, reference, axes):
    assert accumulators.reference_axes(len(shape), axis_order) == reference
    assert accumulators.factored_axes(shape, axis_order) == axes
    # The same array in the reference's own layout has the same axes.
    same = accumulators.reference_shape(shape, axis_order)
    assert tuple(reference[a] if a >= 0 else a for a in accumulators.factored_axes(same, "jax")) == axes


def test_unknown_axis_order():
    with pytest.raises(ValueError, match="axis_order must be one of torch, jax, .*, got 'C'"):
        accumulators.factored_axes((2, 2), "C")


def test_factored_update_by_hand():
    """A 2 x 2 gradient [[1, 2], [3, 4]], one decay of 1/2, from zero, A = 1 and B = 0."""
    g2 = torch.tensor([[1.0, 4.0], [9.0, 16.0]])
    factors = accumulators.update_factored(
        *([torch.zeros(1, 2)], [torch.zeros(1, 2)], [g2.sum(1)], [g2.sum(0)]),
        *([(2, 2)], [1], [0], [0.5]),
    )
    # Row means 2.5 and 12.5, halved; column means 5 and 10, halved.
    torch.testing.assert_close(factors.rows[0], torch.tensor([[1.25, 6.25]]))
    torch.testing.assert_close(factors.cols[0], torch.tensor([[2.5, 5.0]]))
    torch.testing.assert_close(factors.row_factors[0], torch.tensor([[(3.75 / 1.25) ** 0.5, (3.75 / 6.25) ** 0.5]]))
    torch.testing.assert_close(factors.col_factors[0], torch.tensor([[2.5**-0.5, 5.0**-0.5]]))


def test_state_shapes():
    decays = accumulators.Decays()
    shapes = {k: tuple(v.shape) for k, v in accumulators.init(torch.empty(4, 5, 3), "jax", decays).items()}
    assert shapes == {
        "momentum": (3, 4, 5, 3),
        "second_moment": (1, 4, 5, 3),
        "factored_row": (3, 4, 3),  # without A = 1, the axis of size 5
        "factored_col": (3, 5, 3),  # without B = 0, the axis of size 4
    }
    assert accumulators.init(torch.empty(()), "torch", decays)["factored_diag"].shape == (3,)


@pytest.mark.parametrize("limit", [1, 7, 24, 50, 10_000])
@pytest.mark.parametrize("shape", [(), (1,), (53,), (6, 9), (2, 3, 40), (3, 0, 2), (2, 2, 2, 2, 2)])
def test_blocks_cover_a_tensor_once(shape, limit):
    seen = torch.zeros(shape)
    for index in _plain.blocks(shape, limit):
        seen[index] += 1
        assert seen[index].numel() <= max(limit, 1)
    assert torch.equal(seen, torch.ones(shape))


def test_results_do_not_depend_on_the_block_size(monkeypatch):
    import golden
    from hf_lopt import VeLO

    reference = golden.read("velo_s.npz")
    results = []
    for block in (1 << 15, 40):
        monkeypatch.setattr(_plain, "_BLOCK_CPU", block)
        params = golden.parameters(reference, "torch")
        optimizer = VeLO(params, num_training_steps=40, weights=reference.theta, bank_scale=1.0)
        for t in (1, 2, 3):
            golden.set_gradients(reference, t, params, "torch")
            optimizer.step(float(reference.loss[t - 1]))
        results.append(params)
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_feature_columns_against_numpy():
    """The 30 columns of VeLO for a matrix and a vector, in the first step, from formulas written out in float64."""
    rng = np.random.default_rng(0)
    for shape in ((4, 6), (5,)):
        p, g = rng.standard_normal(shape), rng.standard_normal(shape) * 0.3
        # The reference rounds a decay to float32 before it takes 1 - b.
        new = [1 - float(np.float32(b)) for b in (0.9, 0.99, 0.999)]
        m = [b * g for b in new]
        v = new[2] * g**2
        q = g**2 + 1e-30
        if len(shape) == 2:
            R = [np.broadcast_to(b * q.mean(1, keepdims=True), shape) for b in new]
            C = [np.broadcast_to(b * q.mean(0, keepdims=True), shape) for b in new]
            factor = [
                np.maximum(r / (r.mean(0, keepdims=True) + 1e-9), 1e-9) ** -0.5 * np.maximum(c, 1e-9) ** -0.5
                for r, c in zip(R, C, strict=True)
            ]
            m_factor = factor
        else:
            R = C = [b * q for b in new]
            factor, m_factor = [np.maximum(d + 1e-9, 1e-9) ** -0.5 for d in R], [d**-0.5 for d in R]
        root = (v + 1e-6) ** -0.5
        columns = [g, g.clip(-0.1, 0.1), p, *m, v, *(x * root for x in m), root]
        columns += [*(g * f for f in factor), g * root, *R, *C]
        columns += [*((x + 1e-8) ** -0.5 for x in R), *((x + 1e-8) ** -0.5 for x in C)]
        columns += [x * f for x, f in zip(m, m_factor, strict=True)]
        want = np.array([(x**2).sum() for x in columns])

        parameter, grad = torch.tensor(p, dtype=torch.float32), torch.tensor(g, dtype=torch.float32)
        state = accumulators.init(parameter, "jax", features.VELO.decays)
        a, b = accumulators.factored_axes(shape, "jax")
        base = ([parameter], [grad], [state["momentum"]], [state["second_moment"]])
        row_sums, col_sums, stats = _ops.sums(*base, [a], [b], 1000.0, True)
        assert stats[0, _plain.STAT_G2].item() == pytest.approx((g**2).sum(), rel=1e-6)
        assert stats[0, _ops.STAT_P2].item() == pytest.approx((p**2).sum(), rel=1e-6)
        old = [state.get("factored_row")], [state.get("factored_col")]
        decays = features.VELO.decays
        f = accumulators.update_factored(*old, row_sums, col_sums, [shape], [a], [b], decays.factored)
        diagonal = state.get("factored_diag", torch.empty(0))
        got = _ops.feature_sums(
            *(features.VELO.names, *base, [diagonal], f.rows, f.cols, f.row_factors, f.col_factors, [a], [b], []),
            *(decays.momentum, decays.second_moment, decays.factored, 1000.0, 1e-6, 0.0),
        )
        np.testing.assert_allclose(got[0].numpy(), want, rtol=5e-6)


def test_loss_buffer_against_numpy():
    """Twelve losses with a spike, against the formulas written out in float64."""
    losses = [2.0, 1.7, 1.9, 1.2, 9.0, 1.1, 1.3, 0.9, 0.7, 0.8, 0.75, 0.5]
    horizon = 50
    h = np.exp(np.linspace(math.log(10), math.log(horizon), 10))
    d = np.exp(-1 / h)
    means, low = np.zeros(10), np.full(10, 999999999999.0)
    buffer = features.init_loss_buffer()
    for n, loss in enumerate(losses):
        big = (means / (1 - d ** (n + 1))).max() if n else loss
        clipped = min(loss, 2 * abs(big))
        means = d * means + (1 - d) * clipped
        u = means / (1 - d ** (n + 1))
        low = np.minimum(low, u)
        want = np.clip((u[:-1] - low[:-1]) / np.maximum(1e-8, u[1:] - low[:-1]) - 1, -1, 1)
        want = want if n + 1 > 2 else np.zeros(9)
        buffer, got = features.update_loss_buffer(buffer, torch.tensor(loss), torch.tensor(n), horizon)
        np.testing.assert_allclose(got.numpy(), want, atol=3e-5)
        np.testing.assert_allclose(buffer["loss_min"].numpy(), low, rtol=1e-6)
