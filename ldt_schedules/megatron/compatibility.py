"""Calls of megatron-core functions whose parameters grew between 0.12.1 and 0.16.1."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any


@lru_cache(maxsize=64)
def _parameters(function: Callable[..., Any]) -> tuple[frozenset[str], bool]:
    parameters = inspect.signature(function).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return frozenset(parameters), takes_any


def call_with_known(function: Callable[..., Any], *args: Any, **optional: Any) -> Any:
    """Call `function(*args, **optional)`, leaving out the keywords that this version of it does not know.

    Only for keywords whose absence means the same: what an older Megatron reads from parallel_state instead.
    """
    names, takes_any = _parameters(function)
    return function(*args, **(optional if takes_any else {k: v for k, v in optional.items() if k in names}))
