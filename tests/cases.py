"""One row per rule and reference file. A test of every rule takes its rows from here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import golden


@dataclass(frozen=True)
class Case:
    """A reference trajectory and the optimizer that has to follow it.

    Tolerances are relative to the largest parameter of a tensor: |p - p_ref| <= first * max|p_ref| after step 1 and
    <= last * max|p_ref| after the last step. The float32 reference itself is 2e-7 to 6e-7 away from float64 by then.
    """

    file: str
    rule: str
    settings: dict[str, Any] = field(default_factory=dict)
    per_tensor: dict[str, Any] = field(default_factory=dict)  # setting -> {tensor: value}, or a key of the file
    first: float = 1e-6
    last: float = 5e-6

    def of_tensor(self, name: str, reference: golden.Golden) -> dict[str, Any]:
        """Settings that the tensor ``name`` has for itself."""
        found = {}
        for setting, values in self.per_tensor.items():
            if isinstance(values, str):
                found[setting] = float(reference.raw[f"{values}/{name}"])
            elif name in values:
                found[setting] = values[name]
        return found

    @property
    def marks(self) -> list[pytest.MarkDecorator]:
        reason = f"{self.file} holds published weights, which are not part of the repository"
        return [pytest.mark.skipif(golden.find(self.file) is None, reason=reason)]


REFERENCE = {"min_param_scale": 0.0}  # without floors of our own
CASES = (
    Case("velo.npz", "velo", REFERENCE),
    Case("velo_s.npz", "velo", {"bank_scale": 1.0, **REFERENCE}),
    Case("velo_s_ties.npz", "velo", {"bank_scale": 1.0, **REFERENCE}),
    Case("small_fc_lopt.npz", "small_fc_lopt"),
    Case("mulo.npz", "mulo", per_tensor={"step_scale": "mup_lr"}, last=2e-5),
    Case("celo.npz", "celo", REFERENCE),
    Case("celo_synth.npz", "celo", REFERENCE),
    Case("celo_adam.npz", "celo_adam"),
    Case("celo_adam_synth.npz", "celo_adam"),
    Case("celo2_base.npz", "celo2_base", {"weight_decay": 0.01}),
    Case("celo2.npz", "celo2", {"weight_decay": 0.01}, per_tensor={"branch": {"h_row16": "adam"}}),
    Case("rnn_mlp.npz", "rnn_mlp"),
)
# Tensors whose reference starts at zero are compared in absolute terms.
ABSOLUTE = {"h_row16": 5e-5}


def rows(cases: tuple[Case, ...] = CASES) -> list:
    return [pytest.param(case, id=case.file.removesuffix(".npz"), marks=case.marks) for case in cases]


def devices() -> list:
    """Devices that a test runs on: the GPU where there is one."""
    gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine: not run")
    return ["cpu", pytest.param("cuda", marks=gpu)]
