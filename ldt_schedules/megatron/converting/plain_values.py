"""What of a common state may be written again: plain values, as anybody can read them.

safe_pickle.py puts objects that do nothing in the place of classes that it does not know. Written into another checkpoint they
would be names of ours that a stock Megatron cannot import.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

_SIMPLE = (type(None), bool, int, float, str, bytes, torch.dtype, torch.Tensor)


def is_plain(value: Any) -> bool:
    """Simple values, and lists, tuples, sets and dicts of such."""
    if isinstance(value, dict):
        return all(is_plain(key) and is_plain(one) for key, one in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(is_plain, value))
    return isinstance(value, _SIMPLE)


def plain_items(values: Mapping[str, Any]) -> dict[str, Any]:
    """The items whose values are plain."""
    return {key: value for key, value in values.items() if is_plain(value)}
