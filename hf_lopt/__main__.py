"""``python -m hf_lopt``: what this installation offers, for a bug report; ``--groups``: what a model's tensors are;
``--memory``: what training takes."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator, Sequence

import torch

import hf_lopt
from hf_lopt import rules, weights
from hf_lopt.hf import groups_table, memory
from hf_lopt.kernels import dispatch, ops


_PACKAGES = ("transformers", "accelerate", "huggingface_hub", "safetensors", "peft", "trl", "numpy")
_VARIABLES = (
    "HF_LOPT_AUTOLOAD",
    "HF_HUB_OFFLINE",
    "HF_HOME",
    "HF_ENDPOINT",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _kernels(device_key: str) -> str:
    """Which operators have a kernel of their own for a device; the others run as plain PyTorch."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    fused = [
        name for name in (operator.name for operator in ops.OPERATORS) if has_kernel(f"hf_lopt::{name}", device_key)
    ]
    return f"fused: {', '.join(fused)}" if fused else "plain PyTorch"


def _devices() -> Iterator[str]:
    yield f"cpu, {torch.get_num_threads()} threads"
    for i in range(torch.cuda.device_count()):
        yield f"cuda:{i} {torch.cuda.get_device_name(i)}"


def _weights(rule: str) -> Iterator[tuple[str, str]]:
    found = weights.find(rule)
    for each in found:
        yield f"{rule} {each.origin}", f"{each.source}  sha256 {each.sha256}"
    if not found:
        yield rule, "none here; published weights are looked for on the hub when they are asked for"


def report() -> list[tuple[str, list[tuple[str, str]]]]:
    """Sections of (label, value) rows. Reads this machine only, never the network."""
    packages = [(name, _version(name)) for name in _PACKAGES]
    return [
        ("versions", [("hf_lopt", hf_lopt.__version__), ("torch", torch.__version__), *packages]),
        ("optimizers", [(f"optim={name!r}", rules.get(name).summary) for name in hf_lopt.available()]),
        ("weights", [row for name in hf_lopt.available() for row in _weights(name)]),
        ("kernels", [("cpu", _kernels("CPU")), ("cuda", _kernels("CUDA")), *dispatch.missing().items()]),
        (
            "environment",
            [
                ("python", f"{platform.python_version()} on {platform.platform()}"),
                *(("device", device) for device in _devices()),
                *((name, os.environ[name]) for name in _VARIABLES if name in os.environ),
            ],
        ),
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hf_lopt",
        description="Say what this installation offers, what a model's tensors are, or what memory training takes.",
    )
    parser.add_argument(
        "--groups",
        metavar="MODEL",
        help="print every tensor of a model with its branch, axis order, floor and scale; a hub id, or a folder "
        "with a config.json. No weights are loaded",
    )
    parser.add_argument(
        "--memory",
        metavar="MODEL",
        help="print bytes of parameters, gradients and state for every optimizer and state_dtype, likewise",
    )
    parser.add_argument(
        "--rule",
        "--optim",
        choices=hf_lopt.available(),
        help="optimizer of --groups (default: celo2), or the only one of --memory (default: all)",
    )
    parser.add_argument(
        "--optim_args", help="as in TrainingArguments, of --groups: base_width=256, or branch:PATTERN=adam"
    )
    parser.add_argument("--ranks", type=int, default=1, help="ranks that share the model of --memory (default: 1)")
    return parser


def main(argv: Sequence[str] = ()) -> None:
    """Print the report, or with ``--groups`` or ``--memory`` in ``argv`` the table of a model."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.ranks < 1:
        parser.error(f"--ranks must be at least 1, got {args.ranks}")
    if args.groups or args.memory:
        try:
            if args.groups:
                text = groups_table.report(args.groups, args.rule or "celo2", args.optim_args)
            else:
                text = memory.report(args.memory, args.rule, args.ranks)
            sys.stdout.write(f"{text}\n")
        except ValueError as error:
            parser.exit(1, f"{parser.prog}: {error}\n")
        return
    for title, rows in report():
        sys.stdout.write(f"{title}\n")
        width = max(len(label) for label, _ in rows)
        for label, value in rows:
            sys.stdout.write(f"  {label:<{width}}  {value}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
