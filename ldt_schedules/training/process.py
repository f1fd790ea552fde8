"""One process of a run: its site's world, its end of the link, its part of the model and of the data.

    open the site's world ─ join the link ─ agree on the config ─ build ─ fill from a checkpoint

Only the edge opens data.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules

import patches
from ldt_schedules import device
from ldt_schedules.megatron import session, world
from ldt_schedules.megatron.checkpoints.site_state import Trainee, check_savable
from ldt_schedules.megatron.segments import SegmentedMicrobatches
from ldt_schedules.topology import Place, Site
from ldt_schedules.training.checkpointing import Start, find_start, restore
from ldt_schedules.training.config import TrainConfig
from ldt_schedules.training.data import Split
from ldt_schedules.training.forward_step import LossReport, forward_step, vision_language_step
from ldt_schedules.training.handshake import agree
from ldt_schedules.training.huggingface_model import check_save
from ldt_schedules.training.model import Trained, build
from ldt_schedules.training.run_data import RunData, open_data
from ldt_schedules.training.schedule import table_source
from ldt_schedules.training.tensor_parallel_batches import over_tensor_parallel
from ldt_schedules.training.vision_model import announce_microbatches
from ldt_schedules.training.vocabulary import Vocabulary


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
