"""What a person sees: who runs what, then the run going by, then what came of it.

On a terminal a progress bar is redrawn in place. Elsewhere (a log file, CI) there is a plain line every
`log_interval` steps. The texts are functions of the records in `reports.py`, so that tests read them without a run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import TracebackType

from rich import box
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from ldt_schedules.megatron.checkpoints.site_directory import Saved
from ldt_schedules.training.reports import EvalReport, LinkUse, RankRow, RunDescription, RunSummary, StepReport

_BAR_WIDTH = 16
_MIN_WIDTH = {"site": 5, "pipeline rank": 8, "processes": 9, "layers": 6, "parameters": 10, "holds": 10}
_NEVER_CROSSES = "data, tokens, labels, loss masks, logits, loss, and the first and last layers"
_NEVER_CROSSES_OF_IMAGES = (
    "pixels, tokens, labels, loss masks, logits, loss, and the weights of patch embedding, projector, embedding and output "
    "layer"
)


def first_screen(run: RunDescription) -> RenderableType:
    """Who runs what, what crosses the link and what never does."""
    title = Text("LDT Schedules  ", style="bold").append(run.model, style="not bold")
    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(run):
        facts.add_row(Text(name, style="bold"), Text(value))
    return Group(title, "", _who(run), "", facts, "")


def _facts(run: RunDescription) -> list[tuple[str, str]]:
    steps = (
        f"{run.iterations} steps of {run.global_batch_size} samples ({run.tokens_per_step:,} tokens), "
        f"{run.num_microbatches} microbatch{'es' if run.num_microbatches > 1 else ''} for each replica"
    )
    facts = [("data", f"{run.data} (opened on the edge only)"), ("run", steps), ("schedule", run.schedule)]
    if run.frozen:
        learn = f"{human_count(run.trained_parameters)} of {human_count(run.parameters)} parameters learn"
        facts.append(("frozen", f"{', '.join(run.frozen)}: {learn}"))
    if run.link is None:
        facts.append(("link", "none: everything runs on the edge"))
    else:
        never = _NEVER_CROSSES if run.link.vision_shape is None else _NEVER_CROSSES_OF_IMAGES
        facts += [("link", run.link.address), ("crosses it", _crossing(run.link)), ("never crosses", never)]
    if run.bare:
        facts.append(
            (
                "beware",
                f"no layer of the edge stands between {' or '.join(run.bare)} and the link: who knows these weights can read "
                "the data off what crosses; give the edge a layer there",
            )
        )
    return [*facts, ("output", run.output_dir)]


def _crossing(link: LinkUse) -> str:
    tensors, told = f"[s, b, h] = {_shape(link.shape)} {link.dtype}: ", "shapes"
    if link.segmented:
        told = "shapes, where each conversation and padding begin"
    if link.vision_shape is not None:
        first = f"[patches, 1, h] = about {_shape(link.vision_shape)} on the first lap, "
        tensors = f"{first}[s, b, h] = {_shape(link.shape)} on the second, {link.dtype}: about "
        told = "sizes of the images, positions of the tokens, where samples and padding begin"
    return (
        f"activations and their gradients, {tensors}"
        f"up {human_bytes(link.up_bytes_per_microbatch)} and down {human_bytes(link.down_bytes_per_microbatch)} "
        f"a microbatch, {human_bytes(link.up_bytes_per_step)} and {human_bytes(link.down_bytes_per_step)} a step; "
        f"a step header ({told}, step number, plan) and three sums (gradient norm, found-inf, tokens)"
    )


def _shape(sizes: Iterable[int]) -> str:
    return "×".join(map(str, sizes))


def _who(run: RunDescription) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("site", "pipeline rank", "processes", "layers", "parameters", "holds"):
        numeric = name in ("pipeline rank", "processes", "parameters")
        # On a narrow terminal the words of the last column wrap; numbers and names stay whole.
        table.add_column(name, justify="right" if numeric else "left", min_width=_MIN_WIDTH[name], overflow="fold")
    for row in run.ranks:
        style = "cyan" if row.site == "edge" else "magenta"
        cells = (str(row.pipeline_rank), str(row.processes), _layers(row), human_count(row.parameters))
        table.add_row(Text(row.site, style=style), *cells, ", ".join(row.holds) or "layers only")
    total = sum(row.processes for row in run.ranks)
    table.add_section()
    table.add_row("both" if run.link else "all", "", str(total), "", human_count(run.parameters), "")
    return table


def _layers(row: RankRow) -> str:
    if row.vision_layers is None:
        return _spans(row.layers) or "none"
    return f"vision {_spans(row.vision_layers) or '-'}; language {_spans(row.layers) or '-'}"


def _spans(layers: Iterable[tuple[int, int]]) -> str:
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in layers)


def step_figures(step: StepReport, width: int = 10_000) -> str:
    """One step on one line; figures are left out from the least important on until `width` characters hold it."""
    figures = [
        (0, f"loss {step.loss:.4f}" + (" SKIPPED" if step.skipped else "")),
        (2, f"grad {_number(step.grad_norm)}"),
        (1, f"{step.tokens_per_s:,.0f} tok/s"),
        (3, f"up {human_bytes(step.bytes_up)} down {human_bytes(step.bytes_down)}"),
        (6, "" if step.tokens_per_sample is None else f"{step.tokens_per_sample:,.0f} tok/sample"),
        (4, f"bubble {'?' if step.bubble is None else f'{step.bubble:.0%}'}"),
        (5, f"lr {step.lr:.2e}"),
    ]
    for least in range(6, -1, -1):
        line = "  ".join(text for importance, text in figures if text and importance <= least)
        if len(line) <= width:
            return line
    return line


def plain_step(step: StepReport, iterations: int, eta_s: float) -> str:
    """A line for a log."""
    return f"step {step.iteration}/{iterations}  {step_figures(step)}  eta {human_time(eta_s)}"


def evaluation_line(evaluation: EvalReport) -> str:
    """A line for a log or above the bar."""
    return f"evaluation after step {evaluation.iteration}: loss {evaluation.loss:.4f} ({evaluation.samples} samples)"


def checkpoint_line(saved: Saved) -> str:
    """The same of a checkpoint; how large it is on the edge alone."""
    return (
        f"checkpoint after step {saved.iteration}: {saved.path} ({human_bytes(saved.num_bytes)} on the edge, training waited "
        f"{saved.waited_s:.2f} s)"
    )


def summary_screen(summary: RunSummary) -> RenderableType:
    """What came of the run."""
    rows = [
        ("steps", f"{summary.iterations} in {human_time(summary.elapsed_s)}"),
        ("loss", f"{summary.loss:.4f} nats/token{_against_entropy(summary.loss, summary.unigram_entropy)}"),
        ("across the link", f"up {human_bytes(summary.bytes_up)}, down {human_bytes(summary.bytes_down)}"),
        ("metrics", summary.metrics_path),
    ]
    if summary.saved is not None:
        rows.append(("weights", f"{summary.saved}; a cloud on another machine has its files in its own train.save_hf"))
    if summary.validation_loss is not None:
        rows.insert(2, ("validation loss", f"{summary.validation_loss:.4f} nats/token"))
    grid = Table.grid(padding=(0, 2))
    for name, value in rows:
        grid.add_row(Text(name, style="bold"), Text(value, overflow="fold"))
    return Group("", grid)


def _against_entropy(loss: float, entropy: float | None) -> str:
    """One number a person can judge a small run by: is context used at all?"""
    if entropy is None:
        return ""
    verdict = f"{entropy - loss:.2f} below" if entropy >= loss else f"{loss - entropy:.2f} above"
    return f", {verdict} the corpus's unigram entropy ({entropy:.4f})"


class TrainingScreen:
    """Shows a run as it goes; use as a context manager around the training loop.

    Args:
        iterations: steps of the run; `done` of them are behind us already (a resumed run).
        log_interval: steps between lines where the output is no terminal.
        console: rich's; by default standard output. With --json give `Console(stderr=True)`.
    """

    def __init__(
        self, iterations: int, *, log_interval: int = 10, done: int = 0, console: Console | None = None
    ) -> None:
        self.console = console or Console()
        self._iterations, self._log_interval, self._done = iterations, log_interval, done
        self._seconds: float | None = None
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> TrainingScreen:
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                BarColumn(_BAR_WIDTH),
                TextColumn("{task.fields[now]}"),
            )
            self._progress = Progress(*columns, console=self.console)
            self._task = self._progress.add_task("", total=self._iterations, completed=self._done, now="first step…")
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def report(self, report: StepReport | EvalReport | Saved) -> None:
        """Show what just happened."""
        if isinstance(report, StepReport):
            self._step(report)
        elif isinstance(report, EvalReport):
            self._say(evaluation_line(report))
        else:
            self._say(checkpoint_line(report))

    def _step(self, report: StepReport) -> None:
        eta_s = self._eta_s(report)
        if self._progress is not None:
            room = self.console.width - _BAR_WIDTH - 2 * len(str(self._iterations)) - len("eta 00:00:00") - 8
            now = f"{step_figures(report, room)}  eta {human_time(eta_s)}"
            self._progress.update(self._task, completed=report.iteration, now=now)
        elif report.iteration % self._log_interval == 0 or report.iteration in (self._done + 1, self._iterations):
            self._say(plain_step(report, self._iterations, eta_s))

    def _say(self, line: str) -> None:
        # soft_wrap: a log line stays one line, however narrow rich believes the file is.
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _eta_s(self, report: StepReport) -> float:
        """Seconds left; steps are averaged with a memory of about ten, the slow first one is not taken along."""
        first = report.iteration <= self._done + 2
        self._seconds = report.step_s if first or self._seconds is None else 0.9 * self._seconds + 0.1 * report.step_s
        return self._seconds * (self._iterations - report.iteration)


def human_bytes(count: float) -> str:
    """`1536000` -> `1.54 MB`; powers of 1000."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB", "PB"), " ")


def human_count(count: float) -> str:
    """`1536000` -> `1.54M`."""
    return _scaled(count, ("", "k", "M", "B", "T"), "")


def human_time(seconds: float) -> str:
    """`75` -> `1:15`; `3675` -> `1:01:15`."""
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _scaled(count: float, units: tuple[str, ...], gap: str) -> str:
    power = 0
    while count >= 999.5 and power < len(units) - 1:
        count, power = count / 1000, power + 1
    number = f"{count:.0f}" if power == 0 or count >= 99.95 else f"{count:.3g}"
    return f"{number}{gap}{units[power]}"


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.3g}" if math.isfinite(value) else str(value)
