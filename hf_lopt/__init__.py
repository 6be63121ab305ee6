"""Learned optimizers for PyTorch and the Hugging Face libraries.

``import hf_lopt`` registers the names in :func:`available` with transformers, when it is installed, so that
``TrainingArguments(optim="velo")`` works.
"""

from hf_lopt.hf.register import register as _register
from hf_lopt.optimizer import PUBLIC_CLASSES as _CLASSES
from hf_lopt.optimizer import LearnedOptimizer


__version__ = "0.1.0"
__all__ = ["LearnedOptimizer", "available", *(cls.__name__ for cls in _CLASSES.values())]

globals().update({cls.__name__: cls for cls in _CLASSES.values()})
_register()


def available() -> tuple[str, ...]:
    """The ``optim=`` names that this installation offers, sorted."""
    return tuple(sorted(_CLASSES))
