"""rnn_mlp: momentum over its second moment, as a step relative to the size of the tensor. The LSTM is not used."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_lopt.features import RNN_MLP, STEP_SCALES
from hf_lopt.meta.construct import networks
from hf_lopt.meta.construct.files import Construction
from hf_lopt.rules.rnn_mlp import EXP_MULT, FROM_LSTM, FROM_MLP, TO_MLP


HIDDEN = (32, 32)
# Direction of the step: coefficients of normalised features, (group, column) -> weight. Columns 0 and 1 of the moments
# are the decays .5 and .9.
DIRECTION = {("m_rsqrt_v", 1): 1.0, ("m_rsqrt_v", 0): 0.3, ("p", 0): 0.1}
PULL = ("p", 0)  # the part that is never larger than the rest, so that what gets no gradient stays as it is
PEAK = 8.0  # relative step in thousandths: the rule multiplies by 0.001
MIN_SCALE = 0.02  # tensors smaller than this (root mean square) take the step of one of this size
# Inputs after the normalised features: 11 of the step count, then three of the tensor, then the LSTM's message.
NORM_INPUT = sum(RNN_MLP.widths()) + len(STEP_SCALES) + 1  # ln(norm p + 1e-8); ln(size) follows
LSTM_UNITS = 1
LSTM_INPUTS = FROM_LSTM + FROM_MLP + 18

CHOSEN_ON = (
    "Two small validation tasks of 300 or 400 steps (digits autoencoder, a tiny transformer on a synthetic Markov "
    "source), one seed. Compared were relative steps of 4 and 8 thousandths, the gradient in place of the second "
    "term, and a step of 0.001 whatever the size of the tensor. The recipes of this package took no part."
)


def mlp_layers() -> list[tuple[Tensor, Tensor]]:
    """The per-parameter network. Output 0: the direction times the peak; output 1: the exponent, so that
    exp(0.001 o1) = max(rms(p), MIN_SCALE); the other outputs, the message to the LSTM, are 0.

    ln rms(p) = ln(norm p) - ln(size) / 2 is linear in two inputs, and one ReLU takes the maximum.
    """
    floor = math.log(MIN_SCALE)
    rest, pull = ({k: x for k, x in DIRECTION.items() if (k == PULL) == pulls} for pulls in (False, True))
    columns = (networks.columns(RNN_MLP, form) for form in (rest, pull))
    limited, second = networks.limited(*columns, limit=1.0)
    units = [
        *limited,
        networks.Unit({NORM_INPUT: 1.0, NORM_INPUT + 1: -0.5}, bias=-floor),
    ]
    outputs = [
        networks.Output({unit: PEAK * sign for unit, sign in networks.LIMITED.items()}),
        networks.Output({4: 1.0 / EXP_MULT}, bias=floor / EXP_MULT),
        *[networks.Output()] * FROM_MLP,
    ]
    layers = networks.relu_network(NORM_INPUT + 2 + TO_MLP, HIDDEN, units, outputs)
    layers[1][0][:4, :4] = second
    return layers


def build() -> Construction:
    """rnn_mlp with an LSTM of one unit, all of whose weights are zero."""
    theta = {
        f"ffmod_params/mlp/~/linear_{k}/{kind}": leaf
        for k, layer in enumerate(mlp_layers())
        for kind, leaf in zip("wb", layer, strict=True)
    }
    theta |= {
        "initial_from_lstm": torch.zeros(FROM_LSTM, dtype=torch.float32),
        "initial_from_mlp": torch.zeros(FROM_MLP, dtype=torch.float32),
    }
    theta |= {
        f"lstm_init_state/{name}": torch.zeros(1, LSTM_UNITS, dtype=torch.float32) for name in ("hidden", "cell")
    }
    dense = {
        "rnn_params/rnn/linear": (LSTM_INPUTS + LSTM_UNITS, 4 * LSTM_UNITS),
        "rnn_to_ff_params/rnn_to_ff": (LSTM_UNITS, TO_MLP),
        "rnn_to_in_params/rnn_to_in": (LSTM_UNITS, FROM_LSTM),
    }
    for name, (n_in, n_out) in dense.items():
        theta |= {
            f"{name}/w": torch.zeros(n_in, n_out, dtype=torch.float32),
            f"{name}/b": torch.zeros(n_out, dtype=torch.float32),
        }
    provenance = {
        "origin": {
            "ffmod_params": "constructed: the network computes a hand rule exactly",
            "all other leaves": "constructed: zero, not used",
        },
        "settings": {},
        "sizes": {"hidden": HIDDEN, "lstm_units": LSTM_UNITS},
        "numbers": {
            "direction": networks.direction_record(DIRECTION),
            "limit": "p[0] counts as much as the rest at most",
            "relative_step": PEAK / 1000.0,
            "smallest_tensor_scale": MIN_SCALE,
        },
        "chosen_on": CHOSEN_ON,
    }
    return Construction(theta, provenance)
