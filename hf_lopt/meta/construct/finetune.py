"""Step sizes of the embedded weights on pretrained models.

The weights are made for training from scratch, where a relative step is as large as a random parameter needs it. On a
pretrained model such a step undoes the training, so each rule has a smaller one for that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Finetune:
    """How embedded weights are used on a pretrained model.

    Attributes:
        lr: a multiplier of the rule's own step size; where the schedule is the caller's, the lr itself.
        settings: arguments of the optimizer that go with ``lr``.
    """

    lr: float
    settings: Mapping[str, float] = field(default_factory=dict)


# Celo2's Adam for vectors takes lr times adam_lr_mult, by default 20 times the step of the matrices.
FINETUNE = {
    "velo": Finetune(0.05),
    "velo_s": Finetune(0.05),
    "celo": Finetune(0.05),
    "celo_adam": Finetune(0.05),
    "rnn_mlp": Finetune(0.05),
    "small_fc_lopt": Finetune(0.03),
    "mulo": Finetune(0.03),
    "elo": Finetune(5e-5),
    "celo2": Finetune(1e-4, {"adam_lr_mult": 1.0}),
    "celo2_base": Finetune(5e-5, {"adam_lr_mult": 1.0}),
    "elo_celo2": Finetune(1e-4, {"adam_lr_mult": 1.0}),
}
