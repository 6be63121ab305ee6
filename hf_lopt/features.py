"""What the networks of the learned optimizers see: one row per feature, the feature lists of the rules, constants.

A leaf: it imports nothing of the package. The plain kernels evaluate the formulas, the step takes decays and columns
from the lists, and docs/features.md is written from both. The compiled kernels have the same formulas in
``csrc/features.h``, and a test compares the two tables.

Per element: :class:`ElementFeatures`. Per tensor and per run, the inputs of the schedulers: the constants at the end;
:mod:`hf_lopt.kernels.reference.scheduler` forms them. Axes: T tensors, D decays, F feature columns.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any


# ---- constants of the formulas --------------------------------------------------------------------------------------

FACTORED_EPS = 1e-30  # added to g² before it enters a factored accumulator, so that a row of zeros has a finite root
FACTOR_EPS = 1e-9  # under the roots of the row and column factors, and their lower bound
VECTOR_EPS = 1e-8  # under the root of a row or column accumulator
SMALL_CLIP = 0.1  # bound of the feature clip_g
CLIP_GRADIENT = 1000.0  # bound on a gradient before anything else, in the rules that have one


@dataclass(frozen=True)
class Decays:
    """The decays of a rule's accumulators; () where the rule has none of a kind."""

    momentum: tuple[float, ...] = (0.9, 0.99, 0.999)
    second_moment: tuple[float, ...] = (0.999,)
    factored: tuple[float, ...] = (0.9, 0.99, 0.999)


# ---- one row per feature --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Feature:
    """One per-element feature.

    Attributes:
        name: as in the feature lists and in the operators' arguments.
        decays: the kind of accumulator whose decays it has a column for each of, a field of `Decays`; "": one column.
        formula: its value from an object with ``g`` (n,), ``p`` (n,), ``m`` (D, n), ``v`` (D, n), ``rsqrt_v`` (D, n),
            ``row``, ``col``, ``row_factor``, ``col_factor`` (D, …) that broadcast over the tensor. g is the gradient
            after the rule's clip; accumulators are those after the update.
        text: the formula in words of mathematics, for the documentation.
        constant_along: "row" or "col" where it depends on that factored accumulator alone: in a tensor of rank >= 2
            it is constant along the axis which that accumulator averages over.
        vector_formula: what takes the place of ``formula`` for a tensor of rank < 2 where the two differ, with
            ``diagonal`` (D, n) and ``diagonal_eps``. ``row`` and ``col`` are both the diagonal accumulator there.
        vector_text: the same for the documentation.
    """

    name: str
    decays: str
    formula: Callable[[Any], Any]
    text: str
    constant_along: str = ""
    vector_formula: Callable[[Any], Any] | None = None
    vector_text: str = ""

    def columns(self, momentum: int = 3, second_moment: int = 1, factored: int = 3) -> int:
        """Number of columns for these numbers of decays."""
        return {"": 1, "momentum": momentum, "second_moment": second_moment, "factored": factored}[self.decays]


FEATURES: dict[str, Feature] = {
    row.name: row
    for row in (
        Feature("g", "", lambda x: x.g, "g"),
        Feature("clip_g", "", lambda x: x.g.clamp(-SMALL_CLIP, SMALL_CLIP), "clip(g, -0.1, 0.1)"),
        Feature("p", "", lambda x: x.p, "p"),
        Feature("log_abs_p", "", lambda x: (x.p.abs() + 1e-8).log(), "log(|p| + 1e-8)"),
        Feature("m", "momentum", lambda x: x.m, "m"),
        Feature("v", "second_moment", lambda x: x.v, "v"),
        Feature("m_rsqrt_v", "momentum", lambda x: x.m * x.rsqrt_v, "m / sqrt(v + second_eps)"),
        Feature("rsqrt_v", "second_moment", lambda x: x.rsqrt_v, "1 / sqrt(v + second_eps)"),
        Feature("g_rsqrt_v", "second_moment", lambda x: x.g * x.rsqrt_v, "g / sqrt(v + second_eps)"),
        Feature(
            "fac_g",
            "factored",
            lambda x: x.g * x.row_factor * x.col_factor,
            "g r c",
            vector_formula=lambda x: x.g * (x.diagonal + FACTOR_EPS).clamp_min(FACTOR_EPS).rsqrt(),
            vector_text="g / sqrt(max(D + 1e-9, 1e-9))",
        ),
        Feature(
            "fac_m",
            "momentum",
            lambda x: x.m * x.row_factor * x.col_factor,
            "m r c",
            vector_formula=lambda x: x.m * (x.diagonal + x.diagonal_eps).rsqrt(),
            vector_text="m / sqrt(D + diagonal_eps)",
        ),
        Feature("row", "factored", lambda x: x.row, "R", "row", vector_text="D"),
        Feature("col", "factored", lambda x: x.col, "C", "col", vector_text="D"),
        Feature(
            "rsqrt_row",
            "factored",
            lambda x: (x.row + VECTOR_EPS).rsqrt(),
            "1 / sqrt(R + 1e-8)",
            "row",
            vector_text="1 / sqrt(D + 1e-8)",
        ),
        Feature(
            "rsqrt_col",
            "factored",
            lambda x: (x.col + VECTOR_EPS).rsqrt(),
            "1 / sqrt(C + 1e-8)",
            "col",
            vector_text="1 / sqrt(D + 1e-8)",
        ),
    )
}


# ---- the feature lists of the rules ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ElementFeatures:
    """The per-element inputs of a rule's network.

    Attributes:
        names: keys of `FEATURES` in trained order.
        decays: decays of the accumulators.
        clip: bound on the gradient before anything else (inf: none).
        second_eps: added to the second moment under its inverse root.
        diagonal_eps: added to the diagonal accumulator of a tensor of rank < 2 in ``fac_m``.
        norm_eps: added to the mean square in the normaliser x / sqrt(eps + mean x²).
    """

    names: tuple[str, ...]
    decays: Decays = field(default_factory=Decays)
    clip: float = CLIP_GRADIENT
    second_eps: float = 1e-6
    diagonal_eps: float = 0.0
    norm_eps: float = 1e-5

    def widths(self) -> tuple[int, ...]:
        """Number of columns of each feature."""
        return self._widths

    def column(self, name: str) -> int:
        """Index of the first column of the feature ``name``."""
        return sum(self._widths[: self.names.index(name)])

    @functools.cached_property
    def _widths(self) -> tuple[int, ...]:
        d = self.decays
        return tuple(
            FEATURES[name].columns(len(d.momentum), len(d.second_moment), len(d.factored)) for name in self.names
        )


# google/learned_optimization, general_lopt hyper_v2: 14 features, 30 columns.
VELO = ElementFeatures(
    names=(
        *("g", "clip_g", "p", "m", "v", "m_rsqrt_v", "rsqrt_v", "fac_g", "g_rsqrt_v"),
        *("row", "col", "rsqrt_row", "rsqrt_col", "fac_m"),
    )
)
# google/learned_optimization, adafac_mlp_lopt: 28 normalised columns; 11 of the step count follow, not normalised.
SMALL_FC = ElementFeatures(
    names=(
        *("g", "p", "m", "v", "m_rsqrt_v", "rsqrt_v", "fac_g"),
        *("row", "col", "rsqrt_row", "rsqrt_col", "fac_m"),
    ),
    clip=math.inf,
    diagonal_eps=1e-6,
)
# github.com/amoudgl/celo, Celo2: VeLO's features, normalised over the last two axes only.
CELO2 = replace(VELO, decays=Decays(second_moment=(0.95,)), second_eps=1e-8, norm_eps=1e-9)
# Tensors of rank < 2 have no row and column features there.
CELO2_VECTOR = replace(CELO2, names=CELO2.names[:9])
# google/learned_optimization, rnn_mlp_lopt: 23 normalised columns; 31 that are constant over a tensor follow.
_RNN_MLP_DECAYS = (0.5, 0.9, 0.99, 0.999, 0.9999)
RNN_MLP = ElementFeatures(
    names=("g", "p", "log_abs_p", "m", "v", "m_rsqrt_v", "rsqrt_v"),
    decays=Decays(momentum=_RNN_MLP_DECAYS, second_moment=_RNN_MLP_DECAYS, factored=()),
    clip=math.inf,
)

# ---- features of the run --------------------------------------------------------------------------------------------

# Time scales of the features of the step count, in steps.
STEP_SCALES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0, 30000.0, 100000.0)
# Fractions of the run at which the time features switch.
TIME_FRACTIONS = (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)
# Averages of the loss, over horizons from 10 steps to the whole run.
LOSS_DECAYS = 10
# Starting value of the running minimum of the loss, as in the reference.
LOSS_MIN_START = 999999999999.0
# Places of the features of the run in the vector that the operator ``advance`` returns; bias corrections follow them.
TIME, LOSS, STEP = slice(0, 9), slice(9, 18), slice(18, 29)
# Inputs of a scheduler that are the same for all tensors: time and loss.
SHARED_INPUTS = LOSS.stop

# ---- statistics of a tensor -----------------------------------------------------------------------------------------

# Columns of the statistics (T, S) that the operator ``sums`` returns: the number of non-finite gradient entries, Σg²,
# Σp², and then a pair (Σ, Σ²) for each second moment and each momentum.
STAT_NONFINITE, STAT_G2, STAT_P2, STAT_PAIRS = 0, 1, 2, 3
