"""Functions of other libraries with something of ours around them, once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


_MARK = "_hf_lopt_original"


def wrap_once(holder: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put ``make(original)`` in the place of a function of a module, or of a method or static method of a class.

    One that has been wrapped stays as it is: modules are reloaded, and imported in any order.
    """
    original = getattr(holder, name)
    if hasattr(original, _MARK):
        return
    wrapped = make(original)
    setattr(wrapped, _MARK, original)
    is_static = isinstance(inspect.getattr_static(holder, name), staticmethod)
    setattr(holder, name, staticmethod(wrapped) if is_static else wrapped)
