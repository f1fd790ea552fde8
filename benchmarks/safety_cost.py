"""What does it cost that nothing hangs and nothing leaks? Step time of the quickstart with all of it on, over all of it off.

    python benchmarks/safety_cost.py                  30 blocks of 8 steps, about two minutes
    python benchmarks/safety_cost.py --blocks 100

One run of three processes; in all of them blocks of steps with everything on and with everything off take turns, so that
both see the same machine. On is what a user has: the watch and its signs of life, the flight recorder, the gate with its
ledger and what the plan says of each step. Off is the same program without them: recorder, gate and plan do nothing, and the
watch's threads sleep. (The two phases of the optimizer's step need no message that was not there before.)

Reported is the ratio of the median step of a block to that of the next one, its median over all pairs and the interval in
which 95 % of bootstrapped medians lie.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
WARMUP = 4
PROCESSES = (("edge", 0, 1), ("cloud", 0, 2), ("cloud", 1, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--steps", type=int, default=8, help="of a block")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--process", nargs=4, metavar=("SITE", "RANK", "PORT", "LINK"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process:
        be_process(*options.process, blocks=options.blocks, steps=options.steps)
        return
    times = measured(options.blocks, options.steps)
    print_result(times, options.steps, options.json)


def measured(blocks: int, steps: int) -> list[float]:
    """Seconds of every step of the edge, after the warm-up."""
    sys.path.insert(0, str(ROOT))
    from ldt_schedules.comm.ports import free_ports

    edge, cloud, link = free_ports(3)
    command = [sys.executable, __file__, "--blocks", str(blocks), "--steps", str(steps), "--process"]
    running = [
        subprocess.Popen(
            [*command, site, str(rank), str(edge if site == "edge" else cloud), str(link)],
            stdout=subprocess.PIPE,
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"},
        )
        for site, rank, size in PROCESSES
    ]
    outputs = [process.communicate(timeout=1800)[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit("a process failed")
    return [float(second) for second in json.loads(outputs[0])]


def print_result(times: list[float], steps: int, as_json: bool) -> None:
    blocks = [statistics.median(times[start : start + steps]) for start in range(0, len(times), steps)]
    ratios = [on / off for on, off in zip(blocks[0::2], blocks[1::2], strict=False)]
    chance = random.Random(0)
    drawn = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(2000))
    result = {
        "on_ms": 1000 * statistics.median(blocks[0::2]),
        "off_ms": 1000 * statistics.median(blocks[1::2]),
        "ratio": statistics.median(ratios),
        "ratio_95": [drawn[50], drawn[-51]],
        "pairs": len(ratios),
    }
    if as_json:
        print(json.dumps(result))
        return
    low, high = result["ratio_95"]
    print(f"step with everything on  {result['on_ms']:7.1f} ms, off {result['off_ms']:7.1f} ms")
    print(f"on / off                 {result['ratio']:7.4f}   (95 %: {low:.4f} to {high:.4f}; {result['pairs']} pairs)")


def be_process(site: str, rank: str, port: str, link: str, blocks: int, steps: int) -> None:
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(ROOT))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    from ldt_schedules.megatron import session, world
    from ldt_schedules.topology import Site
    from ldt_schedules.training import loop
    from ldt_schedules.training.config import load_config
    from ldt_schedules.training.process import open_process

    total = WARMUP + blocks * steps
    config = load_config(
        QUICKSTART,
        [
            f"train.iterations={total}",
            "train.eval_interval=0",
            f"link.address=127.0.0.1:{link}",
            f"train.output_dir={os.environ.get('TMPDIR', '/tmp')}/ldt_safety_cost",
            # A thread that sleeps is not to be taken for lost.
            "link.silence_s=0",
            "link.quiet_s=0",
        ],
    )
    process = open_process(config, Site(site))
    run, times = session.current(), []
    assert run is not None
    switch = Switch(run)
    for number, report in enumerate(loop.Loop(process, None, None).steps(), start=1):
        if number > WARMUP:
            times.append(report.step_s)
        if number >= WARMUP and (number - WARMUP) % steps == 0:
            switch.turn(on=(number - WARMUP) // steps % 2 == 0)
    switch.turn(on=True)
    world.close_site()
    print(json.dumps(times))


class Switch:
    """Turns everything off and on again in this process."""

    def __init__(self, run: Any) -> None:
        from ldt_schedules.comm import watch, watch_server

        self.run, self.turns = run, ((watch, watch.TURN_S), (watch_server, watch_server.TURN_S))

    def turn(self, on: bool) -> None:
        from contextlib import nullcontext

        link, transport = self.run.link, self.run.transport
        nothing, nowhere = (lambda *args, **named: None), (lambda *args, **named: nullcontext())
        replaced = [
            (
                link.flight,
                {"begin_step": nothing, "begin": nothing, "end": nothing, "waiting": nowhere, "doing": nowhere},
            ),
            (transport.gate, {"check_tensor": nothing, "count_sent": nothing, "count_received": nothing}),
            (transport.gate, {"add_scalars": nothing, "send_message": lambda what, message: json.dumps(message)}),
            (transport.gate, {"receive_message": lambda what, text: json.loads(text)}),
            (transport, {"plan_step": nothing}),
        ]
        for owner, functions in replaced:
            for name, function in functions.items():
                if on:
                    vars(owner).pop(name, None)
                else:
                    setattr(owner, name, function)
        for module, usual in self.turns:
            module.TURN_S = usual if on else 3600.0
        link.watch._send({"beat": True})  # wakes the threads, which look at the clock anew


if __name__ == "__main__":
    main()
