"""The training loop of one process, the same on both sites.

    open the site's world ─ join the link ─ agree on the config ─ build ─ ┌ forward-backward ─ optimizer step ┐ ─ leave
                                                                          └────────── iterations ─────────────┘

Only the edge opens data, shows a screen and writes metrics.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules
from rich.console import Console

import patches
from ldt_schedules import device
from ldt_schedules.megatron import session, world
from ldt_schedules.topology import Place, Site
from ldt_schedules.training.config import TrainConfig
from ldt_schedules.training.data import Split, TokenDataset, batches, open_dataset
from ldt_schedules.training.describe import describe_run, padded_vocab_size
from ldt_schedules.training.forward_step import LossReport, forward_step
from ldt_schedules.training.handshake import agree
from ldt_schedules.training.measured import TraceWriter, trace_writer
from ldt_schedules.training.metrics import MetricsWriter
from ldt_schedules.training.model import Trained, build
from ldt_schedules.training.reports import EvalReport, RunSummary, StepReport
from ldt_schedules.training.schedule import table_source
from ldt_schedules.training.screens import TrainingScreen, first_screen, summary_screen

_NO_EMBEDDING = 128  # rows of an embedding that the cloud does not have


def run_site(config: TrainConfig, site: str, json_output: bool) -> None:
    """Be one process of `site` from start to end. RANK, MASTER_ADDR and MASTER_PORT are the site's own.

    Raises:
        ConfigError: a user's mistake, found before anything expensive.
        LdtError: the other site failed or fell silent.
    """
    topology = config.topology
    place = topology.place(Site(site), int(os.environ["RANK"]))
    torch.set_num_threads(config.train.threads)
    device.select_device(int(os.environ.get("LOCAL_RANK", "0")))
    tables = table_source(config) if config.num_pipeline_ranks > 1 else None
    dataset = open_dataset(config) if place.site is Site.EDGE else None
    patches.apply_all()
    here = world.Address(host=os.environ["MASTER_ADDR"], port=int(os.environ["MASTER_PORT"]))
    world.open_site(topology, place, here, config.link.timeout_s, config.train.seed)
    if tables is not None:
        link = world.Address(host=config.link.host, port=config.link.port)
        run = world.join_link(topology, place, link, tables, config.link.timeout_s, config.link.backend)
        agree(config, run)
    vocab_size = _NO_EMBEDDING if dataset is None else dataset.corpus.vocab_size
    trained = build(config, topology, place, padded_vocab_size(vocab_size, topology.size(place.site).tensor))
    loop = _Loop(config, place, trained, dataset, trace_writer(config, place))
    if place.site is Site.EDGE and place.site_rank == 0:
        _run_and_show(loop, vocab_size, json_output)
    else:
        for _ in loop.steps():
            pass
    world.close_site()


def _run_and_show(loop: _Loop, vocab_size: int, json_output: bool) -> None:
    """The edge's first process: screen, metrics, summary."""
    config, dataset = loop.config, loop.dataset
    assert dataset is not None
    console = Console(stderr=json_output)
    console.print(first_screen(describe_run(config, vocab_size)))
    start = time.perf_counter()
    with (
        MetricsWriter(config.train.output_dir) as metrics,
        TrainingScreen(config.train.iterations, log_interval=config.train.log_interval, console=console) as screen,
    ):
        for report in loop.steps():
            if isinstance(report, StepReport):
                metrics.step(report)
                screen.step(report)
            else:
                metrics.evaluation(report)
                screen.evaluation(report)
    last = loop.losses[-10:]
    summary = RunSummary(
        iterations=config.train.iterations,
        loss=sum(last) / len(last),
        validation_loss=loop.validation_loss,
        unigram_entropy=dataset.corpus.unigram_entropy(),
        bytes_up=loop.bytes_up,
        bytes_down=loop.bytes_down,
        elapsed_s=time.perf_counter() - start,
        metrics_path=str(metrics.path),
    )
    console.print(summary_screen(summary))
    if json_output:
        json.dump(asdict(summary), sys.stdout)
        sys.stdout.write("\n")


@dataclass
class _Loop:
    """Steps of one process; the edge's first process reads what they report."""

    config: TrainConfig
    place: Place
    trained: Trained
    dataset: TokenDataset | None
    trace: TraceWriter | None
    losses: list[float] = field(default_factory=list)
    validation_loss: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0

    def steps(self) -> Iterator[StepReport | EvalReport]:
        """Train; yields a report after each step and each evaluation (in the cloud they say nothing)."""
        train = self.config.train
        source = self._batches("train")
        for iteration in range(1, train.iterations + 1):
            yield self._step(iteration, source)
            if train.eval_interval and iteration % train.eval_interval == 0:
                yield self._evaluate(iteration)

    def _step(self, iteration: int, source: Iterator[Any] | None) -> StepReport:
        trained, train = self.trained, self.config.train
        start = time.perf_counter()
        trained.model.zero_grad_buffer()
        trained.optimizer.zero_grad()
        reports = self._forward_backward(source, forward_only=False)
        lr = trained.optimizer.param_groups[0]["lr"]
        stepped, grad_norm, _ = trained.optimizer.step()
        if stepped:
            trained.scheduler.step(increment=1)
        loss, up, down = self._reduced(reports)
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
            tokens_per_s=train.global_batch_size * self.config.model.seq_length / step_s,
            bytes_up=up,
            bytes_down=down,
            bubble=None if run is None else 1 - run.last_step.busy_s() / run.last_step.step_s,
            skipped=not stepped,
            step_s=step_s,
        )

    def _evaluate(self, iteration: int) -> EvalReport:
        train = self.config.train
        source = self._batches("validation")
        self.trained.model.eval()
        with torch.no_grad():
            losses = [
                self._reduced(self._forward_backward(source, forward_only=True))[0]
                for _ in range(train.eval_iterations)
            ]
        self.trained.model.train()
        self.validation_loss = sum(losses) / len(losses)
        return EvalReport(iteration, self.validation_loss, train.eval_iterations * train.global_batch_size)

    def _batches(self, split: Split) -> Iterator[Any] | None:
        """Microbatches of this replica; None where they come by broadcast or are not wanted."""
        if self.dataset is None or self.place.tensor_rank != 0:
            return None
        source = batches(self.dataset, self.config, split=split, data_rank=self.place.data_rank)
        where = device.current_device()
        return ({name: tensor.to(where) for name, tensor in batch.items()} for batch in source)

    def _forward_backward(self, source: Iterator[Any] | None, forward_only: bool) -> list[LossReport]:
        return schedules.get_forward_backward_func()(  # type: ignore[no-any-return]
            forward_step_func=forward_step,
            data_iterator=source,
            model=[self.trained.model],
            num_microbatches=self.config.num_microbatches,
            seq_length=self.config.model.seq_length,
            micro_batch_size=self.config.train.micro_batch_size,
            decoder_seq_length=self.config.model.seq_length,
            forward_only=forward_only,
        )

    def _reduced(self, reports: list[LossReport]) -> tuple[float, int, int]:
        """Loss in nats a token, bytes up and bytes down of this step, over all processes of the edge."""
        total = torch.zeros(4, dtype=torch.float64)
        if self.place.tensor_rank == 0:
            for report in reports:
                loss_sum, tokens = report["lm loss"].cpu()
                # Without per-token loss a step minimises the mean over microbatches of their means.
                weight = 1.0 if self.config.train.calculate_per_token_loss else float(tokens)
                total[:2] += torch.stack([loss_sum / weight, tokens / weight])
        total[2:] = torch.tensor(self._traffic(), dtype=torch.float64)
        if self.place.site is Site.EDGE and torch.distributed.get_world_size() > 1:
            total = total.to(device.current_device())
            torch.distributed.all_reduce(total)
        loss_sum, count, up, down = total.tolist()
        self.bytes_up += int(up)
        self.bytes_down += int(down)
        return (loss_sum / count if count else float("nan")), int(up), int(down)

    def _traffic(self) -> tuple[int, int]:
        """Bytes this process sent and received since it was last asked; all of an edge process's cross the link."""
        run = session.current()
        if run is None:
            return 0, 0
        return run.transport.traffic.take()
