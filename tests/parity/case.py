"""One parity case: a small GPT, its data, and what a step leaves behind, split or whole.

`train_rank` is what a worker process runs. It uses the project's own building blocks as `ldt train` does; a case with
one pipeline rank is a plain Megatron run of the whole model through Megatron's own `forward_backward_no_pipelining`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ldt_schedules.device import current_device
from ldt_schedules.planning.layout import Layout
from ldt_schedules.topology import Place, Site, SiteSize, Topology
from ldt_schedules.training.config import TrainConfig
from ldt_schedules.training.vocabulary import Vocabulary

if TYPE_CHECKING:
    from ldt_schedules.megatron.modalities import Modality

VOCABULARY = 64
SEQUENCE = 12
ONE = SiteSize()


@dataclass(frozen=True)
class Case:
    """What is trained. `layers[s]` are the layers of stage s; `num_microbatches` those of one edge replica."""

    layers: tuple[int, ...]
    num_microbatches: int
    planner: str = "ldt_1f1b"
    edge: SiteSize = ONE
    cloud: SiteSize = ONE
    lead: bool = False
    device: str = "cpu"
    steps: int = 2
    optimizer: str = "sgd"
    clip: float = 0.0
    tied: bool = False
    per_token: bool = False
    precision: str = "fp32"
    evaluate: bool = False
    model: tuple[tuple[str, Any], ...] = ()
    train: tuple[tuple[str, Any], ...] = ()
    megatron: tuple[tuple[str, Any], ...] = ()
    ddp: tuple[tuple[str, Any], ...] = ()
    everywhere: tuple[tuple[str, Any], ...] = ()
    split_only: tuple[tuple[str, Any], ...] = ()
    inf_at: tuple[int, int] | None = None
    mistake: Callable[[Any, Any], AbstractContextManager[None]] | None = None
    forward_step: Callable[..., Any] | None = None
    modalities: tuple[Modality, ...] = ()
    batches: Callable[[int, range], Iterator[dict[str, Any]]] | None = None
    segmented: bool = False
    """`mistake(trained, session)` puts one in while inside. `everywhere` and `split_only` are set on the
    TransformerConfig once the model is built, as a training loop does; a function is called with the `Trained` object
    for the value. `inf_at` plants an inf: (step, pipeline rank). `segmented`: its batches are."""

    @property
    def num_ranks(self) -> int:
        return max(1, len(self.layers) - 1)

    @property
    def has_vision(self) -> bool:
        return False

    def vocabulary(self) -> Vocabulary:
        return Vocabulary(VOCABULARY)

    def layout(self) -> Layout:
        """Of the split model."""
        from ldt_schedules.megatron.modalities import layout_with

        if self.modalities:
            return layout_with(self.modalities, self.num_ranks)
        return Layout.u(self.num_ranks, self.topology.domains)

    @property
    def topology(self) -> Topology:
        """The config's, and context parallelism, which the trainer's config does not offer."""
        return Topology(self.num_ranks, self.edge, self.cloud)

    def whole(self) -> Case:
        """The same in one process."""
        return replace(
            self,
            layers=(sum(self.layers),),
            edge=ONE,
            cloud=ONE,
            lead=False,
            num_microbatches=self.num_microbatches * self.edge.data,
            planner="ldt_1f1b",
            split_only=(),
            mistake=None,
        )

    def config(self) -> TrainConfig:
        return TrainConfig.model_validate(self.content())

    def content(self) -> dict[str, Any]:
        """Of the config, section by section."""
        edge, cloud = (
            {"tensor_parallel": s.tensor, "data_parallel": s.data, "sequence_parallel": s.sequence_parallel}
            for s in (self.edge, self.cloud)
        )
        return {
            "model": {
                "num_layers": sum(self.layers),
                "hidden_size": 32,
                "num_attention_heads": 4,
                "seq_length": SEQUENCE,
                "tie_embeddings": self.tied,
                "precision": self.precision,
                "megatron": dict(self.megatron),
                **dict(self.model),
            },
            "layers": list(self.layers),
            "sites": {"edge": edge, "cloud": {**cloud, "pipeline_ranks": self.num_ranks - 1}},
            "schedule": {"planner": self.planner},
            "train": {
                "iterations": 100,
                "warmup_iterations": 0,
                "global_batch_size": 2 * self.num_microbatches * self.edge.data,
                "micro_batch_size": 2,
                "optimizer": self.optimizer,
                "clip_grad": self.clip,
                "weight_decay": 0.01,
                "lr": 0.1 if self.optimizer == "sgd" else 1e-3,
                "min_lr": 0.0,
                "calculate_per_token_loss": self.per_token,
                **dict(self.train),
            },
        }


@dataclass
class StepResult:
    """Of one process: loss reports (edge), full gradients and weights by global name (this rank's slices), and bytes
    sent and received over the link by the training step (edge)."""

    reports: list[np.ndarray]
    gradients: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    partition: dict[str, tuple[int, int]]
    grad_norm: float | None
    inf_norm: float
    stepped: bool
    loss_scale: float
    crossed: tuple[int, int]
    evaluation: list[np.ndarray] = field(default_factory=list)


def batches(step: int, microbatches: range) -> Iterator[dict[str, torch.Tensor]]:
    """Random tokens and an uneven loss mask; microbatch m of a step is the same on every layout."""
    for microbatch in microbatches:
        generator = torch.Generator().manual_seed(1000 * step + microbatch)
        tokens = torch.randint(0, VOCABULARY, (2, SEQUENCE + 1), generator=generator)
        mask = (torch.rand((2, SEQUENCE), generator=generator) < 0.3 + 0.1 * (microbatch % 5)).float()
        mask[0, 0] = 1.0
        batch = {
            "tokens": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
            "loss_mask": mask,
            "position_ids": torch.arange(SEQUENCE).expand(2, -1).contiguous(),
        }
        yield {name: tensor.to(current_device()) for name, tensor in batch.items()}


def open_rank(case: Case, global_rank: int, ports: dict[str, int]) -> tuple[Place, Any]:
    """Join the world of this rank's site, and the link when there is one."""
    import patches
    from ldt_schedules import device
    from ldt_schedules.megatron import world
    from ldt_schedules.megatron.segments import SegmentedMicrobatches
    from ldt_schedules.planning.planners import plan
    from ldt_schedules.training.vision_model import announce_microbatches
    from tests.parity import gathered_attention

    warnings.simplefilter("ignore")
    os.environ["LDT_DEVICE"] = case.device
    device.device_type.cache_clear()
    device.select_device(global_rank)
    patches.apply_all()
    if case.edge.context > 1:
        gathered_attention.use()
    topology = case.topology
    place = topology.place_of_global_rank(global_rank)
    here = world.Address(host="127.0.0.1", port=ports[str(place.site)])
    world.open_site(topology, place, here, timeout_s=60, seed=1)
    if case.num_ranks == 1:
        return place, None
    layout = case.layout()
    run = world.join_link(
        topology,
        place,
        world.Address(host="127.0.0.1", port=ports["link"]),
        lambda num_microbatches, forward_only: plan(case.planner, layout, num_microbatches, forward_only=forward_only),
        timeout_s=60,
        lead=case.lead,
    )
    if case.has_vision:
        announce_microbatches(case.config(), run, device.current_device())
    elif case.segmented:
        run.microbatch_format = SegmentedMicrobatches(case.config().model.hidden_size)
    return place, run


def train_rank(cases: list[Case], global_rank: int, ports: dict[str, int]) -> list[list[StepResult]]:
    """Open the world of the first case (all have the same layout) and run every case in it."""
    from ldt_schedules.megatron import world

    place, _ = open_rank(cases[0], global_rank, ports)
    results = [run_case(case, place) for case in cases]
    world.close_site()
    return results


def run_case(case: Case, place: Place) -> list[StepResult]:
    """Build, then train `case.steps` steps and say what each left."""
    from megatron.core.distributed import DistributedDataParallelConfig

    from ldt_schedules.megatron import session
    from ldt_schedules.training.model import build

    ddp = DistributedDataParallelConfig(**{"grad_reduce_in_fp32": case.precision != "fp64", **dict(case.ddp)})
    trained = build(case.config(), case.topology, place, case.vocabulary(), ddp, case.modalities)
    for name, value in case.everywhere + case.split_only:
        setattr(trained.config, name, value(trained) if callable(value) else value)
    with nullcontext() if case.mistake is None else case.mistake(trained, session.current()):
        return [one_step(case, place, trained, step) for step in range(case.steps)]


def one_step(case: Case, place: Place, trained: Any, step: int) -> StepResult:
    from megatron.core.optimizer import clip_grads

    from ldt_schedules.megatron import session

    trained.model.zero_grad_buffer()
    trained.optimizer.zero_grad()
    reports = run_schedule(case, place, trained, step, forward_only=False)
    run = session.current()
    crossed = run.transport.traffic.take() if run is not None and place.site is Site.EDGE else (0, 0)
    gradients, partition = _gradients(trained)
    params = [p for p in trained.model.parameters() if p.requires_grad]
    inf_norm = clip_grads.get_grad_norm_fp32([p.main_grad for p in params], float("inf"))
    if dict(case.ddp).get("use_distributed_optimizer"):
        inf_norm = 0.0  # a replica's buffer holds the reduced gradients of its own shard only
    if case.inf_at == (step, place.pipeline_rank):
        params[-1].main_grad.view(-1)[3] = float("inf")
    stepped, grad_norm, _ = trained.optimizer.step()
    trained.scheduler.step(1)
    if dict(case.ddp).get("overlap_param_gather"):
        trained.model.start_param_sync(force_sync=True)
    evaluation = []
    if case.evaluate:
        with torch.no_grad():
            evaluation = run_schedule(case, place, trained, 100 + step, forward_only=True)
    return StepResult(
        reports=reports,
        gradients=gradients,
        weights=_weights(trained.model),
        partition=partition,
        grad_norm=grad_norm,
        inf_norm=inf_norm,
        stepped=bool(stepped),
        loss_scale=float(trained.optimizer.get_loss_scale()),
        crossed=crossed,
        evaluation=evaluation,
    )


def run_schedule(case: Case, place: Place, trained: Any, step: int, forward_only: bool) -> list[np.ndarray]:
    """One call of whatever `get_forward_backward_func` gives; the loss reports of this process."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from ldt_schedules.training.forward_step import forward_step
    from ldt_schedules.training.tensor_parallel_batches import over_tensor_parallel

    # As a training loop on either site counts: global batch over its own replicas.
    count = case.num_microbatches // (1 if place.site is Site.EDGE else case.topology.domains)
    # Replica d of D takes microbatches d, d + D, ...
    mine = range(place.data_rank, count * case.edge.data, case.edge.data)
    source = (case.batches or batches)(step, mine) if place.site is Site.EDGE and place.tensor_rank == 0 else None
    if (case.has_vision or case.segmented) and place.site is Site.EDGE:
        source = over_tensor_parallel(source)
    reports = get_forward_backward_func()(
        forward_step_func=case.forward_step or forward_step,
        data_iterator=source,
        model=[trained.model],
        num_microbatches=count,
        seq_length=SEQUENCE,
        micro_batch_size=2,
        decoder_seq_length=SEQUENCE,
        forward_only=forward_only,
    )
    return [report["lm loss"].cpu().numpy() for report in reports]


def _gradients(trained: Any) -> tuple[dict[str, np.ndarray], dict[str, tuple[int, int]]]:
    from ldt_schedules.megatron.chunks import global_parameters
    from ldt_schedules.megatron.initialization import blocks_of
    from ldt_schedules.training.verification.recorder import reduced_gradients

    model = trained.model
    gradients, partition = {}, {}
    named = list(global_parameters(model))
    reduced = dict(reduced_gradients(model, [parameter for _, parameter in named]))
    for name, parameter in named:
        if parameter.requires_grad:
            gradients[name] = reduced[parameter].detach().clone().cpu().numpy()
        if getattr(parameter, "tensor_model_parallel", False):
            partition[name] = (parameter.partition_dim, blocks_of(name, parameter, trained.config))
    return gradients, partition


def _weights(model: torch.nn.Module) -> dict[str, np.ndarray]:
    from ldt_schedules.megatron.chunks import global_parameters

    # numpy has no bfloat16.
    return {
        name: p.detach().to(torch.promote_types(p.dtype, torch.float32)).clone().cpu().numpy()
        for name, p in global_parameters(model)
    }
