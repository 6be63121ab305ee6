"""Celo2 and ELO-Celo2: Adam's momentum over its second moment, with some weight on the newest gradient."""

from __future__ import annotations

from hf_lopt.features import CELO2
from hf_lopt.meta.construct import networks
from hf_lopt.meta.construct.files import Construction


HIDDEN = (8, 8)
# Direction of the step: coefficients of normalised features, (group, column) -> weight. Column 0 is the decay .9. Its
# size does not matter: the rule normalises the output.
DIRECTION = {("m_rsqrt_v", 0): 1.0, ("g_rsqrt_v", 0): 0.3}
CHOSEN_ON = (
    "Small validation tasks (character models, autoencoder, classifiers), where this direction, orthogonalised, was "
    "compared with the first term alone and with mixing weights found by CMA-ES. The recipes of this package took no "
    "part."
)


def build() -> Construction:
    """The network of Celo2, whose file serves celo2_base and elo_celo2 under their own names."""
    leaves = networks.relu_pair(CELO2, DIRECTION, HIDDEN, outputs=3, bank=())
    provenance = {
        "origin": {"ff_mod_stack": "constructed: the network computes a linear hand rule exactly"},
        "settings": {},
        "sizes": {"hidden": HIDDEN},
        "numbers": {"direction": networks.direction_record(DIRECTION)},
        "chosen_on": CHOSEN_ON,
    }
    return Construction({f"ff_mod_stack/~/{name}": leaf for name, leaf in leaves.items()}, provenance)
