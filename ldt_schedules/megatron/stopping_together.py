"""A failure of this process's main thread is told to all others; a consequence of theirs is told as one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from ldt_schedules.comm.cause import Aborted, Cause
from ldt_schedules.errors import ConfigError, LinkError
from ldt_schedules.megatron import session
from ldt_schedules.megatron.session import Session
from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.runtime.executor import ActionError
from ldt_schedules.topology import Site

_GRACE_S = 1.0
_BACKENDS = ("gloo", "NCCL", "HCCL", "Connection", "Broken pipe")


@contextmanager
def stopping_together() -> Iterator[None]:
    """Around what a process of a run does, from joining the link to leaving it.

    Raises:
        Aborted: from what failed here, because another process had failed before.
    """
    try:
        yield
    except BaseException as error:
        run = session.current()
        if run is None or (isinstance(error, SystemExit) and error.code == 0):
            raise
        if isinstance(error, Aborted):
            raise
        cause = run.link.watch.wait_for_cause(_GRACE_S) if _may_be_consequence(error) else None
        cause = cause or run.link.watch.declare(_cause_of(run, error))
        # What both sites have found wrong, each says in its own words.
        if cause.process == run.link.watch.name or isinstance(error, (ConfigError, ScheduleError)):
            raise
        raise Aborted(cause) from error


def _may_be_consequence(error: BaseException) -> bool:
    """Is it, or does it come from, a message that another process did not send or take?"""
    one: BaseException | None = error
    while one is not None:
        if isinstance(one, (LinkError, dist.DistError)):
            return True
        if isinstance(one, RuntimeError) and any(word in str(one) for word in _BACKENDS):
            return True
        one = one.__cause__
    return False


def _cause_of(run: Session, error: BaseException) -> Cause:
    """The edge tells where it failed and of what type the error is: its text may say something of the data."""
    name, (step, index, action) = run.link.watch.name, run.link.flight.where()
    inner = error.__cause__ if isinstance(error, ActionError) and error.__cause__ is not None else error
    kind = type(inner).__name__
    says = "its own log says more" if run.place.site is Site.EDGE else str(inner)
    place = [name] + ([] if step is None else [f"step {step}"])
    if index is not None:
        place.append(f"action {index} `{action}`")
    elif action is not None:
        place.append(f"at {action}")
    text = f"{', '.join(place)}: {kind}: {says}"
    mistake = isinstance(error, (ConfigError, ScheduleError))  # as the command line sees it
    return Cause(text, run.place.global_rank, index, name, step, action, kind, mistake)
