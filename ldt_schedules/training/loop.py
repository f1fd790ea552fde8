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
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules
from rich.console import Console

import patches
from ldt_schedules import device
from ldt_schedules.megatron import session, world
from ldt_schedules.megatron.checkpoints.site_directory import Saved
from ldt_schedules.megatron.checkpoints.site_saver import SiteSaver
from ldt_schedules.megatron.checkpoints.site_state import Trainee, check_savable
from ldt_schedules.megatron.segments import SegmentedMicrobatches
from ldt_schedules.megatron.stopping_together import stopping_together
from ldt_schedules.topology import Place, Site
from ldt_schedules.training.checkpointing import Start, find_start, restore, saver
from ldt_schedules.training.config import TrainConfig
from ldt_schedules.training.data import Split
from ldt_schedules.training.describe import describe_run
from ldt_schedules.training.forward_step import LossReport, forward_step, vision_language_step
from ldt_schedules.training.handshake import agree
from ldt_schedules.training.huggingface_model import check_save, save_weights
from ldt_schedules.training.measured import TraceWriter, trace_writer
from ldt_schedules.training.metrics import MetricsWriter
from ldt_schedules.training.model import Trained, build
from ldt_schedules.training.reports import EvalReport, RunSummary, StepReport
from ldt_schedules.training.run_data import RunData, open_data
from ldt_schedules.training.schedule import table_source
from ldt_schedules.training.screens import TrainingScreen, first_screen, summary_screen
from ldt_schedules.training.tensor_parallel_batches import over_tensor_parallel
from ldt_schedules.training.vision_model import announce_microbatches
from ldt_schedules.training.vocabulary import Vocabulary

Report = StepReport | EvalReport | Saved


@dataclass(frozen=True)
class Process:
    """One process of a run: its site's world is open, the sites agree, its part of the model is built.

    Attributes:
        data: at the edge; None in the cloud.
        vocabulary: of the model; in the cloud, which has no embedding, of no meaning.
        start: what was done before.
        tokens: what this process has read since it was last asked, padding left out.
    """

    config: TrainConfig
    place: Place
    trained: Trained
    data: RunData | None
    vocabulary: Vocabulary
    start: Start
    tokens: list[int] = field(default_factory=list)

    @property
    def trainee(self) -> Trainee:
        """What a checkpoint keeps."""
        return Trainee(self.trained.model, self.trained.optimizer, self.trained.scheduler)

    def microbatches(self, split: Split) -> Iterator[Any] | None:
        """Microbatches of this replica; None where they come by broadcast or are not wanted.

        Those of training begin where an earlier run ended.
        """
        source = self._read(self.data, split) if self.data is not None and self.place.tensor_rank == 0 else None
        # What the middle layers must be told of a microbatch every process of the edge must know.
        if self.data is not None and self.data.announced:
            return over_tensor_parallel(source)
        return source

    def _read(self, data: RunData, split: Split) -> Iterator[Any]:
        where = device.current_device()
        consumed = self.start.consumed_samples if split == "train" else 0
        for batch in data.microbatches(split, self.place.data_rank, consumed_samples=consumed):
            self.tokens.append(data.tokens_of(batch))
            yield {name: tensor.to(where) for name, tensor in batch.items()}

    def zero_gradients(self) -> None:
        """Before the forward-backward of a training step."""
        self.trained.model.zero_grad_buffer()
        self.trained.optimizer.zero_grad()

    def forward_backward(self, source: Iterator[Any] | None, forward_only: bool) -> list[LossReport]:
        """All microbatches of a step; gradients are reduced and final. Reports of each microbatch, at the edge."""
        train = self.config.train
        replicas = self.config.topology.size(self.place.site).data
        return schedules.get_forward_backward_func()(  # type: ignore[no-any-return]
            forward_step_func=vision_language_step if self.config.has_vision else forward_step,
            data_iterator=source,
            model=[self.trained.model],
            # As Megatron counts on either site: the global batch over the site's own replicas.
            num_microbatches=train.global_batch_size // (train.micro_batch_size * replicas),
            seq_length=self.config.model.seq_length,
            micro_batch_size=train.micro_batch_size,
            decoder_seq_length=self.config.model.seq_length,
            forward_only=forward_only,
        )

    def update(self) -> tuple[bool, float | None]:
        """The optimizer's step, and the learning rate's: was it done, and the gradient's norm before clipping."""
        stepped, grad_norm, _ = self.trained.optimizer.step()
        if stepped:
            self.trained.scheduler.step(increment=1)
        return bool(stepped), grad_norm


def open_process(config: TrainConfig, site: Site, vocab_slices: int | None = None) -> Process:
    """Join the site's world and the link, agree with the other site, build. RANK, MASTER_ADDR, MASTER_PORT are the site's.

    Args:
        vocab_slices: the vocabulary is padded so that it divides by this; default: the edge's tensor-parallel size.

    Raises:
        ConfigError: a user's mistake, found before anything expensive.
        LdtError: the other site failed or fell silent.
    """
    topology = config.topology
    place = topology.place(site, int(os.environ["RANK"]))
    torch.set_num_threads(config.train.threads)
    device.select_device(int(os.environ.get("LOCAL_RANK", "0")))
    tables = table_source(config) if config.num_pipeline_ranks > 1 else None
    data = open_data(config, place.site) if place.site is Site.EDGE else None
    check_save(config, place.site)
    if config.train.save_interval:
        check_savable(config.train.distributed_optimizer, config.train.optimizer)
    patches.apply_all()
    here = world.Address(host=os.environ["MASTER_ADDR"], port=int(os.environ["MASTER_PORT"]))
    world.open_site(topology, place, here, config.link.timeout_s, config.train.seed)
    if tables is not None:
        link = world.Address(host=config.link.host, port=config.link.port)
        lead = config.link.boundary == "lead"
        run = world.join_link(
            topology, place, link, tables, config.link.timeout_s, config.link.backend, lead, vigilance(config)
        )
        agree(config, run)
        if config.has_vision:
            announce_microbatches(config, run, device.current_device())
        elif data is None or data.announced:  # in the cloud it is the header that says whether it is needed
            run.microbatch_format = SegmentedMicrobatches(config.model.hidden_size)
    vocabulary = Vocabulary()
    if data is not None:
        vocabulary = data.vocabulary(vocab_slices or topology.size(Site.EDGE).tensor)
    start = find_start(config, place, session.current())
    trained = build(config, topology, place, vocabulary, first_weights=start.path is None)
    process = Process(config, place, trained, data, vocabulary, start)
    restore(start, config, place, session.current(), process.trainee)
    return process


def vigilance(config: TrainConfig) -> world.Vigilance:
    """As the config has it."""
    return world.Vigilance(
        silence_s=config.link.silence_s,
        quiet_s=config.link.quiet_s,
        directory=Path(config.train.output_dir),
        stops=True,
    )


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
