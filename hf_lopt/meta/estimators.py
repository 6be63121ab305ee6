"""Gradients of a meta-loss by evolution strategies, over whole runs or over truncations of them.

A run is unrolled for K steps at a time (a truncation). Pairs of particles run side by side with weights theta + e and
theta - e, on the same data from the same start; e ~ N(0, s² I) is new in every truncation. With L+ and L- their
meta-losses of the truncation, N pairs, and the accumulated perturbation

    x = sum of e over the truncations since the pair's run began,

the estimates are

    PES             1/N sum_i  x_i (L+_i - L-_i) / (2 s²)         unbiased up to O(s²), for the sum over truncations
    truncated ES    1/N sum_i  e_i (L+_i - L-_i) / (2 s²)         blind to what earlier perturbations did to the state

A truncation of the length of the run makes both the same, full-length ES. Vicol, Metz & Sohl-Dickstein 2021, "Unbiased
Gradient Estimation in Unrolled Computation Graphs with Persistent Evolution Strategies", algorithm 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


ESTIMATORS = ("pes", "truncated_es")


class Runs(Protocol):
    """What is unrolled: 2 N particles, pair i at the places i and N + i."""

    pairs: int

    def ended(self) -> Sequence[int]:
        """Pairs whose run is over, or has not begun: :meth:`unroll` begins a new one, the same for both particles."""

    def unroll(self, vectors: Tensor) -> Tensor:
        """One truncation with the weights ``vectors`` (2 N, D), on the CPU; its meta-losses (2 N,), finite."""


class Estimator:
    """Gradient estimates from one set of runs, one truncation at a time.

    Args:
        runs: what is unrolled.
        size: D, the number of weights.
        std: s, the standard deviation of a perturbation.
        generator: draws the perturbations, on the CPU.
        name: "pes" or "truncated_es".
        clip: bound on L+ - L-; inf for none. A bound trades bias for variance.
    """

    def __init__(
        self,
        runs: Runs,
        size: int,
        std: float,
        generator: torch.Generator,
        name: str = "pes",
        clip: float = float("inf"),
    ):
        if name not in ESTIMATORS:
            raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {name!r}")
        if not std > 0:
            raise ValueError(f"std must be positive, got {std}")
        self.runs, self.std, self.generator, self.clip = runs, std, generator, clip
        self.accumulated = torch.zeros(runs.pairs, size, dtype=torch.float32)
        self._persistent = name == "pes"

    def gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """An estimate (D,) at ``theta`` (D,), on the CPU, and the meta-losses of the truncation (2 N,)."""
        over = list(self.runs.ended())
        if over:
            self.accumulated[over] = 0.0
        noise = torch.randn(self.accumulated.shape, generator=self.generator, dtype=torch.float32) * self.std
        self.accumulated = self.accumulated + noise if self._persistent else noise
        losses = self.runs.unroll(torch.cat([theta + noise, theta - noise])).cpu()
        plus, minus = losses.chunk(2)
        difference = (plus - minus).clamp(-self.clip, self.clip)
        difference = difference.to(self.accumulated.dtype)
        return difference @ self.accumulated / (2.0 * self.std**2 * self.runs.pairs), losses

    def state_dict(self) -> dict[str, Any]:
        return {"accumulated": self.accumulated, "generator": self.generator.get_state()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.accumulated = saved["accumulated"].clone()
        self.generator.set_state(saved["generator"].cpu())
