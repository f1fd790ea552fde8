"""The training loop of one process, the same on both sites.

    open the process (`process.py`) ─ ┌ forward-backward ─ optimizer step ┐ ─ leave
                                      └────────── iterations ─────────────┘

Only the edge shows a screen and writes metrics.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console

from ldt_schedules import device
from ldt_schedules.megatron import session, world
from ldt_schedules.megatron.checkpoints.site_directory import Saved
from ldt_schedules.megatron.checkpoints.site_saver import SiteSaver
from ldt_schedules.megatron.stopping_together import stopping_together
from ldt_schedules.topology import Site
from ldt_schedules.training.checkpointing import saver
from ldt_schedules.training.config import TrainConfig
from ldt_schedules.training.describe import describe_run
from ldt_schedules.training.forward_step import LossReport
from ldt_schedules.training.huggingface_model import save_weights
from ldt_schedules.training.measured import TraceWriter, trace_writer
from ldt_schedules.training.metrics import MetricsWriter
from ldt_schedules.training.process import Process, open_process
from ldt_schedules.training.reports import EvalReport, RunSummary, StepReport
from ldt_schedules.training.screens import TrainingScreen, first_screen, summary_screen

Report = StepReport | EvalReport | Saved


def run_site(config: TrainConfig, site: str, json_output: bool) -> None:
    """Be one process of `site` from start to end.

    Raises:
        ConfigError, LdtError: see `open_process`.
    """
    with stopping_together():
        process = open_process(config, Site(site))
        loop = Loop(process, trace_writer(config, process.place), saver(process.start, config, process.place))
        if process.place.site is Site.EDGE and process.place.site_rank == 0:
            _run_and_show(loop, json_output)
        else:
            for _ in loop.steps():
                pass
            _save(process)
        world.close_site()


def _save(process: Process) -> None:
    save_weights(process.config, process.trained.model, process.place, process.vocabulary.rows)


def _run_and_show(loop: Loop, json_output: bool) -> None:
    """The edge's first process: screen, metrics, summary."""
    config, data = loop.process.config, loop.process.data
    assert data is not None
    console = Console(stderr=json_output)
    console.print(first_screen(describe_run(config, data.vocab_size, data.contents)))
    for note in loop.process.start.notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    start, done, every = time.perf_counter(), loop.process.start.iteration, config.train.log_interval
    with (
        MetricsWriter(config.train.output_dir, done) as metrics,
        TrainingScreen(config.train.iterations, log_interval=every, done=done, console=console) as screen,
    ):
        for report in loop.steps():
            metrics.report(report)
            screen.report(report)
    _save(loop.process)
    last = loop.losses[-10:]
    summary = RunSummary(
        iterations=config.train.iterations,
        loss=sum(last) / len(last),
        validation_loss=loop.validation_loss,
        unigram_entropy=data.unigram_entropy(),
        bytes_up=loop.bytes_up,
        bytes_down=loop.bytes_down,
        elapsed_s=time.perf_counter() - start,
        metrics_path=str(metrics.path),
        saved=config.train.save_hf,
    )
    console.print(summary_screen(summary))
    if json_output:
        json.dump(asdict(summary), sys.stdout)
        sys.stdout.write("\n")


@dataclass
class Loop:
    """Steps of one process; the edge's first process reads what they report."""

    process: Process
    trace: TraceWriter | None
    saver: SiteSaver | None
    losses: list[float] = field(default_factory=list)
    validation_loss: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0

    def steps(self) -> Iterator[Report]:
        """Train; yields a report of each step, evaluation and checkpoint (in the cloud the first two say nothing)."""
        train = self.process.config.train
        source = self.process.microbatches("train")
        for iteration in range(self.process.start.iteration + 1, train.iterations + 1):
            yield self._step(iteration, source)
            if train.eval_interval and iteration % train.eval_interval == 0:
                yield self._evaluate(iteration)
            yield from self._checkpoints(iteration)
        yield from self.saver.finish() if self.saver is not None else ()

    def _checkpoints(self, iteration: int) -> Iterator[Saved]:
        """Those that are complete now; after every `save_interval` steps and the last one another is begun."""
        train = self.process.config.train
        if self.saver is None:
            return
        if iteration % train.save_interval == 0 or iteration == train.iterations:
            samples = self.process.start.consumed_samples
            samples += (iteration - self.process.start.iteration) * train.global_batch_size
            with self._at("saving a checkpoint"):
                complete = self.saver.save(self.process.trainee, iteration, samples)
            yield from complete
        else:
            yield from self.saver.poll()

    def _at(self, what: str) -> AbstractContextManager[None]:
        """Inside, this process is at something that is no action of the table."""
        run = session.current()
        return nullcontext() if run is None else run.link.flight.doing(what)

    def _step(self, iteration: int, source: Iterator[Any] | None) -> StepReport:
        config = self.process.config
        start = time.perf_counter()
        self.process.zero_gradients()
        reports = self.process.forward_backward(source, forward_only=False)
        groups = self.process.trained.optimizer.param_groups
        lr = groups[0]["lr"] if groups else 0.0  # a process whose part of the model is frozen has none
        stepped, grad_norm = self.process.update()
        loss, tokens, up, down = self._reduced(reports)
        step_s = time.perf_counter() - start
        self.losses.append(loss)
        run = session.current()
        if self.trace is not None and run is not None:
            self.trace.step(iteration, run.last_step)
        return StepReport(
            iteration=iteration,
            loss=loss,
            grad_norm=grad_norm,
            lr=lr,
            tokens_per_s=tokens / step_s,
            tokens_per_sample=tokens / config.train.global_batch_size if config.train.log_tps else None,
            bytes_up=up,
            bytes_down=down,
            bubble=None if run is None else 1 - run.last_step.busy_s() / run.last_step.step_s,
            skipped=not stepped,
            step_s=step_s,
        )

    def _evaluate(self, iteration: int) -> EvalReport:
        train, model = self.process.config.train, self.process.trained.model
        source = self.process.microbatches("validation")
        model.eval()
        with torch.no_grad():
            losses = [
                self._reduced(self.process.forward_backward(source, forward_only=True))[0]
                for _ in range(train.eval_iterations)
            ]
        model.train()
        self.validation_loss = sum(losses) / len(losses)
        return EvalReport(iteration, self.validation_loss, train.eval_iterations * train.global_batch_size)

    def _reduced(self, reports: list[LossReport]) -> tuple[float, int, int, int]:
        """Loss in nats a token, tokens read, bytes up and bytes down of this step, over all processes of the edge."""
        total = torch.zeros(5, dtype=torch.float64)
        if self.process.place.tensor_rank == 0:
            for report in reports:
                loss_sum, tokens = report["lm loss"].cpu()
                # Without per-token loss a step minimises the mean over microbatches of their means.
                weight = 1.0 if self.process.config.train.calculate_per_token_loss else float(tokens)
                total[:2] += torch.stack([loss_sum / weight, tokens / weight])
        total[2:] = torch.tensor((sum(self.process.tokens), *self._traffic()), dtype=torch.float64)
        self.process.tokens.clear()
        if self.process.place.site is Site.EDGE and torch.distributed.get_world_size() > 1:
            total = total.to(device.current_device())
            torch.distributed.all_reduce(total)
        loss_sum, count, tokens, up, down = total.tolist()
        self.bytes_up += int(up)
        self.bytes_down += int(down)
        return (loss_sum / count if count else float("nan")), int(tokens), int(up), int(down)

    def _traffic(self) -> tuple[int, int]:
        """Bytes this process sent and received since it was last asked; all of an edge process's cross the link."""
        run = session.current()
        if run is None:
            return 0, 0
        return run.transport.traffic.take()
