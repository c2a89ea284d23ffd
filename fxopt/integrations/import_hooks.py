"""Runs a function after a module has been imported, at no cost to programs that never import it.

The same idea as `wrapt.when_imported`, but without importing wrapt: that takes 4 to 9 ms, of the 5 ms that
fxopt may add to `import torch`, and postponing it would take a finder of our own in any case.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Hook = Callable[[ModuleType], None]


class _HookedLoader:
    """Loads a module with its own loader, then runs the hook."""

    def __init__(self, loader: Any, hook: Hook) -> None:
        self._loader = loader
        self._hook = hook

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        # Whoever looks at the module later (inspect, importlib.resources) finds its real loader.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._hook(module)


class PostImportFinder:
    """A meta path finder that finds nothing itself: it lets the others find, and adds a hook to the loader.

    A hook must not raise and must be idempotent: it runs again when its module is loaded again.
    """

    def __init__(self) -> None:
        self._hooks: dict[str, Hook] = {}
        self._searching: set[str] = set()
        self._unfinished: set[str] = set()

    def when_imported(self, name: str, hook: Hook) -> None:
        """Run `hook(module)` each time that the module `name` has been loaded, now if it already has been."""
        self._hooks[name] = hook
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        module = sys.modules.get(name)
        if module is None:
            return
        if _is_loading(module):
            self._unfinished.add(name)
            return
        hook(module)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if self._unfinished:
            self._run_finished()
        hook = self._hooks.get(fullname)
        if hook is None or fullname in self._searching:
            return None
        self._searching.add(fullname)  # another finder of this kind may ask us back
        try:
            spec = self._ask_the_others(fullname, path, target)
        finally:
            self._searching.discard(fullname)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _HookedLoader(spec.loader, hook)  # type: ignore[assignment]
        return spec

    def _ask_the_others(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> ModuleSpec | None:
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                return spec
        return None

    def _run_finished(self) -> None:
        """A module that was half loaded when its hook arrived is looked at again on the next import."""
        for name in tuple(self._unfinished):
            module = sys.modules.get(name)
            if module is not None and _is_loading(module):
                continue
            self._unfinished.discard(name)
            if module is not None:
                self._hooks[name](module)


def _is_loading(module: ModuleType) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))
