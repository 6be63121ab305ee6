"""The optimizers: a class with written-out arguments for every rule, in a file of the same name as the rule's.

An argument that a parameter group may set for itself says "per group". What the optimizers have in common, from dtypes
to checkpoints, is :class:`hf_lopt.optimizer.LearnedOptimizer`.
"""

from hf_lopt.optimizer import LearnedOptimizer
from hf_lopt.optimizers.celo import Celo, CeloAdam
from hf_lopt.optimizers.celo2 import Celo2, Celo2Base, ELOCelo2
from hf_lopt.optimizers.rnn_mlp import RNNMLP
from hf_lopt.optimizers.small_fc import ELO, MuLO, SmallFC
from hf_lopt.optimizers.velo import VeLO, VeLOSmall


__all__ = [
    "OPTIMIZERS",
    "Celo",
    "Celo2",
    "Celo2Base",
    "CeloAdam",
    "ELO",
    "ELOCelo2",
    "MuLO",
    "RNNMLP",
    "SmallFC",
    "VeLO",
    "VeLOSmall",
]

# By ``optim=`` name. The classes of two names are variants, which have no public name of their own.
OPTIMIZERS: dict[str, type[LearnedOptimizer]] = {
    "celo": Celo,
    "celo2": Celo2,
    "celo2_base": Celo2Base,
    "celo_adam": CeloAdam,
    "elo": ELO,
    "elo_celo2": ELOCelo2,
    "mulo": MuLO,
    "rnn_mlp": RNNMLP,
    "small_fc_lopt": SmallFC,
    "velo": VeLO,
    "velo_s": VeLOSmall,
}
