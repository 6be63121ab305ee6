"""Features of the learned optimizers, in the order in which their networks were trained.

Per element: :class:`ElementFeatures`, formed in the passes of :mod:`hf_lopt._ops`. Per tensor and per run: the inputs
of the scheduler, formed here. Axes: T tensors, D decays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hf_lopt import _ops
from hf_lopt.accumulators import Decays


CLIP_GRADIENT = 1000.0


@dataclass(frozen=True)
class ElementFeatures:
    """The per-element inputs of a rule's network, as data.

    Attributes:
        names: feature groups in trained order; a group has one column, or one per decay of its accumulator. The
            formulas are the methods of the same name in :mod:`hf_lopt._plain`.
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
        """Number of columns of each group."""
        d = self.decays
        counts = (len(d.momentum), len(d.second_moment), len(d.factored))
        return tuple(_ops.feature_width(name, *counts) for name in self.names)

    def column(self, name: str) -> int:
        """Index of the first column of the group ``name``."""
        return sum(self.widths()[: self.names.index(name)])

    def scales(self, mean_squares: Tensor) -> Tensor:
        """What the normaliser multiplies each column with, float32, from the mean squares (T, F)."""
        return (mean_squares + self.norm_eps).rsqrt().to(torch.float32)


# google/learned_optimization, general_lopt hyper_v2: 14 groups, 30 columns.
VELO = ElementFeatures(
    names=(
        "g",
        "clip_g",
        "p",
        "m",
        "v",
        "m_rsqrt_v",
        "rsqrt_v",
        "fac_g",
        "g_rsqrt_v",
        "row",
        "col",
        "rsqrt_row",
        "rsqrt_col",
        "fac_m",
    )
)

# google/learned_optimization, adafac_mlp_lopt: 28 normalised columns; 11 of the step count follow, not normalised.
SMALL_FC = ElementFeatures(
    names=(
        "g",
        "p",
        "m",
        "v",
        "m_rsqrt_v",
        "rsqrt_v",
        "fac_g",
        "row",
        "col",
        "rsqrt_row",
        "rsqrt_col",
        "fac_m",
    ),
    clip=math.inf,
    diagonal_eps=1e-6,
)
# github.com/amoudgl/celo, Celo2: VELO's groups, normalised over the last two axes only.
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

# Time scales of the features of the step count.
STEP_SCALES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0, 30000.0, 100000.0)
# Fractions of the run at which the time features switch.
TIME_FRACTIONS = (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)
LOSS_DECAYS = 10
# Starting value of the running minimum of the loss, as in the reference.
LOSS_MIN_START = 999999999999.0


def step_features(step: Tensor) -> Tensor:
    """tanh(step / tau - 1), shape (11,), or (T, 11) for a step of each tensor; it counts those done, from 0."""
    return torch.tanh(step.to(torch.float32).unsqueeze(-1) / step.new_tensor(STEP_SCALES, dtype=torch.float32) - 1.0)


def time_features(step: Tensor, num_training_steps: int) -> Tensor:
    """tanh(10 (step / num_training_steps - tau)), shape (9,); ``step`` counts the steps done, 0 at the first."""
    fractions = step.new_tensor(TIME_FRACTIONS, dtype=torch.float32)
    return torch.tanh(10.0 * (step.to(torch.float32) / num_training_steps - fractions))


def init_loss_buffer() -> dict[str, Tensor]:
    """Empty loss buffer: averages (10,) over horizons from 10 steps to the whole run, their running minimum (10,)."""
    return {
        "loss_means": torch.zeros(LOSS_DECAYS),
        "loss_min": torch.full((LOSS_DECAYS,), LOSS_MIN_START),
    }


def loss_decays(num_training_steps: int, like: Tensor) -> Tensor:
    """exp(-1/h) for ten h, spaced evenly in log from 10 steps to ``num_training_steps``; (10,) float64."""
    horizons = torch.logspace(
        1.0, math.log10(num_training_steps), LOSS_DECAYS, dtype=torch.float64, device=like.device
    )
    return torch.exp(-1.0 / horizons)


def update_loss_buffer(
    buffer: Mapping[str, Tensor], loss: Tensor, step: Tensor, num_training_steps: int
) -> tuple[dict[str, Tensor], Tensor]:
    """New buffer and the loss features (9,), each in [-1, 1].

    The loss is clipped at twice the largest bias-corrected mean so far. A feature compares two
    neighbouring means, both above the running minimum of the faster one; all are 0 in the first two steps. The
    corrections 1 - d^n are small next to 1, so the arithmetic is in float64 and rounded once.
    """
    means, minimum, loss = buffer["loss_means"].double(), buffer["loss_min"].double(), loss.double()
    decay = loss_decays(num_training_steps, means)
    correction = 1.0 - decay ** (step + 1)
    largest = torch.where(step > 0, (means / correction).max(), loss)
    loss = torch.minimum(loss, 2.0 * largest.abs())
    means = decay * means + (1.0 - decay) * loss
    corrected = means / correction
    minimum = torch.minimum(minimum, corrected)
    slower = corrected[1:] - minimum[:-1]
    slope = (corrected[:-1] - minimum[:-1]) / slower.clamp_min(1e-8) - 1.0
    features = torch.where(step + 1 > 2, slope.clamp(-1.0, 1.0), 0.0)
    return {"loss_means": means.float(), "loss_min": minimum.float()}, features.float()


def _log_magnitude(x: Tensor) -> Tensor:
    return 0.5 * torch.log(1e-8 + (10.0 * x).abs()).clamp(-5.0, 5.0)


def rank_one_hot(shapes: list[tuple[int, ...]], device: torch.device) -> Tensor:
    """One-hot (T, 5) of the number of axes longer than 1; a row of zeros for more than four, as in the reference."""
    ranks = torch.tensor([sum(n > 1 for n in shape) for shape in shapes], device=device)
    return (ranks.unsqueeze(1) == torch.arange(5, device=device)).to(torch.float32)


def velo_tensor_features(stats: Tensor, mean_p2: Tensor, numel: Tensor, ranks: Tensor, decays: Decays) -> Tensor:
    """Per-tensor inputs of VeLO's scheduler, (T, 12): L(mean v), rank one-hot (5), L(var m) (3), L(var v) (3).

    ``stats`` are the sums (T, S) of pass 0, taken before the accumulators are updated, ``mean_p2`` and ``numel`` (T,),
    all float64. The tensor is rescaled to unit mean square first, and "var v" uses the momentum means, as in the
    reference. Sums are combined in float64, since a variance is their difference.
    """
    n_v, n_m = len(decays.second_moment), len(decays.momentum)
    scale = mean_p2.clamp_min(1e-9).rsqrt().unsqueeze(1)
    pairs = (stats[:, _ops.STAT_PAIRS :] / numel.unsqueeze(1)).unflatten(1, (n_v + n_m, 2))
    v, v2 = pairs[:, :n_v, 0], pairs[:, :n_v, 1]
    m, m2 = pairs[:, n_v:, 0], pairs[:, n_v:, 1]
    var_m = scale.square() * (m2 - m.square())
    var_v = scale.square() * (v2 - 2.0 * m * v + m.square())
    parts = (_log_magnitude(scale * v), ranks, _log_magnitude(var_m), _log_magnitude(var_v))
    return torch.cat([x.to(torch.float32) for x in parts], 1)
