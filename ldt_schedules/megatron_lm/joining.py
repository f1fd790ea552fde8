"""The moments at which the two sites meet: after Megatron has started, after it has built or loaded, at the end.

Megatron's own functions run between them as they are; each factory below takes one and returns it with the meeting added.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ldt_schedules import device
from ldt_schedules.errors import ConfigError, LdtError
from ldt_schedules.megatron import session
from ldt_schedules.megatron.agreement import agree
from ldt_schedules.megatron.session import Session, TableSource
from ldt_schedules.megatron.table_file import check_microbatches, read_table_file
from ldt_schedules.megatron.world import Address, join_link, leave_link
from ldt_schedules.megatron_lm.shared_arguments import shared_arguments
from ldt_schedules.megatron_lm.sites import Sites
from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.layout import Layout
from ldt_schedules.planning.planners import plan
from ldt_schedules.planning.table import ScheduleTable
from ldt_schedules.runtime.executor import check_executable
from ldt_schedules.topology import Site

Function = Callable[..., Any]

_sites: Sites | None = None
_link: Address | None = None


def expect(sites: Sites, host: str, port: int) -> None:
    """Remember which site this process is of, and where the link is, for when Megatron has started."""
    global _sites, _link
    _sites, _link = sites, Address(host=host, port=port)


def joined_sites() -> Sites:
    """The sites of this process."""
    assert _sites is not None, "no site has been entered"
    return _sites


def join_after(original: Function) -> Function:
    """For `initialize_megatron`: the site's world is open and its arguments are known."""

    def initialize_megatron(*args: Any, **kwargs: Any) -> Any:
        if device.device_type() == "cpu":
            kwargs["allow_no_cuda"] = True
        answer = original(*args, **kwargs)
        if _sites is not None and session.current() is None:
            _join(_sites)
        return answer

    return initialize_megatron


def _join(sites: Sites) -> None:
    from megatron.training import get_args

    args, flags = get_args(), sites.flags
    assert _link is not None
    tables = table_source(sites)
    run = join_link(sites.topology, sites.place, _link, tables, flags.timeout_s, flags.link_backend)
    agree(run, shared_arguments(args, flags), "arguments", "give both sites the same command line")
    if flags.plan is not None:
        replicas = sites.topology.size(Site.EDGE).data
        microbatches = args.global_batch_size // (args.micro_batch_size * replicas)
        table = read_table_file(flags.plan, layout_of(sites), "--ldt-plan", "--pipeline-model-parallel-size")
        check_microbatches(table, microbatches, flags.plan, "--ldt-plan", "--global-batch-size")


def layout_of(sites: Sites) -> Layout:
    """The U, with a cloud pipeline for each domain."""
    return Layout.u(sites.topology.num_pipeline_ranks, sites.topology.domains)


def table_source(sites: Sites) -> TableSource:
    """`(num_microbatches, forward_only) -> table`: the user's own where it fits, else the planner's.

    Raises:
        ConfigError: no such planner, one whose tables cannot be run, or a file that cannot be used.
    """
    flags, layout = sites.flags, layout_of(sites)
    own: ScheduleTable | None = None
    if flags.plan is not None:
        own = read_table_file(flags.plan, layout, "--ldt-plan", "--pipeline-model-parallel-size")
    try:
        check_executable(plan(flags.schedule, layout, 1))
    except ScheduleError as error:
        raise ConfigError(f"--ldt-schedule {flags.schedule}: {error}") from None

    def table_for(num_microbatches: int, forward_only: bool) -> ScheduleTable:
        if own is not None and not forward_only and num_microbatches == own.num_microbatches:
            return own
        return plan(flags.schedule, layout, num_microbatches, forward_only=forward_only)

    return table_for


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
            answer = original(*args, **kwargs)
        except SystemExit as stop:  # --exit-interval and the signal handler end so, with a code
            leave_link(abandon=stop.code != 0)
            if stop.code is None:
                raise LdtError("Megatron has stopped; why, it has printed above") from None
            raise
        leave_link()
        return answer

    return pretrain
