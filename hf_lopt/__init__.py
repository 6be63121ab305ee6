"""Learned optimizers for PyTorch and the Hugging Face libraries.

``import hf_lopt`` registers the names in :func:`available` with transformers, when it is installed, so that
``TrainingArguments(optim="velo")`` works.
"""

from hf_lopt.feed import feed_loss
from hf_lopt.feed import watch_scalers as _watch_scalers
from hf_lopt.hf.register import register as _register
from hf_lopt.kernels import ops as _ops  # noqa: F401  (the name that `_ops.plain()` had in 0.1.0)
from hf_lopt.optimizer import LearnedOptimizer
from hf_lopt.optimizers import ELO, RNNMLP, Celo, Celo2, CeloAdam, ELOCelo2, MuLO, SmallFC, VeLO
from hf_lopt.optimizers import OPTIMIZERS as _OPTIMIZERS
from hf_lopt.param_groups import param_groups


__version__ = "0.1.0"

__all__ = [
    "LearnedOptimizer",
    "available",
    "feed_loss",
    "param_groups",
    "Celo",
    "Celo2",
    "CeloAdam",
    "ELO",
    "ELOCelo2",
    "MuLO",
    "RNNMLP",
    "SmallFC",
    "VeLO",
]

_register()
_watch_scalers()


def available() -> tuple[str, ...]:
    """The ``optim=`` names that this installation offers, sorted."""
    return tuple(sorted(_OPTIMIZERS))
