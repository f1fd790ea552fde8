"""How far are our plans from the proven limit, and how much faster than the published order?

    python benchmarks/schedule_grid.py                 a sample of the grid: some minutes
    python benchmarks/schedule_grid.py --all           all of it: an hour and more
    python benchmarks/schedule_grid.py --budgets 1x --kinds fused --cells 50 --worst 5

The grid: a U of P ranks, M microbatches, latency in edge forwards, cloud forward over edge forward; backward twice a
forward, half of it the input gradient. A budget of `k x` is k times what the published order holds, in whole
microbatches; `dev` gives every cloud rank as much as the fullest one, and the edge four times what it has.

Ratios only, so the figures are the same on every machine; the seconds in the last column are of this one.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import time

from ldt_schedules.planning import Costs, Layout, Problem, simulate
from ldt_schedules.planning.bounds import lower_bounds
from ldt_schedules.planning.budgets import COMPARED, within_budget
from ldt_schedules.planning.memory import fits, peak_memory
from ldt_schedules.planning.planners.auto import auto, auto_zb
from ldt_schedules.planning.planners.published import published

RANKS = (2, 3, 4, 5, 8, 16)
MICROBATCHES = (8, 16, 32, 64, 128)
LATENCIES = (0, 0.5, 1, 2, 4, 8, 16)
RATIOS = (0.5, 1, 2, 4)

Cell = tuple[int, int, float, float]


def problem_of(cell: Cell, budget: str) -> Problem:
    """The U of a cell with whole-microbatch caps."""
    ranks, microbatches, latency, ratio = cell
    layout = Layout.u(ranks)
    forward = tuple(1.0 if stage.ranks == (0,) else float(ratio) for stage in layout.stages)
    costs = Costs(
        forward=forward,
        backward=tuple(2 * time for time in forward),
        input_grad=forward,
        weight_grad=forward,
        latency=latency,
    )
    problem = within_budget(Problem(layout, microbatches, costs), budget)
    return problem.with_caps(tuple(None if cap is None else math.floor(cap + 1e-9) for cap in problem.memory_cap))


def measure(cell: Cell, budget: str, split: bool) -> tuple[float, float, float]:
    """(makespan over bound, published makespan over ours, seconds) of one cell."""
    problem = problem_of(cell, budget)
    start = time.perf_counter()
    order = (auto_zb if split else auto)(problem)
    seconds = time.perf_counter() - start
    timeline = simulate(problem.layout, order, problem.costs)
    assert fits(peak_memory(timeline, problem.costs), problem), (cell, budget)
    theirs = simulate(problem.layout, published(problem), problem.costs).makespan
    return timeline.makespan / lower_bounds(problem, split).best, theirs / timeline.makespan, seconds


def mean(values: list[float]) -> float:
    """Geometric."""
    return math.exp(sum(map(math.log, values)) / len(values))


def main() -> None:
    """Print a table, one line for each budget and kind of backward."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every cell of the grid")
    parser.add_argument("--cells", type=int, default=60, help="cells of the sample")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--budgets", nargs="*", default=COMPARED, help="memory budgets")
    parser.add_argument("--kinds", nargs="*", default=("fused", "split"), help="fused, split")
    parser.add_argument("--worst", type=int, default=0, help="also name so many of the worst cells")
    options = parser.parse_args()
    cells: list[Cell] = list(itertools.product(RANKS, MICROBATCHES, LATENCIES, RATIOS))
    if not options.all:
        cells = random.Random(options.seed).sample(cells, options.cells)
    print(f"{len(cells)} cells\n")
    print("| budget | backward | step / bound: mean | worst | published / ours: mean | least | most | s a plan |")
    print("|---|---|---|---|---|---|---|---|")
    for budget, kind in itertools.product(options.budgets, options.kinds):
        found = [measure(cell, budget, kind == "split") for cell in cells]
        over, gain, seconds = (list(column) for column in zip(*found, strict=True))
        print(
            f"| {budget} | {kind} | {mean(over):.4f} | {max(over):.4f} | {mean(gain):.3f} | {min(gain):.3f} | "
            f"{max(gain):.2f} | {sum(seconds) / len(seconds):.2f} |",
            flush=True,
        )
        for ratio, cell in sorted(zip(over, cells, strict=True), reverse=True)[: options.worst]:
            print(f"    {ratio:.4f} at P, M, latency, ratio = {cell}", flush=True)


if __name__ == "__main__":
    main()
