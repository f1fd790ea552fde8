"""What `ldt plan` shows: the candidates, what more memory would buy, and how deep the pipeline must be filled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from ldt_schedules.cli.problem_input import PlanInput
from ldt_schedules.planning.budgets import COMPARED
from ldt_schedules.planning.evaluation import Evaluation, depths, worth_of_memory
from ldt_schedules.planning.layout import Layout
from ldt_schedules.planning.problem import Problem
from ldt_schedules.rendering.panel import rank_name

if TYPE_CHECKING:
    from ldt_schedules.training.cost_model import CostRow

_FEW_ACTIONS = 4000
"""Up to here what-if plans take a moment; beyond, they are left out."""


def show(
    given: PlanInput,
    problem: Problem,
    budget: str,
    candidates: Sequence[Evaluation],
    chosen: Evaluation,
    explain: bool,
    out: Path | None,
) -> None:
    """Print it all; `explain` adds the memory and depth tables."""
    console = Console(highlight=False)
    layout = problem.layout
    many = f", {layout.num_domains} domains" if layout.num_domains > 1 else ""
    console.print(
        f"{len(layout.stages)} stages on {layout.num_ranks} pipeline ranks{many}, {problem.num_microbatches} "
        f"microbatches; times in {_long(given.time_unit)}, memory budget {budget}",
        soft_wrap=True,
    )
    if any(stage.frozen for stage in layout.stages):
        console.print(f"frozen: {_frozen(layout)}", soft_wrap=True)
    if given.rows:
        console.print(_stages(given))
    console.print(_candidates(given, problem, candidates, chosen))
    if explain and sum(map(len, chosen.order)) <= _FEW_ACTIONS:
        with console.status("what would more memory buy …"):
            worth = _worth(given)
        if worth is not None:
            console.print(worth)
        console.print(_depths(given, problem, chosen))
    console.print(_verdict(given, chosen), soft_wrap=True)
    console.print(f"table: {out}" if out else "table: not written (--out FILE.json)", soft_wrap=True)
    if out:
        console.print(f"see it: ldt draw {out}", soft_wrap=True)
    if given.traces:
        console.print(f"measured steps: ldt draw {given.traces[0]}, …", soft_wrap=True)


def _frozen(layout: Layout) -> str:
    """`0 head, 1 cloud1 without a backward; 3 tail passing gradients on`."""
    frozen = [stage for stage in layout.stages if stage.frozen]
    told = []
    for has_backward, what in ((False, " without a backward"), (True, " passing gradients on")):
        names = [f"{stage.index} {stage.name}" for stage in frozen if layout.has_backward(stage.index) == has_backward]
        told += [", ".join(names) + what] if names else []
    return "; ".join(told)


def _stages(given: PlanInput) -> Table:
    table = _new("Stages of one microbatch", ("stage", "on", "layers", "GFLOP forward", "ms forward", "ms backward",
                 "MiB kept", "MiB sent"))  # fmt: skip
    for row in given.rows:
        sent = "" if row.message_mib is None else f"{row.message_mib:.3g}"
        table.add_row(
            f"{row.stage} {row.name}", rank_name(row.rank, given.problem.layout), _layers(row), f"{row.forward_gflop:.3g}",
            f"{row.forward_ms:.3g}", f"{row.backward_ms:.3g}", f"{row.activation_mib:.3g}", sent,
        )  # fmt: skip
    return table


def _layers(row: CostRow) -> str:
    """`7`; of a vision-language model `7 vision`, `1 vision + 2 language`."""
    if row.vision_layers is None:
        return str(row.layers)
    both = ((row.vision_layers, "vision"), (row.layers, "language"))
    return " + ".join(f"{layers} {kind}" for layers, kind in both if layers) or "none"


def _candidates(given: PlanInput, problem: Problem, found: Sequence[Evaluation], chosen: Evaluation) -> Table:
    table = _new("Candidates", ("schedule", "step", "over the bound", "bubble", "exposed", "link needs", "peak memory"))
    for candidate in found:
        fits = "" if candidate.fits else " [red]> budget[/red]"
        table.add_row(
            f"[bold]{candidate.name}[/bold] ◄" if candidate is chosen else candidate.name,
            time_text(candidate.makespan, given.time_unit),
            _over(candidate.distance) if candidate.fits else "",
            f"{candidate.timeline.bubble:.1%}",
            f"{sum(candidate.timeline.exposed) / problem.layout.num_ranks / candidate.makespan:.1%}",
            _rate(max(candidate.rate_up, candidate.rate_down), given.memory_unit),
            _memories(candidate.peaks, given.memory_unit) + fits,
        )
    return table


def _worth(given: PlanInput) -> Table | None:
    """Under other budgets; nothing to tell where the problem's own caps hold in any case."""
    if given.problem.memory_cap:
        return None
    name = "auto" if given.problem.can_fuse else "auto_zb"
    table = _new(f"What more memory would buy ({name})", ("budget", "step", "over the bound", "peak memory"))
    for worth in worth_of_memory(name, given.problem, COMPARED):
        table.add_row(
            worth.budget, time_text(worth.makespan, given.time_unit), _over(worth.distance),
            _memories(worth.peaks, given.memory_unit),
        )  # fmt: skip
    return table


def _depths(given: PlanInput, problem: Problem, chosen: Evaluation) -> Table:
    table = _new(
        "Microbatches in flight that hide the round trip", ("stage", "on", "held at least", "needed", "this plan has")
    )
    for depth in depths(problem, chosen):
        enough = depth.used >= min(depth.needed, problem.num_microbatches)
        table.add_row(
            f"{depth.stage} {problem.layout.stages[depth.stage].name}", rank_name(depth.rank, problem.layout),
            time_text(depth.round_trip, given.time_unit), str(depth.needed),
            str(depth.used) if enough else f"[yellow]{depth.used}[/yellow]",
        )  # fmt: skip
    return table


def _verdict(given: PlanInput, chosen: Evaluation) -> str:
    limits = {
        "path": "the longest way of one microbatch",
        "rank": "the busiest rank",
        "link": "the link's bandwidth",
        "memory": "the memory of a rank",
    }
    return (
        f"{chosen.name}: {time_text(chosen.makespan, given.time_unit)} a step, {_over(chosen.distance, 2)} over the proven "
        f"bound of {time_text(chosen.bounds.best, given.time_unit)}, which {limits[chosen.bounds.reason]} sets"
    )


def _over(distance: float, digits: int = 1) -> str:
    """A bound that is met may, by rounding, lie a hair above the step."""
    return f"{max(0.0, distance - 1):.{digits}%}"


def _new(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < 1 else "right")
    return table


def time_text(value: float, unit: str) -> str:
    """A time with its unit; of seconds the unit that suits."""
    if unit != "s":
        return f"{value:.6g}"
    for scale, name in ((1.0, "s"), (1e-3, "ms")):
        if value >= scale:
            return f"{value / scale:.3f} {name}"
    return f"{value * 1e6:.1f} µs"


def _long(unit: str) -> str:
    return "seconds" if unit == "s" else unit


def _memories(peaks: Sequence[float], unit: str) -> str:
    """One figure a rank; of many ranks the edge's, and the least and most of the cloud."""
    texts = [_memory(peak, unit) for peak in peaks]
    if len(texts) <= 6:
        return " ".join(texts)
    return f"edge {texts[0]}, cloud {_memory(min(peaks[1:]), unit)} to {_memory(max(peaks[1:]), unit)}"


def _memory(amount: float, unit: str) -> str:
    if unit != "B":
        return f"{amount:g}"
    return f"{amount / 2**30:.2f}G" if amount >= 2**30 else f"{amount / 2**20:.1f}M"


def _rate(rate: float, unit: str) -> str:
    return f"{rate * 8 / 1e6:.1f} Mbit/s" if unit == "B" else f"{rate:.3g}"
