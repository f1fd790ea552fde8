"""What `ldt doctor` shows of an installation and of a link."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ldt_schedules.comm.probe.figures import LinkFigures
from ldt_schedules.training.installation import Installation
from ldt_schedules.training.link_check import LinkReport
from ldt_schedules.training.link_forecast import Forecast, time_text

_GIB, _MIB = 2**30, 2**20
_CLOCKS_MATTER_S = 0.1
"""Clocks further apart make logs of both sites hard to read side by side."""


def show_installation(found: Installation) -> None:
    """This machine: versions, devices, and what is wrong."""
    console = Console(highlight=False)
    memory = "" if found.memory_bytes is None else f", {_size(found.memory_bytes)} of memory"
    console.print(f"[bold]{escape(found.host)}[/bold]: {found.system}, {found.cores} cores{memory}", soft_wrap=True)
    table = _new(("package", "version", "wanted", ""))
    for one in found.components:
        state = "[green]ok[/green]" if one.problem is None else f"[red]✗[/red] {escape(one.problem)}"
        table.add_row(one.name, one.version or "-", one.wanted or "any", state)
    console.print(table)
    for number, device in enumerate(found.devices):
        console.print(f"device {number}: {escape(device.name)}, {_size(device.memory_bytes)}", soft_wrap=True)
    if found.device_type is not None:
        kind = (
            "no accelerator: runs on the CPU" if found.device_type == "cpu" else f"devices of type {found.device_type}"
        )
        console.print(f"{kind}; torch.distributed has {', '.join(found.backends) or 'no backend'}", soft_wrap=True)
    if found.problem is not None:
        console.print(f"[red]✗[/red] {escape(found.problem)}", soft_wrap=True)
    count = len(found.problems)
    if count:
        console.print(f"[bold red]{count} thing{'s' if count > 1 else ''} to mend[/bold red]")
    else:
        console.print("[bold green]a run can start here[/bold green]; its link: ldt doctor CONFIG --site edge|cloud")


def show_link(report: LinkReport) -> None:
    """What both sites found of each other."""
    console = Console(highlight=False)
    where = f"edge {report.hosts['edge']}, cloud {report.hosts['cloud']} at {report.address}"
    console.print(f"[bold]{escape(where)}[/bold]", soft_wrap=True)
    if report.here:
        console.print(
            "[yellow]both ends are on this machine[/yellow]: these figures say nothing of your link", soft_wrap=True
        )
    _show_differences(console, report)
    console.print(_link_table(report.link))
    for note in _notes(report.link):
        console.print(note, soft_wrap=True)
    if not report.here:
        console.print(f"as measured, for ldt plan: {_as_overrides(report.link)}", soft_wrap=True)
    if report.forecast is not None:
        _show_forecast(console, report.forecast)


def _show_differences(console: Console, report: LinkReport) -> None:
    if report.differing_config:
        console.print(
            "[bold red]✗ the two sites have different configs[/bold red]; give both the same file and overrides"
        )
        for line in report.differing_config:
            console.print(f"  {escape(line)}", soft_wrap=True)
    else:
        console.print("[green]✓[/green] the same config and schedule")
    if report.differing_versions:
        console.print(
            "[yellow]! different versions[/yellow]; better the same on both, results may differ in the last bits"
        )
        for line in report.differing_versions:
            console.print(f"  {escape(line)}", soft_wrap=True)
    else:
        versions = ", ".join(f"{name} {version}" for name, version in report.versions["edge"].items())
        console.print(f"[green]✓[/green] the same versions: {escape(versions)}", soft_wrap=True)


def _link_table(link: LinkFigures) -> Table:
    table = _new(("the link", "", ""))
    table.add_row(
        "round trip", time_text(link.rtt_s),
        f"median of {link.num_pings}; least {time_text(link.rtt_min_s)}, 95% within {time_text(link.rtt_p95_s)}",
    )  # fmt: skip
    table.add_row("edge → cloud", _rate(link.up), "one TCP connection, sustained")
    table.add_row("cloud → edge", _rate(link.down), "")
    ahead = "ahead of" if link.clock_ahead_s >= 0 else "behind"
    table.add_row(
        "clocks", time_text(abs(link.clock_ahead_s)),
        f"the cloud's is {ahead} the edge's, ± {time_text(link.clock_uncertain_s)}",
    )  # fmt: skip
    sizes = [
        f"{site} MTU {mtu or 'unknown'}, MSS {mss or 'unknown'}"
        for site, mtu, mss in (("edge", link.edge_mtu, link.edge_mss), ("cloud", link.cloud_mtu, link.cloud_mss))
    ]
    table.add_row("packets", "", "; ".join(sizes) + " bytes")
    return table


def _as_overrides(link: LinkFigures) -> str:
    """The config's keys for one way and the slower direction."""
    gbps = min(link.up, link.down) * 8 / 1e9
    return f"hardware.link_latency_ms={1e3 * link.rtt_s / 2:.3g} hardware.link_bandwidth_gbps={gbps:.3g}"


def _notes(link: LinkFigures) -> list[str]:
    notes = []
    slow, fast = sorted((link.up, link.down))
    if fast > 3 * slow:
        notes.append("[yellow]![/yellow] one direction is more than three times as fast as the other")
    if link.rtt_p95_s > 3 * link.rtt_s and link.rtt_p95_s > 1e-3:
        notes.append("[yellow]![/yellow] round trips vary much: something else uses the way, or a machine is busy")
    if abs(link.clock_ahead_s) > max(_CLOCKS_MATTER_S, 2 * link.clock_uncertain_s):
        notes.append(
            "[yellow]![/yellow] the clocks differ: times in both sites' logs do not go together; set them by NTP"
        )
    if link.edge_mtu and link.cloud_mtu and link.edge_mtu != link.cloud_mtu:
        notes.append("[yellow]![/yellow] the MTUs differ: large packets may get lost on the way (a VPN, jumbo frames)")
    return notes


def _show_forecast(console: Console, forecast: Forecast) -> None:
    table = _new(("a step sends", "messages", "bytes", "each"))
    for row in forecast.rows:
        way = "edge → cloud" if row.direction == "up" else "cloud → edge"
        kind = f"{row.what}s {way}" + ("" if row.step == "training" else f" ({row.step})")
        table.add_row(escape(kind), str(row.messages), _size(row.bytes), _size(row.bytes / max(row.messages, 1)))
    console.print(table)
    console.print(
        f"{forecast.num_microbatches} microbatches; their bytes hold the wire for {time_text(forecast.up_wire_s)} up and "
        f"{time_text(forecast.down_wire_s)} down",
        soft_wrap=True,
    )
    if forecast.step_s is not None and forecast.declared_step_s is not None and forecast.unlinked_step_s is not None:
        console.print(
            f"simulated step: {time_text(forecast.step_s)} (bubble {forecast.bubble:.1%}) over this link, "
            f"{time_text(forecast.declared_step_s)} over the one that hardware declares, "
            f"{time_text(forecast.unlinked_step_s)} over one of no cost",
            soft_wrap=True,
        )
    for line in forecast.assumed:
        console.print(f"[yellow]![/yellow] {escape(line)}", soft_wrap=True)
    console.print(f"[bold]{escape(forecast.verdict)}[/bold]", soft_wrap=True)


def _new(columns: tuple[str, ...]) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False)
    for number, column in enumerate(columns):
        right = number and column in ("messages", "bytes", "each")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    return table


def _rate(rate: float) -> str:
    """Bytes a second as people speak of links."""
    for scale, name in ((1e9, "Gbit/s"), (1e6, "Mbit/s")):
        if rate * 8 >= scale:
            return f"{rate * 8 / scale:.3g} {name}"
    return f"{rate * 8 / 1e3:.3g} kbit/s"


def _size(amount: float) -> str:
    for scale, name in ((_GIB, "GiB"), (_MIB, "MiB"), (2**10, "KiB")):
        if amount >= scale:
            return f"{amount / scale:.3g} {name}"
    return f"{amount:g} B"
