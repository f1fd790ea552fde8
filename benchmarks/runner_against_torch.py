"""What does a step of `PipelineRunner` take, beside the same one in torch.distributed.pipelining?

    python benchmarks/runner_against_torch.py                     a chain of 4 ranks, 8 microbatches, GPipe and 1F1B
    python benchmarks/runner_against_torch.py --width 1024 --steps 40

Both run in the same processes, on the same modules and data, in turns; gloo, one thread each. torch infers shapes once and
its peers; ours sends a header with every message and a thread looks after receives. Ratios of the medians, ours over
torch's: below 1 ours is faster. Gradients of the two are compared first.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist

from ldt_schedules.comm.ports import free_ports
from ldt_schedules.planning import Layout, Stage, plan
from ldt_schedules.runtime import PipelineRunner, connect_ranks

RANKS = 4


def chain(ranks: int) -> Layout:
    """One stage a rank, no U: what torch's schedules of one stage a rank are for."""
    return Layout(tuple(Stage(rank, f"stage{rank}", (rank,), (rank - 1,) if rank else ()) for rank in range(ranks)))


def module(rank: int, width: int, layers: int) -> torch.nn.Module:
    torch.manual_seed(rank)
    parts = [torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.Tanh()) for _ in range(layers)]
    return torch.nn.Sequential(*parts)


def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.mse_loss(output, target)


def compare(rank: int, given: argparse.Namespace) -> None:
    """On every rank: both runtimes in turns, for each planner."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    transport = connect_ranks(timeout_s=60)
    count, width = given.microbatches, given.width
    whole, target = torch.randn(count * given.rows, width), torch.randn(count * given.rows, width)
    for planner, schedule_class in (("gpipe", ScheduleGPipe), ("one_f_one_b", Schedule1F1B)):
        mine, theirs = module(rank, width, given.layers), module(rank, width, given.layers)
        runner = PipelineRunner(
            plan(planner, chain(RANKS), count), rank, {rank: mine}, transport, loss=loss if rank == RANKS - 1 else None
        )
        stage = PipelineStage(theirs, rank, RANKS, torch.device("cpu"))
        schedule = schedule_class(stage, count, loss_fn=loss)

        def ours(runner: PipelineRunner = runner) -> None:
            runner.step(whole.chunk(count) if rank == 0 else None, target.chunk(count) if rank == RANKS - 1 else None)

        def torchs(schedule: ScheduleGPipe | Schedule1F1B = schedule) -> None:
            arguments = (whole,) if rank == 0 else ()
            schedule.step(*arguments, **({"target": target} if rank == RANKS - 1 else {}))

        torchs()
        ours()
        worst = max(
            float((a.grad - b.grad).norm() / b.grad.norm())
            for a, b in zip(mine.parameters(), theirs.parameters(), strict=True)
        )
        assert worst < 1e-5, f"rank {rank}: gradients differ by {worst:.1e}"
        seconds = {"ours": [], "torch": []}
        for _ in range(given.steps):
            seconds["ours"].append(timed(ours))
            seconds["torch"].append(timed(torchs))
        if rank == 0:
            tell(planner, seconds)
    transport.close()
    dist.destroy_process_group()


def timed(step: Callable[[], None]) -> float:
    """Seconds of a step, all ranks together: from the last to begin to the last to end."""
    dist.barrier()
    begin = time.perf_counter()
    step()
    dist.barrier()
    return time.perf_counter() - begin


def tell(planner: str, seconds: dict[str, list[float]]) -> None:
    ours, torchs = statistics.median(seconds["ours"]), statistics.median(seconds["torch"])
    print(
        f"{planner:12s} ours {ours * 1e3:7.1f} ms   torch {torchs * 1e3:7.1f} ms   ratio {ours / torchs:.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512, help="of the layers")
    parser.add_argument("--rows", type=int, default=64, help="of a microbatch")
    parser.add_argument("--layers", type=int, default=4, help="of a stage")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--steps", type=int, default=30)
    given = parser.parse_args()
    if "RANK" in os.environ:
        warnings.simplefilter("ignore")
        compare(int(os.environ["RANK"]), given)
        return
    (port,) = free_ports(1)
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS)]
    command += ["--master-port", str(port), __file__, *sys.argv[1:]]
    raise SystemExit(subprocess.call(command, env={**os.environ, "OMP_NUM_THREADS": "1"}))


if __name__ == "__main__":
    main()
