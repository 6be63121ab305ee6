"""The runs whose results are frozen, and how two results are compared.

A run is one rule, one dtype and one layout of its tensors, eight steps long; an :class:`Outcome` is what is kept of
it. Parameters, gradients and losses come from numpy's ``RandomState``, whose stream never changes between versions.

    python frozen_runs.py RESULT    every run with the kernels of this process, as JSON
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import platform
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import hf_lopt


FOLDER = Path(__file__).resolve().parent
EMBEDDED = Path(hf_lopt.__file__).parent / "embedded"
STEPS, HORIZON = 8, 20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Lengths on both sides of what the kernels take at a time: 64 rows, 4096 elements of a row, 32768 of a tensor.
# No rank above 4, which is the most that rnn_mlp takes. Convolutions are (out, in, *kernel); Celo2 orthogonalizes each
# position of a kernel by itself, which takes long for large kernels.
SHAPES = {
    "contiguous": [(), (1,), (37,), (4099,), (33, 17), (17, 33), (9, 4100), (130, 70), (3, 19, 11), (4, 2, 3, 3)],
    "strided": [(1,), (37,), (33, 17), (17, 33), (66, 34), (130, 70), (3, 19, 11), (4, 2, 3, 3)],
    "4-D": [(6, 5, 3, 3), (16, 8, 1, 1), (8, 1, 3, 3), (17, 33, 2, 3), (66, 3, 1, 2), (1, 1, 1, 5)],
    "options": [(), (37,), (33, 17), (17, 33), (66, 34), (3, 19, 11), (4, 2, 3, 3)],
}
# The run "options" leaves the defaults: these settings, dtypes that alternate, and two steps that are skipped. Of a
# rule's settings it takes those that are here; a rule that accumulates makes an update of every second gradient.
OPTIONS = {
    "axis_order": "jax",
    "min_param_scale": 0.1,
    "max_training_steps": HORIZON // 2,
    "step_scale": 0.5,
    "max_grad_norm": 0.5,
    "adam_bias_correction": True,
    "ns_dtype": "bfloat16",
}
INFINITE_GRADIENT, NAN_LOSS = 2, 5
CHANNELS_LAST = 3  # see laid_out
# How far results of another machine may be off, relative to the norm of a tensor. A 16-bit parameter that lies between
# two of its numbers may be rounded to either. Roundings average out in a tensor, but in very small ones each of the
# steps may add one; and where Celo2 orthogonalizes in bfloat16, the step has its accuracy.
TOLERANCE = {torch.float32: 1e-7, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
ROUNDINGS = STEPS * 2.0**-24
BFLOAT16_STEPS = 2e-3


# ---- what is computed -----------------------------------------------------------------------------------------------


def every_run() -> list[tuple[str, str, str]]:
    """(rule, dtype, layout) of every run."""
    runs = [(layout, dtype) for layout in SHAPES for dtype in DTYPES if layout != "options"] + [("options", "mixed")]
    return [(rule, dtype, layout) for rule in hf_lopt.available() for layout, dtype in runs]


def numbers(shape: Sequence[int], *seed: int) -> Tensor:
    """Normally distributed float32 numbers."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32).reshape(shape))


def loss_of(t: int) -> float:
    return 3.0 / (t + 1) + 0.1 * (t % 3)


@functools.cache
def settings_of(rule: str) -> dict[str, Any]:
    """The keywords that the class of a rule takes, with their defaults."""
    settings = hf_lopt.LearnedOptimizer([nn.Parameter(torch.zeros(1))], rule, weights="bundled").defaults
    reference = {"min_param_scale": 0.0} if "min_param_scale" in settings else {}  # by default each tensor has its own
    return {key: value for key, value in settings.items() if isinstance(value, (bool, int, float, str))} | reference


def make(rule: str, params: Sequence[Tensor], **settings: Any) -> hf_lopt.LearnedOptimizer:
    """An optimizer with the weights that 0.1.0 embedded, two learning rates and a weight decay on half of the
    parameters."""
    known = settings_of(rule)
    (weights,) = [*EMBEDDED.glob(f"earlier/{rule}.*.safetensors")] or [EMBEDDED / f"{rule}.safetensors"]
    settings = {"weights": weights} | settings
    settings |= {"num_training_steps": HORIZON} if "num_training_steps" in known else {}
    settings = {key: known[key] for key in ("min_param_scale",) if key in known} | settings
    half, lr = len(params) // 2, known["lr"]
    groups = [{"params": params[:half]}, {"params": params[half:], "lr": 0.7 * lr, "weight_decay": 0.01}]
    return hf_lopt.LearnedOptimizer(groups, rule, **settings)


def laid_out(x: Tensor, kind: int) -> Tensor:
    """The same numbers with other strides: 0 transposed, 1 every second element, 2 a part of something larger, 3 (only
    4-D tensors) channels last. Higher numbers start again; a vector has no transpose and takes 2 for it."""
    kind %= CHANNELS_LAST + 1 if x.dim() == 4 else CHANNELS_LAST
    if kind == 0 and x.dim() >= 2:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == 1:
        return torch.stack([x, x], -1).flatten(-2)[..., ::2]
    if kind == CHANNELS_LAST:
        return x.contiguous(memory_format=torch.channels_last)
    larger = x.new_zeros([n + 3 for n in x.shape])
    return larger[tuple(slice(2, 2 + n) for n in x.shape)].copy_(x)


def run(rule: str, dtype: str, layout: str) -> dict[str, Any]:
    """The outcome of one run with the kernels that are in use."""
    shapes = SHAPES[layout]
    mixed = [tuple(TOLERANCE)[i % len(TOLERANCE)] for i in range(len(shapes))]
    dtypes = [DTYPES[dtype]] * len(shapes) if dtype in DTYPES else mixed

    def place(x: Tensor, i: int) -> Tensor:
        if layout == "strided":
            return laid_out(x, i)
        return laid_out(x, CHANNELS_LAST) if layout == "4-D" and i % 2 else x

    def parameter(i: int) -> nn.Parameter:
        return nn.Parameter(place((0.3 * numbers(shapes[i], 1, i)).to(dtypes[i]), i))

    params = [parameter(i) for i in range(len(shapes))]
    options = layout == "options"
    chosen = {key: value for key, value in OPTIONS.items() if options and key in settings_of(rule)}
    optimizer = make(rule, params, **chosen)
    for t in range(STEPS):
        for i, p in enumerate(params):
            p.grad = place(numbers(p.shape, 2, t, i).to(p.dtype), i + 1)
        if options and t == INFINITE_GRADIENT:
            params[2].grad[-1, -1] = math.inf
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of the skipped steps
            optimizer.step(math.nan if options and t == NAN_LOSS else loss_of(t))
    return outcome(params, optimizer.state_dict())


# ---- what is kept of it ---------------------------------------------------------------------------------------------


def state_tensors(state_dict: Mapping[str, Any]) -> dict[str, list[Tensor]]:
    """Every tensor of a state dict by name, one per parameter, and those of the run behind ``run.``."""
    found: dict[str, list[Tensor]] = {}
    for _, state in sorted(state_dict["state"].items()):
        for key, value in sorted(state.items()):
            found.setdefault(key, []).append(torch.as_tensor(value))
    for key, value in sorted(state_dict["param_groups"][0].items()):
        if isinstance(value, Tensor) or key == "accumulated":
            found[f"run.{key}"] = [torch.as_tensor(value)]
    return dict(sorted(found.items()))


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over names, dtypes, shapes and contents."""
    found = hashlib.sha256()
    for name, x in tensors:
        found.update(f"{name} {x.dtype} {tuple(x.shape)};".encode())
        found.update(x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def summary(tensors: Sequence[Tensor]) -> list[float]:
    """The norm of all elements together, and their product with a fixed vector, from float64."""
    flat = torch.cat([x.detach().double().reshape(-1) for x in tensors])
    fixed = torch.arange(1, flat.numel() + 1, dtype=torch.float64).sin()
    return [float(f"{value:.10g}") for value in (flat.norm().item(), (flat @ fixed).item())]


def outcome(params: Sequence[Tensor], state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Hashes of parameters and state; dtype, number of elements and summary of each parameter; summary of each key of
    the state."""
    states = state_tensors(state_dict)
    return {
        "sha256_params": digest((str(i), p) for i, p in enumerate(params)),
        "sha256_state": digest((key, x) for key, xs in states.items() for x in xs),
        "params": [[str(p.dtype).removeprefix("torch."), p.numel(), *summary([p])] for p in params],
        "state": {key: summary(xs) for key, xs in states.items()},
    }


# ---- how two of them are compared -----------------------------------------------------------------------------------


def machine() -> dict[str, str]:
    """What decides about the last bit besides the code: the processor, torch and the instructions that torch uses."""
    wanted = ("vendor_id", "cpu family", "model", "model name", "stepping")
    found = dict.fromkeys(wanted, "")
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            if key.strip() in found:
                found[key.strip()] = value.strip()
    processor = " ".join(found.values()).strip() or platform.processor()
    return {
        "processor": processor,
        "torch": str(torch.__version__),
        "torch_uses": torch.backends.cpu.get_cpu_capability(),
    }


def exact(recorded_on: Mapping[str, str]) -> bool:
    """Whether every bit has to be as recorded: on the machine of the record. ``HF_LOPT_BEHAVIOUR`` overrules it with
    ``exact`` or ``tolerance``."""
    choice = os.environ.get("HF_LOPT_BEHAVIOUR", "")
    if choice not in ("", "exact", "tolerance"):
        raise ValueError(f"HF_LOPT_BEHAVIOUR must be unset, 'exact' or 'tolerance', got {choice!r}")
    return machine() == recorded_on if not choice else choice == "exact"


def _off(got: Sequence[float], expected: Sequence[float]) -> float:
    """The larger of the two differences, relative to the norm."""
    if list(got) == list(expected):
        return 0.0
    return max(abs(a - b) for a, b in zip(got, expected, strict=True)) / max(expected[0], 1e-30)


def differences(got: Mapping[str, Any], expected: Mapping[str, Any], bitwise: bool, tolerance: float) -> list[str]:
    """What differs in two outcomes, one line each, [] if nothing does. ``tolerance`` is that of float32."""
    found = []
    if got["state"].keys() != expected["state"].keys():
        found.append(f"keys of the state: {sorted(got['state'])} instead of {sorted(expected['state'])}")
    kinds = [[row[:2] for row in x["params"]] for x in (got, expected)]
    if kinds[0] != kinds[1]:
        return [*found, f"dtypes and sizes of the parameters: {kinds[0]} instead of {kinds[1]}"]
    rows = []
    for i, (x, y) in enumerate(zip(got["params"], expected["params"], strict=True)):
        rounding = max(TOLERANCE[getattr(torch, x[0])], ROUNDINGS / math.sqrt(x[1]))
        rows.append((f"parameter {i}", x[2:], y[2:], rounding))
    common = got["state"].keys() & expected["state"].keys()
    rows += [(f"state {key}", got["state"][key], expected["state"][key], 0.0) for key in sorted(common)]
    for name, x, y, rounding in rows:
        off = _off(x, y)
        if not off <= (0.0 if bitwise else max(tolerance, rounding)):
            found.append(f"{name}: {off:.1e} of its norm")
    if bitwise:
        found += [f"{key} differs" for key in ("sha256_params", "sha256_state") if got[key] != expected[key]]
    return found


def main(result: Path) -> None:
    torch.set_num_threads(1)
    result.write_text(json.dumps({name_of(each): run(*each) for each in every_run()}))


def name_of(each: tuple[str, str, str]) -> str:
    """ "velo float32 4-D" and so on: the key of a run in the file."""
    return " ".join(each)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
