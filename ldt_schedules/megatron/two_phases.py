"""A step of the optimizer is applied in every process of both sites, or in none.

    computing ── gradients final, finite? ──► READY ── all are ready ──► COMMITTED ── weights change ──► applied
                                   a sum over both sites          another one

No process changes a weight before every process of both sites has its final gradients and has said so; one that fails before
that keeps all others from it. The gradient norm's sum is the second one where there is a norm; otherwise one of its own is
made. A process may still be lost between the sum and its own change. What the others have changed by then lasts as long as
they, which is half a second; what outlasts them are checkpoints, of which a run takes up the newest that both sites hold.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch

from ldt_schedules.errors import LdtError

if TYPE_CHECKING:
    from ldt_schedules.megatron.session import Session


class Phase(Enum):
    """Of the step that a process is in."""

    COMPUTING = "computing"
    READY = "ready"
    COMMITTED = "committed"
    APPLIED = "applied"


def ready(run: Session, non_finite: bool) -> bool:
    """Say that this process has its final gradients; are those of any process not finite? A collective of both sites.

    Raises:
        LdtError: the processes are not in the same step.
    """
    flag, total, squares = run.link.sum_over_sites(
        torch.tensor([float(non_finite), run.steps, run.steps**2], dtype=torch.float64), "who is ready for the step"
    ).tolist()
    count = run.link.total_processes
    if total != run.steps * count or squares != run.steps**2 * count:
        raise LdtError(
            f"the processes are about to apply different steps: this one {run.steps}, the mean is {total / count}"
        )
    run.phase = Phase.READY
    return flag > 0


def commit(run: Session) -> None:
    """Return when every process is known to be ready. A collective of both sites, unless the gradient norm was one."""
    if run.phase not in (Phase.COMMITTED, Phase.APPLIED):
        run.link.watch.check()
        run.link.sum_over_sites(torch.ones(1, dtype=torch.float64), "who applies the step")


def norm_was_summed(run: Session) -> None:
    """Every process has taken part in the gradient norm, so every one was ready."""
    if run.phase is Phase.READY:
        run.phase = Phase.COMMITTED


def applied_by_all_or_none(original: Callable[..., bool]) -> Callable[..., bool]:
    """For `step_with_ready_grads`."""

    @functools.wraps(original)
    def step_with_ready_grads(self: Any, *args: Any, **kwargs: Any) -> bool:
        from ldt_schedules.megatron import session

        run = session.current()
        if run is None:
            return original(self, *args, **kwargs)
        commit(run)
        with run.link.flight.doing("applying the step"):
            successful = original(self, *args, **kwargs)
        if run.phase is not Phase.APPLIED:  # of several optimizers the first one counts
            run.link.flight.updates += 1
        run.phase = Phase.APPLIED
        return successful

    return step_with_ready_grads
