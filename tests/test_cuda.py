"""Whole steps on a GPU: captures, streams, launches and waits; skipped without one.

The operators are compared in tests/test_kernels.py and tests/test_kernels_small.py, in the rows of the backend "cuda".
``python -m benchmarks.gpu`` runs these, this file and more.
"""

from __future__ import annotations

import pytest
import torch

import hf_lopt
from benchmarks.step import gpt2, random_weights
from hf_lopt import rules
from hf_lopt.kernels import dispatch
from kernel_cases import SHAPES
from kernel_comparisons import equal


pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and dispatch.loaded("cuda")), reason="no GPU, or no CUDA kernels: not run"
)
LARGE = [(130,), (33, 70), (70, 33), (2, 9000), (9000, 2), (4100,), (700, 300), (300, 700)]


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
@pytest.mark.parametrize("rule", [*RULES, "celo2", "elo_celo2", "velo:bfloat16", "celo_adam:int8", "celo2_base:int8"])
def test_a_captured_step_is_the_eager_step(rule, dtype):
    shapes = [*SHAPES, *LARGE]
    rule, _, kind = rule.partition(":")
    made = (optimizer_and_params(rule, shapes, dtype, state_dtype=kind or "float32") for _ in range(2))
    (eager, eager_params), (captured, params) = made
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
    assert equal(params, other_params)


def test_more_than_four_billion_bytes():
    """64-bit offsets: the last rows of a tensor of 2^31 + elements are updated like the first."""
    if torch.cuda.get_device_properties(0).total_memory < 100e9:
        pytest.skip("needs 100 GB of device memory")
    p = torch.nn.Parameter(torch.zeros(2**21 + 64, 1024, device="cuda", dtype=torch.bfloat16))
    p.grad = torch.full_like(p, 1e-3)
    optimizer = hf_lopt.SmallFC([p], weights="bundled", lr=1e3)
    optimizer.step()
    assert torch.equal(p[0], p[-1]) and p[-1].abs().max() > 0
