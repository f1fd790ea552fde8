"""Hands declared patches to MindSpeed's patch manager.

MindSpeed's manager takes `(dotted path, function)`. It tells a wrapper from a replacement by the function's name, lays
wrappers on each other in the order they came, and knows a wrapper again by its identity alone. A path that does not exist
it creates without a word, so the patch does nothing. Therefore:

    declared patch   ──►   ("package.module.name", ldt_name_wrapper)
                                                   └─ original ──► factory(original)

The name ends in "_wrapper", each declaration has one wrapper for the life of the process (registering twice does not
stack), a wrapper leaves alone what our own manager or an earlier call of it has patched, and all targets are verified before
the first is registered.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from patches import manager
from patches.manager import Patch, PatchError

Wrapper = Callable[[Any], Any]
Pair = tuple[str, Wrapper]
"""What MindSpeed's lists hold: `("megatron.core.parallel_state.is_pipeline_first_stage", wrapper)`."""

_MARK = "_ldt_patches"


class ForeignManager(Protocol):
    """What we use of MindSpeed's patch manager."""

    def register_patch(self, orig_func_name: str, new_func: Any = None) -> None: ...


@dataclass(frozen=True)
class Registrar:
    """Declared patches as one set for MindSpeed."""

    patches: tuple[Patch, ...]

    def verify(self) -> None:
        """Refuse patches that do not fit what is installed.

        Raises:
            PatchError: with every misfit, one a line: MindSpeed itself would create what is missing.
        """
        problems = manager.misfits(self.patches)
        if problems:
            raise PatchError(
                "MindSpeed is not patched, these do not fit what is installed:\n  " + "\n  ".join(problems)
            )

    def pairs(self) -> list[Pair]:
        """Verified, and in MindSpeed's form."""
        self.verify()
        return [(dotted(patch), wrapper_of(patch)) for patch in self.patches]

    def register(self, foreign: ForeignManager) -> None:
        """Record all with MindSpeed's manager; its `apply_patches` makes them effective."""
        for path, wrapper in self.pairs():
            foreign.register_patch(path, wrapper)


def dotted(patch: Patch) -> str:
    """`"package.module:Class.method"` as MindSpeed writes it."""
    return patch.target.replace(":", ".")


@functools.cache
def wrapper_of(patch: Patch) -> Wrapper:
    """The one wrapper of a declaration."""

    def wrapper(original: Any) -> Any:
        function = original.__func__ if isinstance(original, staticmethod) else original
        if patch.target in manager.applied_targets() or patch.target in getattr(function, _MARK, ()):
            return original
        replacement = manager.replacement_for(patch, function)
        setattr(replacement, _MARK, (*getattr(function, _MARK, ()), patch.target))
        # MindSpeed sets on the class what it is given; a plain function would take the object for its first argument.
        return staticmethod(replacement) if manager.is_static(patch) else replacement

    wrapper.__name__ = wrapper.__qualname__ = f"ldt_{patch.target.rpartition(':')[2].replace('.', '_')}_wrapper"
    return wrapper
