"""What the emulator shows of the CUDA kernels beside their numbers: launches, tables, orders of blocks, captures; and
whole steps of the rules against the reference trajectories.

Same tiles, same order of sums, same tables as on a GPU; see docs/kernels.md for what this can and cannot show. The
numbers of each operator are compared in tests/test_kernels.py and tests/test_kernels_small.py.
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from dataclasses import replace

import pytest
import torch

import cases
import hf_lopt
import test_golden
import test_meta_particles
from emulated import compiler, emulator
from hf_lopt import rules
from hf_lopt.kernels import cards, ops
from hf_lopt.kernels.arguments import Assign
from kernel_cases import FAMILIES, Case, case
from kernel_comparisons import equal, outcome
from kernel_samples import samples
from test_kernels import everything


pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler, or HF_LOPT_KERNELS=torch")
# Launches of an operator: one for all tensors.
LAUNCHES = dict.fromkeys((operator.name for operator in ops.OPERATORS), 1) | {"orthogonalize": 0}


@pytest.fixture
def emulated():
    with emulator().everywhere():
        yield emulator()


# ---- launches --------------------


@pytest.mark.parametrize("name", LAUNCHES)
def test_an_operator_is_one_launch(emulated, name):
    arguments = samples()[name]
    before = emulated.launches
    outcome(arguments)
    assert emulated.launches == before + LAUNCHES[name]


def test_so_it_is_for_many_tensors_and_slices(emulated):
    x = case([(7,), (5, 9), (3, 4, 5), (6, 3, 2, 2)] * 20, sliced=True)
    calls = (
        x.sums(),
        x.update_factored(),
        x.feature_sums(),
        x.apply_network(),
        replace(x.descend(), slice_axes=x.slice_axes),
    )
    for arguments in calls:
        before = emulated.launches
        outcome(arguments)
        assert emulated.launches == before + 1


def test_no_launch_without_blocks(emulated):
    """A rank may hold no part of any tensor; a grid of no blocks is an error on a GPU."""
    x = case([(0, 3, 4), (0,)], sliced=True)
    numbers, rates = torch.empty(0, dtype=torch.float64), torch.empty(0)
    specialize = replace(
        samples()["specialize_networks"],
        networks=torch.zeros(1, 11),
        sizes=(2, 2, 1, 1),
        outputs=1,
        constants=None,
        sums=numbers.view(0, 2),
        numel=numbers,
        lr=rates,
        weight_decay=rates,
        factors=[],
        floor=None,
    )
    apply = x.apply_network()
    before = emulated.launches
    sums = ops.feature_sums(x.feature_sums())
    assert sums.shape == (5, sum(x.features.widths())) and not sums.any()
    ops.apply_network(apply)
    ops.descend(x.descend())
    ops.assign(Assign(x.params, x.grads, torch.tensor(False)))
    assert ops.specialize_networks(specialize)[0].shape[0] == 0
    assert emulated.launches == before


# ---- the order of blocks and threads --------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_bits_do_not_depend_on_the_order_of_blocks_and_threads(emulated, family):
    """A missing barrier shows here, and a sum in order of arrival."""
    x = case([(), (7,), (600,), (33, 70), (300, 130), (130, 300), (8, 4, 3, 3)], family, size=0.5)
    results = []
    try:
        for seed in (0, 1, 2):
            emulated.shuffle(seed)
            results.append(everything(x))
    finally:
        emulated.shuffle(0)
    assert all(equal(results[0], other) for other in results[1:])


# ---- tables --------------------


def first_pass(x: Case) -> list[torch.Tensor]:
    return ops.sums(x.sums(moments=False))[0]


def test_tables_are_sent_once(emulated):
    x = case([(5, 9), (7,)])
    results = [first_pass(x)]  # kept, so that the memory of the results moves
    before = emulated.table_copies
    results.append(first_pass(x))
    assert emulated.table_copies == before, "the same tensors need no new table"
    x.grads[1] = x.grads[1].clone()
    results.append(first_pass(x))
    assert emulated.table_copies == before + 1
    assert all(equal(results[0], other) for other in results[1:])


def test_each_model_has_tables_of_its_own(emulated):
    """Blocks count their arrivals in them: graphs of two models of one shape may run at the same time."""
    x = case([(3, 11), (8,)])
    y = copy.deepcopy(x)
    before = emulated.table_copies
    kept = [first_pass(x), first_pass(y), first_pass(x), first_pass(y)]
    assert emulated.table_copies == before + 2 and len(kept) == 4


def test_a_graph_has_tables_of_its_own(emulated):
    """Those that are made while a graph is captured are filled when it is replayed, so no one else may take them."""
    x = case([(6, 10), (8,)])
    with emulated.capture(1):
        before = emulated.table_copies
        first_pass(x)
        first_pass(x)
        assert emulated.table_copies == before + 1
    first_pass(x)
    assert emulated.table_copies == before + 2
    with emulated.capture(2):
        first_pass(x)
    assert emulated.table_copies == before + 2, "a table that is there is good for a graph, too"


def test_memory_of_tables_is_taken_in_large_pieces(emulated):
    """Asking the driver for memory may wait for the device; and torch's memory may belong to a graph."""
    first_pass(case([(2, 3)]))
    before = emulated.allocations
    for rows in range(2, 12):
        first_pass(case([(rows, 10), (8,)]))
    assert emulated.allocations <= before + 2, "of the host and of the device"


def test_places_of_old_tables_are_used_again_when_nothing_is_under_way(emulated):
    kept = [case([(3, 2)]) for _ in range(258)]
    for x in kept:
        first_pass(x)
    # Both are alive at once: the second in the memory of the first would have its table, too.
    first, second = case([(3, 2)]), case([(3, 2)])
    before = emulated.queries, emulated.table_copies
    first_pass(first)
    emulated.let_marks_pass(False)
    try:
        first_pass(second)
    finally:
        emulated.let_marks_pass(True)
    assert (emulated.queries, emulated.table_copies) == (before[0] + 2, before[1] + 2), "the first answer is enough"


def test_a_table_whose_copy_failed_is_copied_again(emulated):
    x = case([(4, 7)])
    want = first_pass(copy.deepcopy(x))
    emulated.let_copies_fail(True)
    try:
        with pytest.raises(RuntimeError, match="a copy that fails"):
            first_pass(x)
    finally:
        emulated.let_copies_fail(False)
    assert equal(first_pass(x), want)


def test_a_launch_is_tried_and_the_build_tells_its_code(emulated):
    before = emulated.launches
    assert torch.ops.hf_lopt_emulated.cuda_launch(-1) == "" and emulated.launches == before + 1
    assert cards.mismatch(torch.ops.hf_lopt_emulated.cuda_build().replace("none", "sm_90"), (9, 0)) == ""


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
            with ops.plain() if plain else contextlib.nullcontext():
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


@pytest.mark.parametrize(
    "rule, state_dtype",
    [("velo", "int8"), ("small_fc_lopt", "bfloat16"), ("celo_adam", "int8"), ("celo2", "int8")],
)
def test_steps_with_state_in_fewer_bits(emulated, rule, state_dtype):
    """Whole steps as plain PyTorch makes them: matrices with codes and without, a convolution, vectors. Numbers beside
    a boundary may be rounded the other way."""
    shapes = [(40, 130), (65, 64), (16, 32, 3, 3), (9, 5), (40,)]
    ends, launches = [], []
    for plain in (False, True):
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter((torch.randn(s, generator=generator) * 0.3).bfloat16()) for s in shapes]
        optimizer = hf_lopt.LearnedOptimizer(
            params,
            rule,
            weights="bundled",
            state_dtype=state_dtype,
            stochastic_rounding=True,
            **({"num_training_steps": 9} if rules.get(rule).needs_horizon else {"lr": 0.01}),
        )
        before = emulated.launches
        with ops.plain() if plain else contextlib.nullcontext():
            for _ in range(3):
                for p in params:
                    p.grad = torch.randn(p.shape, generator=generator).bfloat16()
                optimizer.step(torch.tensor(1.0))
        launches.append(emulated.launches - before)
        ends.append([*params, *(x for values in optimizer.state.values() for x in values.values())])
    for got, want in zip(*ends, strict=True):
        if isinstance(got, torch.Tensor):
            other = (got.float() - want.float()).abs() > 1e-4 * want.float().abs() + 1e-6
            assert other.sum() <= 1 + 2e-3 * other.numel(), (got.dtype, got.shape, other.sum())
    assert launches[0] >= 3 * 6 and launches[1] == 0


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
    assert equal(params, old)
    for i, entries in optimizer.state_dict()["state"].items():
        for name, value in entries.items():
            assert not isinstance(value, torch.Tensor) or torch.equal(value, state[i][name]), name
    assert optimizer.steps_done == 1
