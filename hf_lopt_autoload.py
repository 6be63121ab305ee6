"""Registers the learned optimizers when torch is imported, if HF_LOPT_AUTOLOAD=1: for programs that one cannot edit.

torch loads its ``torch.backends`` entry points, of which this is one, at the end of its own import, in every process
of the environment, and an exception would make ``import torch`` fail. So this is a module of its own beside the
package, which imports nothing unless it is asked to, and turns whatever goes wrong into a warning.
"""

import contextlib
import os
import sys
import warnings


VARIABLE = "HF_LOPT_AUTOLOAD"


def load() -> None:
    """Do what ``import hf_lopt`` does, if the environment asks for it. transformers is waited for, not imported."""
    if os.environ.get(VARIABLE, "").strip().lower() not in ("1", "true", "yes", "on"):
        return
    if "hf_lopt" in sys.modules:  # it is what imports torch, and registers by itself
        return
    try:
        import hf_lopt  # noqa: F401  (the import registers)
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # whatever it is, SystemExit too: a program that needs torch alone goes on
        _warn(error)


def _warn(error: BaseException) -> None:
    """Say what went wrong, if there is a way to: warnings may be errors, and standard error closed."""
    try:
        reason = f"{type(error).__name__}: {error}"
    except Exception:  # the error's own text fails
        reason = type(error).__name__
    text = f"{VARIABLE} is set, but hf_lopt could not be loaded: {reason}"
    try:
        warnings.warn(text, RuntimeWarning, stacklevel=3)
    except Exception:  # raised by a filter, or by writing
        with contextlib.suppress(Exception):
            sys.stderr.write(text + "\n")
