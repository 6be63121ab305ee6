"""Run a function as soon as a module has been imported, without importing it.

``import hf_lopt`` has to reach into transformers, whose Trainer takes seconds to import. A finder on
``sys.meta_path`` waits for whoever imports it first, so that plain PyTorch loops do not pay for a library that they
never use.
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


Action = Callable[[ModuleType], None]


class _Loader(importlib.abc.Loader):
    """Executes a module with its own loader, then runs the actions that wait for it."""

    def __init__(self, loader: Any, actions: list[Action]):
        self._loader, self._actions = loader, actions

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module must not notice: inspect, pkgutil and importlib.resources ask its loader for sources and files.
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        for action in self._actions:
            action(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing itself; wraps the loader that the other finders give for a module of interest."""

    def __init__(self) -> None:
        self.actions: dict[str, list[Action]] = {}
        self._searching: set[str] = set()

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname not in self.actions or fullname in self._searching:
            return None
        self._searching.add(fullname)  # another package's hook may ask all finders too, this one included
        try:
            finders = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
            spec = next((s for s in (f.find_spec(fullname, path, target) for f in finders) if s is not None), None)
        finally:
            self._searching.discard(fullname)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader, self.actions[fullname])
        return spec


_FINDER = _Finder()


class _Unfinished(ModuleSpec):
    """What the spec of a module becomes while the module is being executed: it runs the actions when that is done.

    A module of interest can be what imports torch, and torch what imports hf_lopt (``hf_lopt_autoload``). Its loader
    runs already, so that the finder comes too late; but the import system marks the end of it on the spec.
    """

    def __setattr__(self, key: str, value: Any) -> None:
        super().__setattr__(key, value)
        if key == "_initializing" and not value:
            self.__class__ = ModuleSpec
            module = sys.modules.get(self.name)
            if getattr(module, "__spec__", None) is self:  # not if its execution failed
                for action in _FINDER.actions.get(self.name, ()):
                    action(module)


def when_imported(name: str, action: Action) -> None:
    """Call ``action(module)`` now if module ``name`` is imported, and after every later import of it.

    ``action`` has to be safe to call twice. Asking for the same action again only repeats the call on a module that is
    there. A module that is just being executed, further up the stack, counts as imported when that has ended.
    """
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    actions = _FINDER.actions.setdefault(name, [])
    if action not in actions:
        actions.append(action)
    module = sys.modules.get(name)
    spec = getattr(module, "__spec__", None)
    if getattr(spec, "_initializing", False):
        if type(spec) is ModuleSpec:
            spec.__class__ = _Unfinished
    elif module is not None:
        action(module)
