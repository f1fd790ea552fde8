"""Applies and takes back declared patches of other people's modules.

A patch on a name that does not exist does nothing and nobody notices; a by-name import keeps the old object
alive in another module. So `apply` refuses a target that is missing, whose parameters are not the declared
ones, or whose package is of an unknown version; it rebinds every module that holds the old object; and
`revert` puts every binding back, those of modules imported since included.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import runpy
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet

from ldt_schedules.errors import ConfigError

Signature = tuple[str, ...]
"""The parameter names of a function, in order."""


class PatchError(ConfigError):
    """A declared patch does not fit what is installed."""


@dataclass(frozen=True, kw_only=True)
class Patch:
    """One declaration.

    Attributes:
        target: `"package.module:name"` or `"package.module:Class.method"`.
        factory: `"package.module:function"`; called with the original, returns what takes its place.
        reason: why no seam of the upstream does.
        package: the distribution whose version is checked.
        versions: the versions it was checked on, as a specifier (`">=0.12.1,<0.17"`). In an older or newer
            version the patch is refused.
        signatures: the parameter lists it was checked against; empty for a built-in that has none.
    """

    target: str
    factory: str
    reason: str
    package: str
    versions: str
    signatures: tuple[Signature, ...] = ()


@dataclass
class _Applied:
    patch: Patch
    owner: Any
    name: str
    original: Any
    replacement: Any
    was: Any
    """What stood in the owner's own namespace (a staticmethod object, say); None when the name was inherited."""


@dataclass
class PatchManager:
    """Holds what is applied; the module functions `apply` and `revert` use one for the process."""

    applied: dict[str, _Applied] = field(default_factory=dict)

    def apply(self, patches: Iterable[Patch]) -> None:
        """Apply all of `patches`, or none of them. A patch that is already applied stays as it is.

        Raises:
            PatchError: with every misfit, one a line.
        """
        wanted = [patch for patch in patches if patch.target not in self.applied]
        problems = misfits(wanted)
        if problems:
            raise PatchError("these patches do not fit what is installed:\n  " + "\n  ".join(problems))
        for patch in wanted:
            _load(patch.factory)
        applied = [_apply(patch) for patch in wanted]
        self.applied.update((one.patch.target, one) for one in applied)
        _rebind([(one.original, one.replacement) for one in applied])

    def revert(self, patches: Iterable[Patch] | None = None) -> None:
        """Take back `patches` (default: all), the latest first."""
        targets = set(self.applied) if patches is None else {patch.target for patch in patches}
        reverted = [self.applied.pop(target) for target in reversed(list(self.applied)) if target in targets]
        for one in reverted:
            if one.was is not None:
                setattr(one.owner, one.name, one.was)
            else:
                delattr(one.owner, one.name)
        _rebind([(one.replacement, one.original) for one in reverted])


def misfits(patches: Iterable[Patch]) -> list[str]:
    """What is wrong with `patches` on this machine, one line each; empty when all of them can be applied."""
    return [problem for patch in patches if (problem := _misfit(patch))]


def replacement_for(patch: Patch, original: Any) -> Any:
    """What takes the place of `original`, with its name and docstring; a factory may find that nothing need."""
    replacement = _load(patch.factory)(original)
    if replacement is original:  # this version needs no patch; wrapped in itself it would be a loop
        return original
    if not hasattr(replacement, "__wrapped__") and inspect.isfunction(replacement) and callable(original):
        functools.update_wrapper(replacement, original)
    return replacement


def is_static(patch: Patch) -> bool:
    """Is the target a static method of a class?"""
    owner, name, _ = _resolve(patch.target)
    return isinstance(vars(owner).get(name), staticmethod)


def _apply(patch: Patch) -> _Applied:
    owner, name, original = _resolve(patch.target)
    replacement = replacement_for(patch, original)
    was = vars(owner).get(name)
    setattr(owner, name, staticmethod(replacement) if isinstance(was, staticmethod) else replacement)
    return _Applied(patch, owner, name, original, replacement, was)


def _misfit(patch: Patch) -> str | None:
    try:
        version = _version(patch.package)
    except importlib.metadata.PackageNotFoundError:
        return f"{patch.target}: {patch.package} is not installed"
    if not SpecifierSet(patch.versions).contains(version.split("+")[0], prereleases=True):
        return f"{patch.target}: {patch.package} is {version}, checked on {patch.versions}"
    try:
        _, _, original = _resolve(patch.target)
    except (ImportError, AttributeError) as error:
        return f"{patch.target}: does not exist in {patch.package} {version} ({error})"
    if patch.signatures:
        found = tuple(inspect.signature(original).parameters)
        if found not in patch.signatures:
            known = " or ".join(str(signature) for signature in patch.signatures)
            return f"{patch.target}: takes {found} in {patch.package} {version}, checked with {known}"
    return None


@functools.lru_cache
def _version(package: str) -> str:
    """The version of what would be imported.

    A checkout of Megatron on the path has no entry in the list of installed packages, or hides one of another version, so
    its own file is read. Not imported: who patches MindSpeed must be first.
    """
    if package == "megatron-core":
        for folder in _folders("megatron"):
            file = Path(folder) / "core" / "package_info.py"
            if file.is_file():
                return str(runpy.run_path(str(file))["__version__"])
    return importlib.metadata.version(package)


def _folders(package: str) -> list[str]:
    spec = importlib.util.find_spec(package)
    return [] if spec is None else list(spec.submodule_search_locations or ())


def _resolve(target: str) -> tuple[Any, str, Any]:
    """The owner, the attribute's name and the object. Not by `import a.b as m`: a package may shadow it."""
    module_name, _, path = target.partition(":")
    owner: Any = importlib.import_module(module_name)
    *classes, name = path.split(".")
    for class_name in classes:
        owner = getattr(owner, class_name)
    return owner, name, getattr(owner, name)


def _load(path: str) -> Callable[[Any], Any]:
    module_name, _, name = path.partition(":")
    return getattr(importlib.import_module(module_name), name)  # type: ignore[no-any-return]


def _rebind(pairs: list[tuple[Any, Any]]) -> None:
    """Replace the first of each pair wherever a loaded module holds it under any name (`from m import f as g`).

    In one pass: a process of a training run has several thousand modules.
    """
    new = {id(old): replacement for old, replacement in pairs if callable(old) and not inspect.isbuiltin(old)}
    if not new:
        return
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", None)
        if not isinstance(names, dict):
            continue
        for name, value in list(names.items()):
            if id(value) in new:
                names[name] = new[id(value)]


_MANAGER = PatchManager()
apply = _MANAGER.apply
revert = _MANAGER.revert


def applied_targets() -> tuple[str, ...]:
    """The targets patched in this process, in the order they were applied."""
    return tuple(_MANAGER.applied)
