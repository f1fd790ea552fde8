"""Stands in for packages that MindSpeed imports and that exist for accelerators only, or play no part in a test.

Every module under a faked root exists and has every attribute; what comes out can be called, subclassed, used as a
decorator and iterated (it is empty). Nothing of it computes.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any


class Anything(type):
    """A class that has every attribute."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return thing(name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls.__module__ != __name__:
            return super().__call__(*args, **kwargs)  # somebody's subclass
        # As a decorator it gives back what it decorates.
        return args[0] if len(args) == 1 and isinstance(args[0], (types.FunctionType, type)) else cls

    def __iter__(cls) -> Any:
        return iter(())

    def __bool__(cls) -> bool:
        return False

    def __or__(cls, other: Any) -> Any:
        return cls

    __ror__ = __or__

    def __getitem__(cls, key: Any) -> Any:
        return cls

    def __enter__(cls) -> Any:
        return cls

    def __exit__(cls, *error: Any) -> None:
        return None


def thing(name: str) -> Any:
    return Anything(name, (), {"__module__": __name__})


class _Module(types.ModuleType):
    __version__ = "2.7.1"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = thing(name)
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, roots: Sequence[str]) -> None:
        self.roots = frozenset(roots)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname.partition(".")[0] not in self.roots:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        module = _Module(spec.name)
        module.__file__ = f"<fake {spec.name}>"
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        module.__path__ = []


def install(roots: Sequence[str]) -> None:
    """From here on `import root.anything` works for these roots, whether or not the real package is there."""
    sys.meta_path.insert(0, _Finder(roots))
    if "torch_npu" in roots:
        import torch

        npu = __import__("torch_npu").npu
        npu.is_available = lambda: False
        torch.npu = npu  # type: ignore[attr-defined]
