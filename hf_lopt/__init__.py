"""Learned optimizers for PyTorch and the Hugging Face libraries.

``import hf_lopt`` registers the names in :func:`available` with transformers, when it is installed, so that
``TrainingArguments(optim="velo")`` works.
"""

from hf_lopt import optimizer as _optimizer
from hf_lopt.hf.register import register as _register
from hf_lopt.optimizer import LearnedOptimizer
from hf_lopt.param_groups import param_groups


__version__ = "0.1.0"

_names = sorted({cls.__name__ for cls in _optimizer.PUBLIC_CLASSES.values()})
globals().update({name: getattr(_optimizer, name) for name in _names})
__all__ = ["LearnedOptimizer", "available", "param_groups", *_names]

_register()


def available() -> tuple[str, ...]:
    """The ``optim=`` names that this installation offers, sorted."""
    return tuple(sorted(_optimizer.PUBLIC_CLASSES))
