"""The meta-weights that were published for each rule, by their names on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_lopt.weights.formats import SAFETENSORS, THETA_STATE


@dataclass(frozen=True)
class Published:
    """One published set of weights.

    Attributes:
        ids: hub repositories; two when the network is split over them.
        file: the file in each.
        settings: figures that go with the weights and are not in the file.
    """

    ids: tuple[str, ...]
    file: str = THETA_STATE
    settings: Mapping[str, Any] = field(default_factory=dict)


_MULO_OFFSETS = {
    "momentum_decays": (0.15216392, 0.14245212, 0.06812963),
    "rms_decays": (0.01079706,),
    "adafactor_decays": (0.18621896, -0.10864615, -0.06185547),
}

# Rule name -> published sets, the preferred one first.
PUBLISHED: dict[str, tuple[Published, ...]] = {
    "velo": (
        Published(("amoudgl/velo-4000",), settings={"bank_scale": 100.0}),
        Published(("Pauljanson002/VeLO_RNN", "Pauljanson002/VeLO_MLP"), SAFETENSORS, {"bank_scale": 100.0}),
    ),
    "velo_s": (Published(("amoudgl/velo-s",), settings={"bank_scale": 1.0}),),
    "small_fc_lopt": (Published(("amoudgl/adafac-mlp-lopt",), settings={"step_mult": 0.001}),),
    "mulo": (Published(("btherien/mulo",), SAFETENSORS, {"step_mult": 0.01, **_MULO_OFFSETS}),),
    "elo": (Published(("DiamondXL/elo",), SAFETENSORS, {"lr": 1e-3, "exp_mult": 0.001}),),
    "celo": (Published(("amoudgl/celo",)),),
    "celo_adam": (Published(("amoudgl/celo-adam",)),),
    "celo2": (
        Published(("amoudgl/celo2",), settings={"adam_lr_mult": 20.0}),
        Published(("DiamondXL/celo2",), SAFETENSORS, {"adam_lr_mult": 20.0}),
    ),
    "celo2_base": (Published(("amoudgl/celo2-base",)),),
    "elo_celo2": (
        Published(
            ("DiamondXL/elo-celo2",),
            SAFETENSORS,
            {"lr": 3.16e-4, "weight_decay": 0.1, "max_grad_norm": 1.0, "adam_lr_mult": 20.0},
        ),
    ),
    "rnn_mlp": (Published(("amoudgl/rnn-mlp-lopt",)),),
}
