"""What `ldt doctor --post-mortem` shows: the cause, each rank's row of expected against done, each process, their stacks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from ldt_schedules.errors import ConfigError
from ldt_schedules.planning.costs import Costs
from ldt_schedules.planning.layout import Layout
from ldt_schedules.planning.reached import Reached, State
from ldt_schedules.planning.simulator import simulate
from ldt_schedules.rendering.panel import rank_name
from ldt_schedules.runtime.flight_file import FlightFile
from ldt_schedules.runtime.post_mortem import PostMortem

_COLOURS = {
    State.DONE: "green",
    State.RUNNING: "bold yellow",
    State.WAITING: "bold magenta",
    State.FAILED: "bold red",
    State.NOT_BEGUN: "dim",
    State.UNKNOWN: "dim",
}
_BEFORE, _AFTER = 2, 3  # actions in words around the one that a rank is at
_DRAWN_LATENCY = 1.0  # of a forward: the picture shows an order, not the run's times


def show(found: PostMortem, directory: Path, verbose: bool, out: Path | None) -> None:
    """All of it, the cause first."""
    console = Console(highlight=False)
    total = "?" if found.num_processes is None else found.num_processes
    console.print(f"{escape(str(directory))}: files of {len(found.flights)} of {total} processes", soft_wrap=True)
    _show_cause(console, found)
    for line in _absent(found):
        console.print(f"[yellow]![/yellow] {line}", soft_wrap=True)
    if found.table is not None and found.rows:
        _show_rows(console, found.table.layout, found)
    if found.flights:
        _show_processes(console, found)
    if verbose:
        _show_stacks(console, found.flights)
    elif found.flights:
        console.print("where each process stood in its code: --verbose", soft_wrap=True)
    if out is not None:
        console.print(f"picture: {escape(str(out))}", soft_wrap=True)


def figures(found: PostMortem) -> dict[str, Any]:
    """The same as JSON types; rows as texts of signs."""
    return {
        "cause": None if found.cause is None else found.cause.model_dump(),
        "other_causes": list(found.other_causes),
        "step": found.step,
        "num_processes": found.num_processes,
        "num_missing": found.num_missing,
        "missing": list(found.missing),
        "damaged": [asdict(one) for one in found.damaged],
        "ranks": [
            {
                "rank": rank,
                "done": row.done,
                "actions": len(row.actions),
                "at": None if row.at is None else str(row.actions[row.at]),
                "state": None if row.at is None else str(row.state),
            }
            for rank, row in enumerate(found.rows)
        ],
        "processes": [one.model_dump(exclude={"table", "events", "format"}) for one in found.flights],
    }


def picture(found: PostMortem, format_name: str) -> bytes:
    """Raises ConfigError where no file holds a table; ScheduleError without matplotlib."""
    from ldt_schedules.rendering.broken_step import picture_of_broken_step

    if found.table is None or not found.rows:
        raise ConfigError("no file holds the table of a step, so there is nothing to draw; leave out --out")
    table = found.table
    timeline = simulate(table.layout, table.ranks, Costs(latency=_DRAWN_LATENCY))
    title = f"step {found.step}: no process told a cause" if found.cause is None else found.cause.text
    return picture_of_broken_step(table.layout, timeline, found.rows, title, format_name)


def _show_cause(console: Console, found: PostMortem) -> None:
    cause = found.cause
    if cause is None:
        console.print(
            "[bold]no process told a cause[/bold]: they were ended from outside, or the one that failed left no file",
            soft_wrap=True,
        )
        return
    console.print(f"[bold red]✗ {escape(cause.text)}[/bold red]", soft_wrap=True)
    told = (("process", cause.process), ("step", cause.step), ("action", cause.action), ("error", cause.error))
    parts = [f"{name} {value}" for name, value in told if value is not None]
    if parts:
        console.print(f"  {escape(', '.join(parts))}", soft_wrap=True)
    for other in found.other_causes:
        console.print(f"  told beside it: {escape(other)}", soft_wrap=True)


def _absent(found: PostMortem) -> Iterator[str]:
    if found.num_missing:
        names = ", ".join(found.missing)
        unnamed = found.num_missing - len(found.missing)
        more = (f" and {unnamed} more" if names else f"{unnamed} processes") if unnamed else ""
        yield f"no file of {names}{more}: killed (out of memory?), or the machine was lost; look at its system's log"
    for one in found.damaged:
        yield f"{escape(one.name)} is damaged: {escape(one.reason)}"


def _show_rows(console: Console, layout: Layout, found: PostMortem) -> None:
    console.print(f"\n[bold]Step {found.step}[/bold]   {_legend()}", soft_wrap=True)
    names = [rank_name(rank, layout) for rank in range(len(found.rows))]
    margin = max(map(len, names)) + 2
    for name, row in zip(names, found.rows, strict=True):
        count = "nothing is known" if row.done is None else f"{row.done} of {len(row.actions)} done"
        room = max(20, console.width - margin - len(count) - 2)
        console.print(f"{name.ljust(margin)}{_strip(row, room)}  {count}", soft_wrap=True)
        words = _around(row)
        if words:
            console.print(f"{' ' * margin}{words}", soft_wrap=True)
    console.print()


def _legend() -> str:
    return "  ".join(_coloured(state, f"{state.value} {state}") for state in State)


def _strip(row: Reached, room: int) -> str:
    """A sign for each action; of a long row what is around the place where it stopped."""
    states = row.states
    middle = row.at if row.at is not None else row.done or 0
    start = 0 if len(states) <= room else max(0, min(middle - room // 2, len(states) - room + 2))
    end = min(len(states), start + room - (2 if len(states) > room else 0))
    signs = "".join(_coloured(state, state.value) for state in states[start:end])
    return ("…" if start else "") + signs + ("…" if end < len(states) else "")


def _around(row: Reached) -> str:
    """`… ■ SEND_F s0 m0 ->1  ✗ F s0 m1  · SEND_F s0 m1 ->1 …`"""
    if row.done is None or row.done == len(row.actions):
        return ""
    middle = row.at if row.at is not None else row.done
    first, last = max(0, middle - _BEFORE), min(len(row.actions), middle + _AFTER + 1)
    shown = [_coloured(row.state_of(i), f"{row.state_of(i).value} {row.actions[i]}") for i in range(first, last)]
    return ("… " if first else "") + "   ".join(shown) + (" …" if last < len(row.actions) else "")


def _coloured(state: State, text: str) -> str:
    return f"[{_COLOURS[state]}]{escape(text)}[/]"


def _show_processes(console: Console, found: PostMortem) -> None:
    """A line each: narrow screens break it where it may be broken."""
    culprit = None if found.cause is None else found.cause.process
    margin = max(len(one.process) for one in found.flights) + 2
    for one in found.flights:
        name = escape(one.process.ljust(margin))
        is_culprit = one.own_failure or one.process == culprit
        mark = f"[bold red]✗ {name}[/]" if is_culprit else f"  {name}"
        console.print(f"{mark}{escape(_in_words(one))}", soft_wrap=True)


def _in_words(flight: FlightFile) -> str:
    """`step 3, 3 updates; F s1 m2, waits for RECV_F s1 m2 <-0 for 41.2 s; heard edge 41.3 s, cloud 0.2 s ago`"""
    step = "before the first step" if flight.step < 0 else f"step {flight.step}"
    now = flight.now
    if now is None:
        at = "between actions"
    else:
        waits = "" if now.waits_for is None else f", waits for {now.waits_for}"
        at = f"at {now.what}{waits} for {now.since_s:.1f} s"
    heard = ", ".join(f"{site} {ago:.1f} s" for site, ago in flight.last_heard_s.items() if ago is not None)
    parts = [f"{step}, {flight.steps_applied} update{'' if flight.steps_applied == 1 else 's'}", at]
    return "; ".join([*parts, f"heard {heard} ago"] if heard else parts)


def _show_stacks(console: Console, flights: Sequence[FlightFile]) -> None:
    for one in flights:
        console.print(f"\n[bold]{escape(one.process)}[/bold], main thread, innermost first", soft_wrap=True)
        for line in one.stack or ["(not recorded)"]:
            console.print(f"  {escape(line)}", soft_wrap=True)
