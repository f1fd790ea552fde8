"""Megatron's "is this the first / last pipeline stage?", answered for a U.

Between actions the answers are about the process: an edge holds both ends, a cloud process neither. Where a training
loop holds several chunks and has set Megatron's virtual rank, they are about that chunk: the first one reads the data,
the last one computes the loss. While a stage is being computed they are about that stage: the head is not the last, the
tail is not the first, and an edge's middle chunk is neither. Megatron 0.12 decides by them where the loss is computed,
and every version where outputs are turned to float32.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from megatron.core import parallel_state

from ldt_schedules.megatron import session
from ldt_schedules.topology import Site

Predicate = Callable[..., bool]


def is_first_stage(original: Predicate) -> Predicate:
    """For `is_pipeline_first_stage`."""

    def is_pipeline_first_stage(*args: Any, **kwargs: Any) -> bool:
        run = session.current()
        if run is None:
            return original(*args, **kwargs)
        if run.place.site is not Site.EDGE:
            return False
        if run.executing is not None:
            assert run.layout is not None
            return run.layout.is_head(run.executing)
        return _virtual_rank(original, args, kwargs) in (None, 0)

    return is_pipeline_first_stage


def is_last_stage(original: Predicate) -> Predicate:
    """For `is_pipeline_last_stage`."""

    def is_pipeline_last_stage(*args: Any, **kwargs: Any) -> bool:
        run = session.current()
        if run is None:
            return original(*args, **kwargs)
        if run.place.site is not Site.EDGE:
            return False
        if run.executing is not None:
            assert run.layout is not None
            return run.layout.is_tail(run.executing)
        virtual = _virtual_rank(original, args, kwargs)
        return virtual is None or virtual == parallel_state.get_virtual_pipeline_model_parallel_world_size() - 1

    return is_pipeline_last_stage


def _virtual_rank(original: Predicate, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """The chunk that the caller asks about; None: about the process as a whole.

    Whether the virtual rank counts when the caller does not say so differs between versions of Megatron.
    """
    if parallel_state.get_virtual_pipeline_model_parallel_world_size() is None:
        return None
    asked = inspect.signature(original).bind(*args, **kwargs)
    asked.apply_defaults()
    if asked.arguments["ignore_virtual"]:
        return None
    chunk = asked.arguments.get("vp_stage")
    return parallel_state.get_virtual_pipeline_model_parallel_rank() if chunk is None else chunk
