"""Megatron's "is this the first / last pipeline stage?", answered for a U.

Between actions the answers are about the process: an edge holds both ends, a cloud process neither. While a stage is
being computed they are about that stage: the head is not the last, the tail is not the first. Megatron 0.12 decides
by them where the loss is computed, and every version where outputs are turned to float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
        return run.executing in (None, 0)

    return is_pipeline_first_stage


def is_last_stage(original: Predicate) -> Predicate:
    """For `is_pipeline_last_stage`."""

    def is_pipeline_last_stage(*args: Any, **kwargs: Any) -> bool:
        run = session.current()
        if run is None:
            return original(*args, **kwargs)
        if run.place.site is not Site.EDGE:
            return False
        return run.executing in (None, run.topology.num_pipeline_ranks)

    return is_pipeline_last_stage
