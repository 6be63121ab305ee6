"""Makes the embedded weights: small networks that encode a known good hand rule, where published weights are missing.

``python -m hf_lopt.meta.construct [RULE ...]`` writes ``hf_lopt/embedded/<rule>.safetensors`` and ``.json`` again,
byte for byte; ``--check`` compares the files in place with what it would write and prints the fits of the schedules.

The bytes do not depend on the machine: the only numbers that are not data are the coefficients of small least-squares
problems, and :mod:`hf_lopt.meta.fitting` rounds them to a grid with a margin that it checks.
"""

from __future__ import annotations

from collections.abc import Callable

from hf_lopt.meta.construct import celo2, rnn_mlp, small_fc, velo
from hf_lopt.meta.construct.files import Construction


# Rule name -> what makes its weights.
BUILDERS: dict[str, Callable[[], Construction]] = {
    "velo": velo.build_velo,
    "velo_s": velo.build_velo_s,
    "celo": velo.build_celo,
    "celo_adam": velo.build_celo_adam,
    "small_fc_lopt": small_fc.build_small_fc,
    "mulo": small_fc.build_mulo,
    "elo": small_fc.build_elo,
    "celo2": celo2.build,
    "celo2_base": celo2.build,
    "elo_celo2": celo2.build,
    "rnn_mlp": rnn_mlp.build,
}
