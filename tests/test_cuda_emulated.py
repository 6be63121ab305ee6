"""The CUDA kernels, run on the host thread by thread, against the plain kernels and the reference trajectories.

Same tiles, same order of sums, same tables; see docs/kernels.md for what this can and cannot show.
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cases
import hf_lopt
import test_golden
import test_kernels
import test_meta_particles
from emulated import compiler, emulator
from hf_lopt import _ops, _plain_scheduler, rules
from kernel_cases import FAMILIES, SHAPES, case


pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler, or HF_LOPT_KERNELS=torch")


@pytest.fixture(autouse=True, scope="module")
def kernels():
    yield emulator()


@pytest.fixture
def emulated(kernels):
    with kernels.everywhere():
        yield kernels


# ---- the passes --------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_follow_the_plain_ones(emulated, family):
    before = emulated.launches
    test_kernels.compare(
        case([*SHAPES, (130,), (33, 70), (70, 33), (2, 900), (600, 2), (300, 140), (2, 3, 200)], family)
    )
    assert emulated.launches > before


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["transposed", "every second", "channels last"])
def test_parameters_of_any_strides(emulated, family, layout):
    test_kernels.compare(case([*SHAPES, (40, 33)], family, layout=layout))


@pytest.mark.parametrize("p_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("g_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_in_any_mix(emulated, p_dtype, g_dtype):
    for family in ("velo", "small_fc"):
        test_kernels.compare(case([(7,), (5, 9), (4, 68), (33, 70), (8, 4, 3, 3)], family, p_dtype, g_dtype))


@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-20, 0.05, 900.0, 1e4, 1e10, 1e20])
@pytest.mark.parametrize("family", FAMILIES)
def test_extreme_gradients(emulated, family, size):
    test_kernels.compare(case([(), (7,), (5, 9), (33, 70)], family, size=size))


# Slices over the last axes and over others, factored over the same axes and over others, transposed and not.
STACKS = [*SHAPES, (4, 33, 20), (33, 70, 2), (3, 3, 20, 36), (40, 6, 3, 3), (6, 3, 7, 7), (2, 3, 2, 5, 4), (130,)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("order", ["torch", "jax", "torch_transposed", "torch_stacked"])
def test_stacks_of_matrices(emulated, family, order):
    before = emulated.launches
    test_kernels.compare(case(STACKS, family, order=order, sliced=True))
    assert emulated.launches >= before + 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stacks_in_half_precision(emulated, dtype):
    test_kernels.compare(case([*STACKS, (0, 3, 2, 2), (3, 4, 0)], "celo2", dtype, dtype, sliced=True))


@pytest.mark.parametrize("order", ["torch", "jax", "torch_stacked"])
@pytest.mark.parametrize("numbers", ["tensor", "slice"])
def test_descend_brings_slices_to_a_mean_square_of_one(emulated, order, numbers):
    before = emulated.launches
    test_kernels.descend_by_slices(order, numbers)
    assert emulated.launches == before + 1


def test_empty_tensors(emulated):
    for shapes in ([(0,), (5, 9)], [(0, 4), (4, 0), (7,)], [(0,), (3, 0)]):
        test_kernels.compare(case(shapes))


def test_more_tensors_than_threads(emulated):
    test_kernels.compare(case([(3, 2), (5,), ()] * 350))


def test_memory_that_is_not_aligned_for_wide_loads(emulated):
    x = case([(5, 8), (16, 12)])
    x.params = [torch.cat([torch.zeros(1), p.flatten()])[1:].view(p.shape) for p in x.params]
    test_kernels.compare(x)


axis_sizes = st.sampled_from([1, 2, 3, 5, 8, 16, 17, 31, 33, 64, 100, 129, 260])


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    shapes=st.lists(
        st.one_of(
            st.tuples(st.integers(0, 500)),
            st.tuples(axis_sizes, axis_sizes),
            st.tuples(axis_sizes, st.integers(1, 4), axis_sizes),
            st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4)),
        ),
        min_size=1,
        max_size=3,
    ),
    family=st.sampled_from(list(FAMILIES)),
    p_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    g_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    layout=st.sampled_from(["contiguous", "transposed"]),
    order=st.sampled_from(["torch", "jax"]),
    size=st.sampled_from([1e-4, 1.0, 2e3]),
    seed=st.integers(0, 100),
)
def test_any_list_of_tensors(shapes, family, p_dtype, g_dtype, layout, order, size, seed):
    with emulator().everywhere():
        test_kernels.compare(case(shapes, family, p_dtype, g_dtype, layout, size, seed, order))


def test_split_bfloat16_is_close_to_float64(emulated):
    """The matrix units' share: 1e-4 of the update is allowed, a hundredth of what plain bfloat16 would lose."""
    x = case([(70, 200)], "small_fc", size=0.3)
    f = x.factors()
    with _ops.plain():
        weights, biases = x.network(_ops.feature_sums(*x.common(f)))
    (want,) = test_kernels.reference_step(x, f, weights, biases, 1e-3)
    (out,) = [torch.empty(p.shape) for p in x.params]
    arguments = (weights, biases, torch.full((1,), 1e-3), torch.zeros(1), 1e-3, torch.tensor(False), [out])
    _ops.apply_network(*x.common(f), *arguments)
    assert (out - want).abs().max() <= 1e-4 * want.abs().max()


def test_adam_and_descend(emulated):
    for dtype in (torch.float32, torch.bfloat16):
        x = case([*SHAPES, (70, 33)], p_dtype=dtype, g_dtype=dtype, size=700.0)
        x.momenta = [m[:1].clone() for m in x.momenta]
        count, results = len(x.params), []
        for plain in (False, True):
            y = copy.deepcopy(x)
            adam, descend = (
                (_plain_kernel("adam_step"), _plain_kernel("descend")) if plain else (_ops.adam_step, _ops.descend)
            )
            scale, decay, skip = torch.linspace(1e-3, 2e-3, count), torch.full((count,), 0.01), torch.tensor(False)
            sums = adam(
                *(y.params, y.grads, y.momenta, y.second_moments, 0.9, 0.95, 1000.0, scale, decay),
                *(torch.tensor(1.5), torch.tensor(2.5), 1e-10, 1e-8, skip),
            )
            steps = [g.float() for g in y.grads]
            descend(y.params, steps, scale * 1e-3, decay, None, None, 0.0, (), skip)
            results.append((sums, *y.params, *y.momenta, *y.second_moments))
        for got, want in zip(*results, strict=True):
            test_kernels.close(got, want, max(torch.finfo(got.dtype).eps, 1e-6) * 2, "Adam")


def test_adam_with_numbers_for_each_slice(emulated):
    """Σ step² is that of a whole tensor, whose slices have tiles of their own."""
    x = case([(3, 7), (3, 70, 500), (3, 1), (3, 0)])
    x.momenta = [m[:1].clone() for m in x.momenta]
    scale, decay = torch.linspace(1e-3, 2e-3, 12), torch.linspace(0.1, 0.2, 12)
    results = []
    for adam in (_ops.adam_step, _plain_kernel("adam_step")):
        y = copy.deepcopy(x)
        sums = adam(
            *(y.params, y.grads, y.momenta, y.second_moments, 0.9, 0.95, math.inf, scale, decay),
            *(torch.tensor(1.0), torch.tensor(1.0), 0.0, 1e-8, torch.tensor(False)),
        )
        results.append((sums, *y.params, *y.momenta, *y.second_moments))
    for got, want in zip(*results, strict=True):
        test_kernels.close(got, want, 2e-6, "Adam")


def _plain_kernel(name: str):
    return _ops.KERNELS[name][0]


def test_skip_changes_nothing(emulated):
    x = case(SHAPES)
    f = x.factors()
    weights, biases = x.network(_ops.feature_sums(*x.common(f)))
    before = copy.deepcopy((x.params, x.momenta, x.second_moments, x.diagonals))
    one, skip = torch.ones(len(x.params)), torch.tensor(True)
    _ops.apply_network(*x.common(f), weights, biases, one, one, 1e-3, skip, ())
    _ops.descend(x.params, [torch.ones_like(p) for p in x.params], one, one, None, None, 0.0, (), skip)
    _ops.assign(x.momenta, [torch.ones_like(m) for m in x.momenta], skip)
    for old, new in zip(before, (x.params, x.momenta, x.second_moments, x.diagonals), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))


def test_zero_nan(emulated):
    for dtype in (torch.float32, torch.bfloat16):
        xs = [
            torch.tensor([math.nan, -math.inf, 1.5, math.inf, math.nan], dtype=dtype),
            torch.ones(300, 7, dtype=dtype),
        ]
        xs[1][299, 3] = math.nan
        _ops.zero_nan(xs)
        assert xs[0].tolist() == [0.0, -math.inf, 1.5, math.inf, 0.0]
        assert xs[1][299, 3] == 0 and xs[1].sum() == 2099


def test_no_launch_without_blocks(emulated):
    """A rank may hold no part of any tensor; a grid of no blocks is an error on a GPU."""
    x = case([(0, 3, 4), (0,)], sliced=True)
    f = x.factors()
    before = emulated.launches
    sums = _ops.feature_sums(*x.common(f))
    assert sums.shape == (5, sum(x.features.widths())) and not sums.any()
    weights, biases = x.network(sums)
    one, no = torch.ones(5), torch.tensor(False)
    _ops.apply_network(*x.common(f), weights, biases, one, one, 1e-3, no, ())
    _ops.descend(x.params, x.grads, one[:2], one[:2], None, None, 0.0, (), no)
    _ops.assign(x.params, x.grads, no)
    numbers = torch.empty(0, dtype=torch.float64)
    rates = torch.empty(0)
    folded = _ops.fold_network(
        *(
            torch.zeros(1, 11),
            (2, 2, 1, 1),
            1,
            None,
            numbers.view(0, 2),
            numbers,
            1e-9,
            rates,
            rates,
            [],
            None,
            1.0,
            -1,
        )
    )
    assert folded[0].shape[0] == 0 and emulated.launches == before


def test_non_finite_gradients_are_counted(emulated):
    x = case([(33, 70), (5,), ()])
    x.grads[0][3, 4], x.grads[0][30, 69], x.grads[1][2] = math.nan, math.inf, -math.inf
    assert x.first_pass(False)[2][:, 0].tolist() == [2, 1, 0]


# ---- what must be the same, bit by bit --------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_bits_do_not_depend_on_the_order_of_blocks_and_threads(emulated, family):
    """A missing barrier shows here, and a sum in order of arrival."""
    x = case([(), (7,), (600,), (33, 70), (300, 130), (130, 300), (8, 4, 3, 3)], family, size=0.5)
    results = []
    try:
        for seed in (0, 1, 2):
            emulated.shuffle(seed)
            results.append(test_kernels.everything(x))
    finally:
        emulated.shuffle(0)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_of_an_update_are_those_of_the_next_first_pass(emulated, dtype):
    """So a run that resumes from a checkpoint goes on bit by bit like one that was not interrupted."""
    x = case([(), (7,), (600,), (33, 70), (300, 130), (8, 4, 3, 3)], p_dtype=dtype, g_dtype=dtype)
    f = x.factors()
    weights, biases = x.network(_ops.feature_sums(*x.common(f)))
    one = torch.ones(len(x.params))
    _, stats = _ops.apply_network(*x.common(f), weights, biases, one * 1e-3, one * 0, 1e-3, torch.tensor(False), ())
    assert torch.equal(stats[:, 2:], x.first_pass(True)[2][:, 2:])


# ---- tables --------------------


def test_tables_are_sent_once(emulated):
    x = case([(5, 9), (7,)])
    results = [x.first_pass(False)]  # kept, so that the memory of the results moves
    before = emulated.table_copies
    results.append(x.first_pass(False))
    assert emulated.table_copies == before, "the same tensors need no new table"
    x.grads[1] = x.grads[1].clone()
    results.append(x.first_pass(False))
    assert emulated.table_copies == before + 1
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0][0], other[0], strict=True))


def test_each_model_has_tables_of_its_own(emulated):
    """Blocks count their arrivals in them: graphs of two models of one shape may run at the same time."""
    x = case([(3, 11), (8,)])
    y = copy.deepcopy(x)
    before = emulated.table_copies
    kept = [x.first_pass(False), y.first_pass(False), x.first_pass(False), y.first_pass(False)]
    assert emulated.table_copies == before + 2 and len(kept) == 4


def test_a_graph_has_tables_of_its_own(emulated):
    """Those that are made while a graph is captured are filled when it is replayed, so no one else may take them."""
    x = case([(6, 10), (8,)])
    with emulated.capture(1):
        before = emulated.table_copies
        x.first_pass(False)
        x.first_pass(False)
        assert emulated.table_copies == before + 1
    x.first_pass(False)
    assert emulated.table_copies == before + 2
    with emulated.capture(2):
        x.first_pass(False)
    assert emulated.table_copies == before + 2, "a table that is there is good for a graph, too"


# ---- between the passes --------------------


@pytest.mark.parametrize("loss, gradient", [(1.5, 0.0), (math.nan, 0.0), (2.0, 1.0)])
@pytest.mark.parametrize("own", [True, False])
def test_advance(kernels, loss, gradient, own):
    generator = torch.Generator().manual_seed(0)
    rows = 5

    def random(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1

    stats, sums, numel = random(rows, 11), random(rows, 30), random(rows) * 100
    stats[:, 0] = 0.0
    stats[3, 0] = gradient
    ranks = torch.eye(5)
    results = []
    for kernel in (torch.ops.hf_lopt_emulated.advance.default, _plain_scheduler.advance):
        counters, means, minimum = torch.tensor([6, 1, 1]), torch.zeros(10), torch.full((10,), 999999999999.0)
        out = []
        for step in range(4):
            inputs = [stats, sums, numel, ranks] if own else []
            out += kernel(
                *([stats], [sums], None, torch.tensor(loss + step), counters, [means, minimum], 100.0, [0.9, 0.999]),
                *(inputs, 2, rows),
            )
            out += [counters.clone(), means.clone(), minimum.clone()]
        results.append(out)
    for got, want in zip(*results, strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6, equal_nan=True)
    assert bool(results[0][0]) == (math.isnan(loss) or gradient > 0)


@pytest.mark.parametrize("units, controls, celo", [(512, 256, False), (64, 1, True), (40, 7, True), (64, 0, True)])
@pytest.mark.parametrize("skip", [False, True])
def test_scheduler(kernels, units, controls, celo, skip):
    generator = torch.Generator().manual_seed(0)
    rows, weights = 4, 159 if controls else 0

    def random(*shape):
        return torch.randn(shape, generator=generator) * 0.3

    mixed, gates, heads, bias = random(rows, 2 * units), random(rows, 4 * units), random(units, controls + 1), None
    bias, bank = random(controls + 1), random(controls, weights)
    hidden, cell = ([random(units) for _ in range(rows)] for _ in range(2))
    results = []
    for library in (torch.ops.hf_lopt_emulated, _plain_scheduler):
        pool, step = (getattr(getattr(library, n), "default", getattr(library, n)) for n in ("pool", "lstm_step"))
        h, c = copy.deepcopy((hidden, cell))
        out = [pool(mixed, h), *step(gates, h, c, heads, bias, bank, celo, torch.tensor(skip)), *h, *c]
        results.append(out)
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    if skip:
        assert torch.equal(results[0][4], hidden[0])


@pytest.mark.parametrize("rows_of_networks", [1, 3])
@pytest.mark.parametrize("constants", [None, (11,), (3, 11)])
def test_fold_network(kernels, rows_of_networks, constants):
    generator = torch.Generator().manual_seed(0)
    sizes = (30 + (11 if constants else 0), 8, 8, 3)
    count = sum((a + 1) * b for a, b in zip(sizes, sizes[1:], strict=False))
    networks = torch.randn(rows_of_networks, count, generator=generator)
    sums = torch.rand(3, 30, generator=generator, dtype=torch.float64) * 10
    lr, decay, factor = (torch.rand(3, generator=generator) for _ in range(3))
    arguments = (
        *(networks, sizes, 2, torch.randn(constants, generator=generator) if constants else None, sums),
        *(torch.tensor([1.0, 20.0, 300.0], dtype=torch.float64), 1e-5, lr, decay, [factor, factor]),
        *(torch.tensor([0.0, 10.0, 0.1]), 0.001, 2),
    )
    got = torch.ops.hf_lopt_emulated.fold_network(*arguments)
    for a, b in zip(got, _plain_scheduler.fold_network(*arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    nothing = torch.empty(0)
    (flat, scale, _) = torch.ops.hf_lopt_emulated.fold_network(
        *(nothing, (), 2, None, nothing, arguments[5], 0.0, lr, decay, [factor], None, 0.5, -1)
    )
    assert flat.shape == (3, 0)
    torch.testing.assert_close(scale, lr * factor * 0.5)


# ---- whole steps --------------------


@pytest.mark.parametrize("row", cases.rows())
def test_reference_trajectories(emulated, row):
    before = emulated.launches
    test_golden.test_follows_the_reference(row, "jax", "cpu")
    assert emulated.launches > before


@pytest.mark.parametrize(
    "rule, orthogonalize, launches", [("celo2", True, 11), ("celo2_base", False, 8), ("celo2_base", True, 13)]
)
def test_celo2_takes_tensors_of_all_ranks_in_one_call(emulated, rule, orthogonalize, launches):
    """The same steps as plain PyTorch makes of each kind by itself."""
    shapes = [(), (7,), (9, 5), (5, 9), (6, 4, 3, 3), (4, 3, 5, 5), (3, 8, 6)]
    ends, calls = [], []
    for plain in (False, True):
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(s, generator=generator) * 0.3) for s in shapes]
        optimizer = hf_lopt.LearnedOptimizer(
            params, rule, weights="bundled", lr=0.01, weight_decay=0.1, orthogonalize=orthogonalize
        )
        before = emulated.launches
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            with _ops.plain() if plain else contextlib.nullcontext():
                optimizer.step()
        calls.append(emulated.launches - before)
        ends.append([*params, torch.tensor(optimizer.metrics()["update_rms"])])
    for got, want in zip(*ends, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert calls == [3 * launches, 0]


@pytest.mark.parametrize("rule", ["celo2", "celo2_base", "small_fc_lopt", "mulo"])
def test_copies_of_a_model_with_networks_of_their_own(emulated, rule):
    before = emulated.launches
    test_meta_particles.test_stacks_of_runs_on_the_plain_kernels(rule)
    launches = emulated.launches - before
    assert launches >= 3 * 7, "a step of all copies is that of one"


@pytest.mark.parametrize("rule", ["velo", "small_fc_lopt"])
def test_a_skipped_step_changes_nothing(emulated, rule):
    settings_ = {"num_training_steps": 10} if rules.get(rule).needs_horizon else {}
    params = [torch.nn.Parameter(torch.randn(5, 9)), torch.nn.Parameter(torch.randn(7))]
    optimizer = hf_lopt.LearnedOptimizer(params, rule, weights="bundled", **settings_)
    for gradient in (1.0, math.nan):
        before = copy.deepcopy(optimizer.state_dict()["state"]), [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.full_like(p, gradient)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step(torch.tensor(1.0))
    state, old = before
    assert all(torch.equal(p, q) for p, q in zip(params, old, strict=True))
    for i, own in optimizer.state_dict()["state"].items():
        for name, value in own.items():
            assert not isinstance(value, torch.Tensor) or torch.equal(value, state[i][name]), name
    assert optimizer.steps_done == 1
