"""What a person sees of a verification: errors by step, the verdict, and what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ldt_schedules.training.verification.diagnosis import DIFFERS
from ldt_schedules.training.verification.gate import PlantedResult
from ldt_schedules.training.verification.report import Report, StepErrors
from ldt_schedules.training.verification.tolerances import Tolerances

_FP64_HINT = "model.precision=fp64 tells rounding from a mistake: there rounding all but vanishes, and a mistake stays"
_LEFT_OUT = "their gradients are so small that Adam steps by their rounding"


def report_screen(report: Report) -> RenderableType:
    """Table, verdict, findings, tolerances."""
    parts: list[RenderableType] = [_steps(report.steps), _verdict(report)]
    parts += [Text(f"  {finding.text}") for finding in report.findings]
    if report.precision != "fp64" and any(finding.cause == DIFFERS.one for finding in report.findings):
        parts.append(Text(f"  {_FP64_HINT}", style="dim"))
    left_out = report.steps[-1].left_out
    if left_out:
        parts.append(Text(f"{left_out:.2%} of all weights left out: {_LEFT_OUT}", style="dim"))
    return Group(*parts, Text(_allowed(report.tolerances, report.precision), style="dim"))


def _steps(steps: Sequence[StepErrors]) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("step", "loss", "gradient", "of", "norm", "weights", "copies"):
        table.add_column(name, justify="left" if name in ("of", "copies") else "right", overflow="fold")
    for step in steps:
        worst = step.worst_gradient
        table.add_row(
            str(step.step) if step.step else "start",
            _number(step.loss),
            "skipped" if step.skipped else _number(None if worst is None else step.gradients[worst]),
            (worst or "").removeprefix("decoder.").removesuffix(".weight"),  # so that a line is a step
            _number(step.grad_norm),
            _number(max(step.weights.values(), default=None)),
            "equal" if step.replicas_identical else "DIFFER",
        )
    return table


def _verdict(report: Report) -> Text:
    if not report.passed:
        return Text("NOT PASSED: the split run is not the model in one process", style="bold red")
    steps = f"{report.compared_steps} step{'s' if report.compared_steps != 1 else ''}"
    return Text(f"PASSED: {steps} of the split run are those of the model in one process", style="bold green")


def _allowed(tolerances: Tolerances, precision: str) -> str:
    return f"allowed ({precision}): " + ", ".join(f"{kind} {value:g}" for kind, value in asdict(tolerances).items())


def self_test_screen(clean: Report, results: Sequence[PlantedResult]) -> RenderableType:
    """Which planted error was caught, and what was said of it."""
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("planted error", "caught", "named", "the gate says"):
        table.add_column(name, overflow="fold")
    for result in results:
        if result.not_for is not None:
            table.add_row(result.planted.name, "–", "–", Text(f"does not apply: {result.not_for}", style="dim"))
        else:
            table.add_row(result.planted.name, _yes(result.caught), _yes(result.named), result.says or "nothing")
    return Group(table, _self_test_verdict(clean, results))


def _self_test_verdict(clean: Report, results: Sequence[PlantedResult]) -> Text:
    tried = [result for result in results if result.not_for is None]
    good = sum(result.passed for result in tried)
    count = f"{good} of {len(tried)} planted errors were caught and named"
    if clean.passed and good == len(tried):
        return Text(f"SELF-TEST PASSED: the clean run passes, {count}", style="bold green")
    clean_run = "passes" if clean.passed else "does not pass"
    return Text(f"SELF-TEST NOT PASSED: the clean run {clean_run}, {count}", style="bold red")


def _yes(flag: bool) -> Text:
    return Text("yes") if flag else Text("NO", style="bold red")


def _number(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"
