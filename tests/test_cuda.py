"""What only a GPU can show; skipped without one. ``python -m benchmarks.gpu`` runs this file and more."""

from __future__ import annotations

import copy

import pytest
import torch

import hf_lopt
from benchmarks.step import gpt2, random_weights
from hf_lopt import _load, _ops, rules
from kernel_cases import FAMILIES, SHAPES, case
from test_kernels import compare, everything


pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and _load.loaded("cuda")), reason="no GPU, or no CUDA kernels: not run"
)
LARGE = [(130,), (33, 70), (70, 33), (2, 9000), (9000, 2), (4100,), (700, 300), (300, 700)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_follow_the_plain_ones(family, dtype):
    compare(case([*SHAPES, *LARGE], family, dtype, dtype).to("cuda"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", ["torch", "jax", "torch_stacked"])
def test_stacks_of_matrices(family, dtype, order):
    shapes = [*SHAPES, (4, 33, 20), (130, 70, 3, 3), (64, 3, 7, 7), (2, 3, 2, 5, 4), (5, 260, 300)]
    compare(case(shapes, family, dtype, dtype, order=order, sliced=True).to("cuda"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["transposed", "every second", "channels last"])
def test_parameters_of_any_strides(family, layout):
    compare(case([*SHAPES, (40, 33)], family, layout=layout).to("cuda"))


@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-20, 1e-10, 0.05, 900.0, 1e4, 1e10, 1e20])
@pytest.mark.parametrize("family", FAMILIES)
def test_extreme_gradients(family, size):
    compare(case([(), (7,), (5, 9), (33, 70)], family, size=size).to("cuda"))


@pytest.mark.parametrize("family", FAMILIES)
def test_results_are_the_same_bit_by_bit(family):
    x = case([*SHAPES, *LARGE], family, size=0.5).to("cuda")
    first = everything(x)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, everything(x), strict=True))


def optimizer_and_params(rule: str, shapes, dtype=torch.float32, **settings):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter((torch.randn(s, generator=generator) * 0.02).to("cuda", dtype)) for s in shapes]
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * 1e-3).to("cuda", dtype)
    if rules.get(rule).needs_horizon:
        settings["num_training_steps"] = 1000
    return hf_lopt.LearnedOptimizer(params, rule, weights=random_weights(rules.get(rule)), **settings), params


RULES = ("velo", "celo", "celo_adam", "small_fc_lopt", "mulo", "celo2_base")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", [*RULES, "celo2", "elo_celo2"])
def test_a_captured_step_is_the_eager_step(rule, dtype):
    shapes = [*SHAPES, *LARGE]
    (eager, eager_params), (captured, params) = (optimizer_and_params(rule, shapes, dtype) for _ in range(2))
    loss = torch.tensor(2.0, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            captured.step(loss)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step(loss)
    for i in range(8):
        loss.fill_(2.0 - 0.1 * i if i >= 3 else 2.0)
        eager.step(loss)
        if i >= 3:
            graph.replay()
    assert captured.steps_done == eager.steps_done == 8
    # The library may take another way through its matrix products.
    same = torch.equal if rule in RULES else torch.allclose
    for p, q in zip(params, eager_params, strict=True):
        assert same(p, q)


@pytest.mark.parametrize("rule", RULES)
def test_launches_and_waits_by_the_profiler(rule):
    optimizer, _ = optimizer_and_params(rule, gpt2(64, 4, 1000))
    loss = torch.tensor(1.0, device="cuda")
    for _ in range(3):
        optimizer.step(loss)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        optimizer.step(loss)
    names = [event.name for event in profile.events()]
    launches = [n for n in names if n.startswith(("cudaLaunch", "cuLaunch"))]
    waits = [n for n in names if "Synchronize" in n]
    # The profiler itself waits once, at its end.
    assert len(launches) <= 12 and len(waits) <= 1, (launches, waits)


@pytest.mark.parametrize("rule", [*RULES, "celo2", "elo_celo2"])
def test_no_call_waits_for_the_device(rule):
    optimizer, _ = optimizer_and_params(rule, SHAPES)
    loss = torch.tensor(1.0, device="cuda")
    for _ in range(2):
        optimizer.step(loss)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step(loss)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_on_another_stream_and_device_guard():
    optimizer, params = optimizer_and_params("velo", SHAPES)
    other, other_params = optimizer_and_params("velo", SHAPES)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            other.step(1.0)
    for _ in range(3):
        optimizer.step(1.0)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(p, q) for p, q in zip(params, other_params, strict=True))


def test_more_than_four_billion_bytes():
    """64-bit offsets: the last rows of a tensor of 2^31 + elements are updated like the first."""
    if torch.cuda.get_device_properties(0).total_memory < 100e9:
        pytest.skip("needs 100 GB of device memory")
    p = torch.nn.Parameter(torch.zeros(2**21 + 64, 1024, device="cuda", dtype=torch.bfloat16))
    p.grad = torch.full_like(p, 1e-3)
    optimizer = hf_lopt.SmallFC([p], weights="bundled", lr=1e3)
    optimizer.step()
    assert torch.equal(p[0], p[-1]) and p[-1].abs().max() > 0


def test_plain_kernels_can_be_asked_for():
    x = case([(33, 70)]).to("cuda")
    y = copy.deepcopy(x)
    with _ops.plain():
        want = y.first_pass(True)[2]
    torch.testing.assert_close(x.first_pass(True)[2], want, rtol=1e-5, atol=1e-5)
