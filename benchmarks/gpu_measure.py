"""What ``python -m benchmarks.gpu`` measures in its own process: bandwidth, kernels, steps, launches, training."""

from __future__ import annotations

import collections
import functools
import math
import re
import statistics
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.host import SETS as HOST_SETS
from benchmarks.step import build, gpt2
from hf_lopt import rules


SIZES = {"124M": gpt2(768, 12, 50_257), "355M": gpt2(1024, 24, 50_257), "1.3B": gpt2(2048, 24, 50_257)}
# Stands for all of them in a rehearsal.
TINY = gpt2(8, 1, 16, context=4)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Bytes of the floor per parameter where there are three passes: gradient three times, parameter read twice and written
# once, the state likewise.
FLOOR = {"fp32": 72, "bf16": 60}
STATE_KINDS = ("bfloat16", "int8")
THREE_PASSES = ("velo", "small_fc_lopt", "small_fc_lopt:tf32")
SMALL_SHAPES = [(), (7,), (600,), (33, 70), (300, 130), (130, 300), (8, 4, 3, 3), (6, 3, 7, 7), (3, 20, 36)]


def parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: str) -> list[torch.nn.Parameter]:
    generator = torch.Generator(device=device).manual_seed(0)
    params = []
    for s in shapes:
        p = torch.nn.Parameter((torch.randn(s, generator=generator, device=device) * 0.02).to(dtype))
        p.grad = (torch.randn(s, generator=generator, device=device) * 1e-3).to(dtype)
        params.append(p)
    return params


def optimizer_of(name: str, params: list[torch.nn.Parameter]) -> Any:
    """Of a rule; of a rule and what its products are computed in, or how its state is stored."""
    rule, _, kind = name.partition(":")
    if kind in STATE_KINDS:
        return build(rule, params, state_dtype=kind)
    optimizer = build(rule, params)
    for group in optimizer.param_groups if kind else ():
        group["ns_dtype" if "ns_dtype" in group else "precision"] = kind
    return optimizer


def small_steps(device: str) -> None:
    """A few steps of every rule on small tensors of all kinds: what compute-sanitizer looks at."""
    names = [name for name in rules.names() if name != "rnn_mlp"]  # which has no kernels
    of_each_kind = ("velo", "celo_adam", "celo2_base", "small_fc_lopt")
    names += ["small_fc_lopt:tf32", *(f"{name}:{kind}" for name in of_each_kind for kind in STATE_KINDS)]
    for name in names:
        for dtype in DTYPES.values():
            params = parameters(SMALL_SHAPES, dtype, device)
            optimizer = optimizer_of(name, params)
            for _ in range(2):
                optimizer.step(torch.tensor(1.0, device=device))
            assert all(p.isfinite().all() for p in params), name
    synchronize(device)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(step: Callable[[], Any], count: int, device: str) -> float:
    """Time of the device for a step, over ``count`` of them."""
    if device != "cuda":
        start = time.perf_counter()
        for _ in range(count):
            step()
        return 1e3 * (time.perf_counter() - start) / count
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / count


def profile_of(step: Callable[[], Any], count: int, device: str) -> Any:
    """The profile of so many steps, after the device has done all others."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else []
    synchronize(device)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(count):
            step()
        synchronize(device)
    return profile


def on_device(profile: Any) -> list[tuple[str, float]]:
    """Kernels and copies: name and milliseconds. Not the optimizer's annotation, whose time is that of all of them."""
    cuda = torch.autograd.DeviceType.CUDA
    found = [(e.name, e.device_time / 1e3) for e in profile.events() if e.device_type == cuda]
    return [(name, ms) for name, ms in found if not name.startswith("Optimizer.")]


def is_ours(kernel: str) -> bool:
    return "hf_lopt" in kernel


def short_name(kernel: str) -> str:
    """Without namespaces and arguments."""
    if found := is_ours(kernel) and re.search(r"::(\w+)(<[^(]*>)?\(", kernel):
        return found[1]
    return kernel.removeprefix("void ").split("(")[0].split("::")[-1][:44]


def count_calls(step: Callable[[], Any], device: str) -> dict[str, Any]:
    """Launches, copies and waits of one step, by the profiler, and its own kernels by name."""
    profile = profile_of(step, 1, device)
    names = [event.name for event in profile.events()]
    ours = collections.Counter(short_name(name) for name, _ in on_device(profile) if is_ours(name))
    waits = sum("Synchronize" in n for n in names)
    return {
        "launches": sum(n.startswith(("cudaLaunch", "cuLaunch")) for n in names),
        "own_launches": sum(ours.values()),
        "copies": sum(n.startswith("cudaMemcpy") for n in names),
        # Without those of this function and of the profiler.
        "waits": max(waits - 2, 0),
        "kernels": dict(ours),
    }


def copy_bandwidth(device: str) -> float:
    """GB/s that a copy of a large tensor reads and writes: what a pass over memory can reach here."""
    numbers = 1 << 30 if device == "cuda" else 1 << 16
    x = torch.zeros(numbers, dtype=torch.float32, device=device)
    y = torch.empty_like(x)
    milliseconds(lambda: y.copy_(x), 3, device)
    return 8 * numbers / milliseconds(lambda: y.copy_(x), 10, device) / 1e6


def kernels(rule: str, size: str, dtype: str, device: str, bandwidth: float | None) -> dict[str, Any]:
    """One row of the table of kernels: where the device's time of a step goes, and the host's time."""
    shapes = SIZES[size] if device == "cuda" else TINY
    optimizer = optimizer_of(rule, parameters(shapes, DTYPES[dtype], device))
    loss = torch.tensor(2.0, device=device)
    for _ in range(3):
        optimizer.step(loss)
    synchronize(device)
    start = time.perf_counter()
    optimizer.step(loss)
    host = 1e3 * (time.perf_counter() - start)
    spent: collections.Counter[str] = collections.Counter()
    for name, ms in on_device(profile_of(lambda: optimizer.step(loss), 3, device)):
        spent[short_name(name)] += ms / 3
    row: dict[str, Any] = {"host_ms": host, "device_ms": sum(spent.values()), "kernels_ms": dict(spent.most_common(8))}
    # Bytes per parameter that a pass must move.
    passes = {"sums": (4, 2), "feature_sums": (24, 20), "apply": (44, 38)}
    numel = sum(math.prod(s) for s in shapes)
    for kernel, ms in row["kernels_ms"].items():
        own = next((b for name, b in passes.items() if kernel.startswith(name)), None)
        if own and bandwidth and rule in THREE_PASSES:
            share = own[dtype == "bf16"] * numel / ms / 1e6 / bandwidth
            row.setdefault("share_of_copy", {})[kernel] = share
    return row


def replay_of(step: Callable[[], Any]) -> Callable[[], Any]:
    """The step as a graph that can be replayed; there must have been usual steps before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def measure(
    rule: str, size: str, dtype: str, seconds: float, device: str, bandwidth: float | None = None
) -> dict[str, Any]:
    """One row of the table of times, in about ``seconds``; ``bandwidth``: of a copy, GB/s."""
    shapes = SIZES[size] if device == "cuda" else TINY
    numel = sum(math.prod(s) for s in shapes)
    optimizer = optimizer_of(rule, parameters(shapes, DTYPES[dtype], device))
    loss = torch.tensor(2.0, device=device)
    adamw = torch.optim.AdamW(parameters(shapes, DTYPES[dtype], device), fused=True)

    def step() -> None:
        optimizer.step(loss)

    for _ in range(3):
        step()
        adamw.step()
    synchronize(device)
    once = milliseconds(step, 1, device) + milliseconds(adamw.step, 1, device)
    steps = min(max(int(1e3 * seconds / once), 3), 150)
    per_round = min(10, max(1, steps // 15))
    pairs = [
        (milliseconds(step, per_round, device), milliseconds(adamw.step, per_round, device))
        for _ in range(max(3, steps // per_round))
    ]
    ours, theirs = (statistics.median(x) for x in zip(*pairs, strict=True))
    row = {"elements": numel, "step_ms": ours, "adamw_ms": theirs, "ratio": ours / theirs}
    row["step_ms_quartiles"] = statistics.quantiles([x for x, _ in pairs])[::2]
    if rule in THREE_PASSES:
        row["gb_per_s"] = FLOOR[dtype] * numel / ours / 1e6
        if bandwidth:
            row["share_of_copy"] = row["gb_per_s"] / bandwidth
    row |= {key: x for key, x in count_calls(step, device).items() if key != "kernels"}  # see `count_launches`
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        row["peak_extra_bytes"] = (torch.cuda.max_memory_allocated() - before) / numel
        row |= attempt(time_of_graph, step, per_round)
    return row


def time_of_graph(step: Callable[[], Any], per_round: int) -> dict[str, Any]:
    replay = replay_of(step)
    return {"graph_ms": statistics.median(milliseconds(replay, per_round, "cuda") for _ in range(5))}


def count_launches(rule: str, layers: int, device: str) -> dict[str, Any]:
    """One row of the table of launches: a GPT-2 of so many layers."""
    shapes = gpt2(64 if device == "cuda" else 8, layers, 1000 if device == "cuda" else 16, context=4)
    optimizer = optimizer_of(rule, parameters(shapes, torch.float32, device))
    loss = torch.tensor(1.0, device=device)
    for _ in range(3):
        optimizer.step(loss)
    return {"tensors": len(shapes), **count_calls(lambda: optimizer.step(loss), device)}


def host(rule: str, tensors: str, device: str) -> dict[str, Any]:
    """One row of the table of the host: milliseconds until a step over small tensors has been asked for, the device
    being idle before, and those of AdamW, in turns."""
    shapes = HOST_SETS[tensors] if device == "cuda" else TINY
    ours, theirs = parameters(shapes, torch.float32, device), parameters(shapes, torch.float32, device)
    optimizer, loss = optimizer_of(rule, ours), torch.tensor(1.0, device=device)
    steps = (
        functools.partial(optimizer.step, loss),
        torch.optim.AdamW(theirs, foreach=True).step,
        torch.optim.AdamW(theirs, fused=True).step,
    )
    times: list[list[float]] = [[], [], []]
    for _ in range(35):
        for step, spent in zip(steps, times, strict=True):
            synchronize(device)
            start = time.perf_counter()
            step()
            spent.append(1e3 * (time.perf_counter() - start))
    step_ms, foreach, fused = (statistics.median(spent[5:]) for spent in times)
    return {"step_ms": step_ms, "foreach_ms": foreach, "fused_ms": fused, "ratio": step_ms / foreach}


def training(name: str, seconds: float, device: str) -> dict[str, Any]:
    """Tokens per second of training a GPT-2 of 124M parameters in bfloat16 on random tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    small = {} if device == "cuda" else {"n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": 16, "n_positions": 8}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**small)).to(device, torch.bfloat16)
    batch, length = (8, 1024) if device == "cuda" else (2, 8)
    tokens = torch.randint(model.config.vocab_size, (batch, length), device=device)
    params = list(model.parameters())
    adamw = name == "adamw"
    optimizer = torch.optim.AdamW(params, lr=1e-4, fused=True) if adamw else build(name, params)

    def step() -> None:
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step() if adamw else optimizer.step(loss.detach())
        optimizer.zero_grad()

    for _ in range(3):
        step()
    synchronize(device)
    steps = max(int(1e3 * seconds / milliseconds(step, 2, device)), 3)
    ms = statistics.median(milliseconds(step, max(steps // 5, 1), device) for _ in range(5))
    return {"step_ms": ms, "tokens_per_s": 1e3 * batch * length / ms}


def attempt(function: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """What it returns, or how it failed."""
    try:
        return function(*args)
    except Exception as error:  # whatever it is: the others are to run
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"[:500]}
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
