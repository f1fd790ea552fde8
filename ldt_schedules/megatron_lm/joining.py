"""The moments at which the two sites meet: after Megatron has started, after it has built or loaded, at the end.

Megatron's own functions run between them as they are; each factory below takes one and returns it with the meeting added.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldt_schedules import device
from ldt_schedules.errors import LdtError
from ldt_schedules.megatron import session
from ldt_schedules.megatron.agreement import agree, declared, fingerprint
from ldt_schedules.megatron.session import Session
from ldt_schedules.megatron.stopping_together import stopping_together
from ldt_schedules.megatron.world import Address, Vigilance, join_link, leave_link
from ldt_schedules.megatron_lm.schedule import Schedule
from ldt_schedules.megatron_lm.shared_arguments import shared_arguments
from ldt_schedules.megatron_lm.sites import Sites
from ldt_schedules.topology import Site

Function = Callable[..., Any]


@dataclass(frozen=True)
class _Expected:
    """What this process will join when Megatron has started."""

    sites: Sites
    schedule: Schedule
    link: Address


_expected: _Expected | None = None


def expect(sites: Sites, schedule: Schedule, host: str, port: int) -> None:
    """Remember which site this process is of, what it runs and where the link is, for when Megatron has started."""
    global _expected
    _expected = _Expected(sites, schedule, Address(host=host, port=port))


def joined_sites() -> Sites:
    """The sites of this process."""
    assert _expected is not None, "no site has been entered"
    return _expected.sites


def join_after(original: Function) -> Function:
    """For `initialize_megatron`: the site's world is open and its arguments are known."""

    def initialize_megatron(*args: Any, **kwargs: Any) -> Any:
        if device.device_type() == "cpu":
            kwargs["allow_no_cuda"] = True
        answer = original(*args, **kwargs)
        if _expected is not None and session.current() is None:
            _join(_expected)
        return answer

    return initialize_megatron


def _join(expected: _Expected) -> None:
    from megatron.training import get_args

    args, sites, schedule = get_args(), expected.sites, expected.schedule
    flags = sites.flags
    run = join_link(
        sites.topology,
        sites.place,
        expected.link,
        schedule.table_for,
        flags.timeout_s,
        flags.link_backend,
        vigilance=Vigilance(
            silence_s=flags.silence_s, quiet_s=flags.quiet_s, directory=Path(flags.run_dir), stops=True
        ),
    )
    microbatches = args.global_batch_size // (args.micro_batch_size * sites.topology.size(Site.EDGE).data)
    own = {} if schedule.own is None else fingerprint("--ldt-plan", schedule.own)
    shared = {
        **declared(run),
        **shared_arguments(args, flags),
        **own,
        **fingerprint("schedule", run.table_for(microbatches, False)),
    }
    agree(run, shared, "arguments", "give both sites the same command line")
    schedule.check_step(microbatches)


def agree_after_loading(original: Function) -> Function:
    """For `setup_model_and_optimizer`: both sites must stand at the same iteration before they train on."""

    def setup_model_and_optimizer(*args: Any, **kwargs: Any) -> Any:
        built = original(*args, **kwargs)
        run = session.current()
        if run is not None:
            _agree_on_progress(run)
        return built

    return setup_model_and_optimizer


def _agree_on_progress(run: Session) -> None:
    from megatron.training import get_args

    args = get_args()
    names = ("iteration", "consumed_train_samples", "consumed_valid_samples")
    agree(
        run,
        {name: getattr(args, name, 0) for name in names},
        "checkpoints",
        "load the same iteration on both sites (--ckpt-step)",
    )


def leave_after(original: Function) -> Function:
    """For `pretrain`: no process takes its connections away while another still needs them.

    Raises:
        LdtError: Megatron has given up. It then calls `sys.exit()` without a code, which a launcher takes for success.
    """

    def pretrain(*args: Any, **kwargs: Any) -> Any:
        try:
            with stopping_together():
                answer = _without_giving_up(original, *args, **kwargs)
        except SystemExit as stop:  # --exit-interval and the signal handler end so, with a code
            leave_link(abandon=stop.code != 0)
            raise
        leave_link()
        return answer

    return pretrain


def _without_giving_up(original: Function, *args: Any, **kwargs: Any) -> Any:
    try:
        return original(*args, **kwargs)
    except SystemExit as stop:
        if stop.code is None:
            raise LdtError("Megatron has stopped; why, it has printed above") from None
        raise
