"""Trains a small Qwen2.5-Omni thinker on six processes, in the order that a table says. `--help` and README.md say more."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ldt_schedules.cli.table_input import read
from ldt_schedules.comm.cause import Aborted
from ldt_schedules.comm.ports import free_ports
from ldt_schedules.errors import ConfigError, LdtError
from ldt_schedules.planning import ScheduleTable, check
from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.progress import Semantics
from ldt_schedules.training.launcher import Child, ChildFailed, Stopped, run_all

HERE = Path(__file__).resolve().parent
# So that `examples.omni` is found wherever the script is started.
sys.path.insert(0, str(HERE.parents[1]))

FEEDS = ((), (), (), (0, 1, 2), (3,), (4,))
"""Of each stage of the model, the stages that feed it: audio, vision, text, join, middle, last."""
USER_MISTAKE, FAILURE = 2, 1
LATER_S = 3.0
TIMEOUT_S = 120.0


class Dtype(str, Enum):
    """Of weights and activations."""

    float32 = "float32"
    float64 = "float64"


def train(
    table: Annotated[
        Path,
        typer.Option(
            help="The schedule: a grid or JSON (ldt-table/1). Beside this script are also omni_packed.txt and omni_1f1b.txt.",
            show_default="omni_table.txt beside this script",
        ),
    ] = HERE / "omni_table.txt",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps; each runs the whole table once.")] = 20,
    dtype: Annotated[Dtype, typer.Option(help="Of weights and activations.")] = Dtype.float32,
    lr: Annotated[
        float, typer.Option(min=0, help="Learning rate of AdamW; each rank has an optimizer of its own.")
    ] = 3e-3,
    blocking: Annotated[
        bool, typer.Option("--blocking", help="Wait for every message before going on; tables may stand still then.")
    ] = False,
    verify: Annotated[
        bool, typer.Option(help="Hold every gradient of the first step against one process with the whole model.")
    ] = True,
) -> None:
    """Train a small Qwen2.5-Omni thinker with three roots, one process a rank: the table is the schedule.

    Ranks 0, 1 and 2 are the audio, vision and text roots, 3 joins them, 4 goes on, 5 has the loss. Microbatch 1 of each
    step has no audio, microbatch 2 no image, and every size varies.

    Example: python examples/omni/train.py --table examples/omni/omni_packed.txt --dtype float64

    Example: torchrun --nproc-per-node 6 examples/omni/train.py
    """
    with _messages(tells=lambda _: os.environ.get("RANK", "0") == "0"):
        schedule = _read(table, blocking)
        if "RANK" not in os.environ:
            _start_ranks(schedule)
            return
    with _messages(tells=_began_here):
        _be_a_rank(schedule, steps, dtype, lr, blocking, verify, table)


def _read(path: Path, blocking: bool) -> ScheduleTable:
    """Find users' mistakes before anything starts.

    Raises:
        ConfigError, ScheduleError: no table, an invalid one, or one for another model.
    """
    table = read(path)
    try:
        check(table, semantics=Semantics.BLOCKING if blocking else Semantics.BUFFERED)
    except ScheduleError as error:
        raise ScheduleError(f"{path}: {error}") from None
    feeds = tuple(stage.inputs for stage in table.layout.stages)
    if feeds != FEEDS or table.forward_only or table.layout.num_domains > 1:
        raise ConfigError(
            f"{path} is not for this model: it must train three roots, a stage that they all feed, and two more in a chain, as "
            "omni_table.txt does"
        )
    return table


def _start_ranks(table: ScheduleTable) -> None:
    """Start this script once for each rank, with the environment that torchrun would give it, and wait for all."""
    (port,), ranks = free_ports(1), table.layout.num_ranks
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:]]
    children = [Child(f"rank {r}", command, {**common, "RANK": str(r)}, owns_terminal=True) for r in range(ranks)]
    with tempfile.TemporaryDirectory(prefix="omni-logs-") as logs:
        run_all(children, logs)


def _be_a_rank(
    table: ScheduleTable, steps: int, dtype: Dtype, lr: float, blocking: bool, verify: bool, path: Path
) -> None:
    """One of the processes. Only that with the loss prints."""
    import torch

    from examples.omni.pipeline import OmniRank, Options, Progress
    from ldt_schedules.runtime import connect_ranks

    def say(one: Progress) -> None:
        rate = one.tokens / one.seconds
        print(f"step {one.step + 1:3d}   loss {one.loss:.4f}   {one.tokens} tokens, {rate:.0f} tokens/s", flush=True)
        if one.verified is not None:
            found = one.verified
            worst = f"{found.worst:.1e} ({found.name})" if found.worst else "0.0"
            print(
                f"verified: {found.count} gradients against one process, worst relative difference {worst}, "
                f"limit {found.limit:.0e}",
                flush=True,
            )

    torch.set_num_threads(1)
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if num_ranks != table.layout.num_ranks:
        raise ConfigError(f"the table has {table.layout.num_ranks} ranks and {num_ranks} processes were started")
    transport = connect_ranks(timeout_s=TIMEOUT_S)
    try:
        one = OmniRank(Options(table, steps, getattr(torch, dtype.value), lr, blocking, verify), rank, transport)
        if one.has_loss:
            counts = f"{num_ranks} ranks, {table.num_microbatches} microbatches a step"
            print(f"{path.name}: {counts}, {dtype.value}{', blocking' * blocking}", flush=True)
        for progress in one.train():
            say(progress)
    finally:
        transport.close()


def _began_here(error: BaseException) -> bool:
    """Is this the rank where it began, and not one that was stopped because of another?"""
    return Aborted.behind(error) is None


@contextmanager
def _messages(tells: Callable[[BaseException], bool]) -> Iterator[None]:
    """One message and an exit code, 2 for what the user can mend and 1 for what failed; only a process that `tells` says it."""
    try:
        yield
    except (ChildFailed, Stopped) as error:
        _leave(error, error.exit_code)
    except (LdtError, ScheduleError) as error:
        if not tells(error):
            # A launcher ends all when one has ended; the one that tells must be it.
            time.sleep(LATER_S)
            raise SystemExit(FAILURE) from None
        _leave(error, USER_MISTAKE if isinstance(error, (ConfigError, ScheduleError)) else FAILURE)


def _leave(error: Exception, code: int) -> None:
    print(f"omni: {error}", file=sys.stderr, flush=True)
    raise SystemExit(code)


if __name__ == "__main__":
    typer.run(train)
