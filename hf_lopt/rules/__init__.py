"""The update rules, by their ``optim=`` names. A module of this package adds rules by listing them in ``RULES``."""

from __future__ import annotations

import importlib
import pkgutil

from hf_lopt.rules.base import Rule


_RULES: dict[str, Rule] = {
    rule.name: rule
    for module in sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "base")
    for rule in importlib.import_module(f"{__name__}.{module}").RULES
}


def names() -> tuple[str, ...]:
    """The names of all rules, sorted."""
    return tuple(sorted(_RULES))


def get(name: str) -> Rule:
    """The rule called ``name``.

    Raises:
        ValueError: if there is none; the message lists the names.
    """
    if name not in _RULES:
        raise ValueError(f"no update rule is called {name!r}; the names are {', '.join(names())}")
    return _RULES[name]
