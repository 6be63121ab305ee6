"""Whether the CUDA kernels run on a card: found out at its first use, by a comparison and one launch.

A library holds code for some architectures, and PTX that a driver translates for newer ones; and a driver serves CUDA
up to a version. A card that is too old, or a driver that is, would raise in the middle of a step. It is told once
instead, and the step runs in plain PyTorch.
"""

from __future__ import annotations

import re

import torch

from hf_lopt import notices


# Of each card by its number.
_runs: dict[int, bool] = {}


def runs(device: torch.device) -> bool:
    """Whether the kernels run on a card. Warns once, of the first one on which they do not."""
    index = -1 if device.index is None else device.index
    known = _runs.get(index)
    if known is None:
        problem = find_problem(index)
        known = not problem
        if problem and all(_runs.values()):
            notices.warn(
                f"the CUDA kernels of hf_lopt do not run on {problem}. Learned optimizers run in plain PyTorch there, "
                "many times slower. HF_LOPT_KERNELS=torch in the environment silences this warning."
            )
        _runs[index] = known
    return known


def find_problem(index: int) -> str:
    """Which card it is and why kernels do not run on it; empty where they do, or where there is no card at all, so
    that the tensors are fake."""
    if not torch.cuda.is_available():
        return ""
    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    build = torch.ops.hf_lopt.cuda_build()
    reason = mismatch(build, capability) or torch.ops.hf_lopt.cuda_launch(index)
    return f"{name} (compute capability {capability[0]}.{capability[1]}): {reason}" if reason else ""


def mismatch(build: str, capability: tuple[int, int]) -> str:
    """Why a build cannot run on a card, as far as numbers tell; ``build``: "CUDA 13.0, driver 13.0, code sm_80 ...".

    Code for an architecture runs on those of the same major version that are not older, PTX on all that are not older.
    A driver serves its own major version of CUDA and older ones.
    """
    found = re.fullmatch(r"CUDA (\d+)\.(\d+), driver (\d+)\.(\d+), code (.*)", build)
    assert found, build
    built, driver = found[1], found[3]
    if int(driver) < int(built):
        return (
            f"the driver serves CUDA {driver}.{found[4]}, and the kernels are built with CUDA {built}.{found[2]}. "
            f"Update the driver, or build hf_lopt with a toolkit of CUDA {driver}"
        )
    card = 10 * capability[0] + capability[1]
    codes = [(kind, int(number)) for kind, number in re.findall(r"(sm|compute)_(\d+)", found[5])]
    if any(number <= card and (kind == "compute" or number // 10 == capability[0]) for kind, number in codes):
        return ""
    oldest = min(number for _, number in codes)
    return (
        f"they are built for {found[5]}, compute capability {oldest // 10}.{oldest % 10} and newer; from 8.0 on "
        "hf_lopt can be built for others, which HF_LOPT_CUDA_ARCHS names"
    )
