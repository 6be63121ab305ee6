"""Features of the learned optimizers, in the order in which their networks were trained.

Per element: :class:`ElementFeatures`, formed in the passes of :mod:`hf_lopt._ops`. Per tensor and per run: the inputs
of the scheduler, formed in :mod:`hf_lopt._plain_scheduler`. Axes: T tensors, D decays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hf_lopt import _ops, _plain_scheduler
from hf_lopt._plain_scheduler import LOSS_DECAYS, STEP_SCALES, TIME_FRACTIONS
from hf_lopt.accumulators import Decays


__all__ = ["LOSS_DECAYS", "STEP_SCALES", "TIME_FRACTIONS"]

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

# Starting value of the running minimum of the loss, as in the reference.
LOSS_MIN_START = 999999999999.0


def init_loss_buffer() -> dict[str, Tensor]:
    """Empty loss buffer: averages (10,) over horizons from 10 steps to the whole run, their running minimum (10,)."""
    return {
        "loss_means": torch.zeros(LOSS_DECAYS),
        "loss_min": torch.full((LOSS_DECAYS,), LOSS_MIN_START),
    }


def update_loss_buffer(
    buffer: Mapping[str, Tensor], loss: Tensor, step: Tensor, num_training_steps: int
) -> tuple[dict[str, Tensor], Tensor]:
    """New loss buffer and the loss features (9,); see :func:`hf_lopt._plain_scheduler.update_loss_buffer`."""
    means, minimum = buffer["loss_means"], buffer["loss_min"]
    *new, features = _plain_scheduler.update_loss_buffer(means, minimum, loss, step, num_training_steps)
    return dict(zip(("loss_means", "loss_min"), new, strict=True)), features


def rank_one_hot(shapes: list[tuple[int, ...]], device: torch.device) -> Tensor:
    """One-hot (T, 5) of the number of axes longer than 1; a row of zeros for more than four, as in the reference."""
    ranks = torch.tensor([sum(n > 1 for n in shape) for shape in shapes], device=device)
    return (ranks.unsqueeze(1) == torch.arange(5, device=device)).to(torch.float32)
