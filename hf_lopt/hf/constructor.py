"""Other objects than a class's own from its constructor, for a while."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


_active: dict[type, Callable[..., Any]] = {}


def intercept(base: type, new: Callable[..., Any]) -> None:
    """Have ``new(cls, *args, **kwargs)`` make the objects of ``base`` and its subclasses.

    An object that is not an instance of ``cls`` has to be complete: ``cls.__init__`` is not called on it. ``base``
    must not have a ``__new__`` of its own.
    """
    if "__new__" not in vars(base):

        def constructor(cls: type, *args: Any, **kwargs: Any) -> Any:
            make = _active.get(base)
            return object.__new__(cls) if make is None else make(cls, *args, **kwargs)

        base.__new__ = constructor  # type: ignore[method-assign, assignment]
    _active[base] = new


def release(base: type) -> None:
    """End it. The attribute stays: Python refuses to construct a class whose ``__new__`` has been taken away."""
    _active.pop(base, None)
