"""Hand-computed cases: which axes are factored, and what the accumulators and their factors are."""

from __future__ import annotations

import pytest
import torch

from hf_lopt import features
from hf_lopt.kernels.reference import passes
from hf_lopt.step import accumulators


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
    decays = features.Decays()
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
    for index in passes.block_indices(shape, limit):
        seen[index] += 1
        assert seen[index].numel() <= max(limit, 1)
    assert torch.equal(seen, torch.ones(shape))


def test_results_do_not_depend_on_the_block_size(monkeypatch):
    import golden
    from hf_lopt import VeLO

    reference = golden.read("velo_s.npz")
    results = []
    for block in (1 << 15, 40):
        monkeypatch.setattr(passes, "_BLOCK_CPU", block)
        params = golden.parameters(reference, "torch")
        optimizer = VeLO(params, num_training_steps=40, weights=reference.theta, bank_scale=1.0)
        for t in (1, 2, 3):
            golden.set_gradients(reference, t, params, "torch")
            optimizer.step(float(reference.loss[t - 1]))
        results.append(params)
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
