"""What a step will cost, by arithmetic on shapes: times in seconds, memory and messages in bytes, bytes/s on the link.

    problem = problem_of(config)            plan, simulate and bound it with ldt_schedules.planning
    rows = describe_costs(problem, config)  the same for people, one row a stage

A layer of hidden size h, MLP width f, a heads of width d, g key/value heads, on b samples of s tokens:

    operations    linear  2 s b (h (a d + 2 g d) + a d h + h f + f h)   the MLP's way up twice for a gate
                  core    2 s b (2 s a d)                               scores, and scores times values
    F             linear + core
    I             linear + 2 core, and what is recomputed              the gradient of the input
    W             linear                                                the gradient of the weights
    B             I + W

The core has no weights, so its whole backward belongs to I. megatron-core's local attention computes the full square of
scores and masks half of it afterwards, so the full square is counted, and kept. Norms, activations and the embedding are
neglected. What memory holds is worked out in `shapes.py`; both, of a vision-language model, in `vision_work.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ldt_schedules.errors import ConfigError
from ldt_schedules.planning.actions import Kind
from ldt_schedules.planning.costs import Costs, Link
from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.layout import EDGE_RANK, Layout
from ldt_schedules.planning.problem import Problem
from ldt_schedules.topology import Site
from ldt_schedules.training.config import TrainConfig
from ldt_schedules.training.huggingface_model import vocab_rows
from ldt_schedules.training.parameters import (
    ELEMENT_BYTES,
    bytes_vocab_size,
    padded_vocab_size,
    stage_parameters,
    trained_parameters,
)
from ldt_schedules.training.sections import OTHER_SHAPES, set_among
from ldt_schedules.training.shapes import FP32_BYTES, Shapes
from ldt_schedules.training.stage_work import StageWork
from ldt_schedules.training.vision_work import (
    vision_activation_bytes,
    vision_messages,
    vision_stage_work,
    vision_workspace,
)

GIB, MIB = 2**30, 2**20


@dataclass(frozen=True, slots=True)
class CostRow:
    """One stage for people. Operations are of all tensor-parallel processes, times and memory of one of them."""

    stage: int
    name: str
    rank: int
    layers: int
    """Of the language model."""
    vision_layers: int | None
    """Of the ViT; None of a model of text alone."""
    forward_gflop: float
    forward_ms: float
    backward_ms: float
    activation_mib: float
    message_mib: float | None
    """Of the activation to the next stage; None after the tail."""


def problem_of(config: TrainConfig, vocab_size: int | None = None) -> Problem:
    """A training step of this run.

    Args:
        vocab_size: the tokenizer's, where it is known; else `bytes` has its own, and `hardware.vocab_size` counts for
            any other tokenizer (loading one may need a download).

    Raises:
        ConfigError: the edge is alone, `model.megatron` changes shapes in a way that is not known here, or a device is
            too small (with the numbers).
    """
    if config.num_pipeline_ranks == 1:
        raise ConfigError("sites.cloud.pipeline_ranks is 0: an edge alone has nothing to schedule; set it to 1 or more")
    for name in set_among(OTHER_SHAPES, config.model.megatron):
        raise ConfigError(f"model.megatron.{name} changes what a layer costs in a way that the cost model lacks")
    vocab = _padded_vocab(config, vocab_size)
    layout = config.layout
    work = stage_work(config, vocab)
    speeds = [_speed(config, stage.ranks[0]) for stage in layout.stages]
    message = Shapes.of(config, Site.EDGE).message
    costs = Costs(
        forward=tuple(w.forward / speed for w, speed in zip(work, speeds, strict=True)),
        backward=tuple((w.input_grad + w.weight_grad) / speed for w, speed in zip(work, speeds, strict=True)),
        input_grad=tuple(w.input_grad / speed for w, speed in zip(work, speeds, strict=True)),
        weight_grad=tuple(w.weight_grad / speed for w, speed in zip(work, speeds, strict=True)),
        memory=activation_bytes(config, vocab),
        latency=config.hardware.link_latency_ms / 1e3,
        bandwidth=_bandwidth(config),
        links=tuple(_shared_wires(config)),
        forward_size=message,
        backward_size=message,
        sizes=vision_messages(config) if config.has_vision else (),
    )
    caps = tuple(_cap(config, layout, rank, vocab) for rank in range(layout.num_ranks))
    try:
        return Problem(layout, config.num_microbatches, costs, caps if any(cap is not None for cap in caps) else ())
    except ScheduleError as error:
        raise ConfigError(
            f"{error} (bytes, beside the weights; keys: hardware.edge_memory_gib, hardware.cloud_memory_gib, "
            "train.micro_batch_size, train.recompute, layers)"
        ) from None


def stage_work(config: TrainConfig, vocab_size: int) -> tuple[StageWork, ...]:
    """Of each stage, head first. `vocab_size` is the padded one."""
    if config.has_vision:
        return vision_stage_work(config, vocab_size)
    shapes, model = Shapes.of(config, Site.EDGE), config.model
    linear, core = shapes.layer_work(model.seq_length)
    again = {"none": 0.0, "selective": core, "full": linear + core}[config.train.recompute]
    output = 2.0 * shapes.tokens * model.hidden_size * vocab_size
    last = len(config.layer_split) - 1
    return tuple(
        StageWork.of(layers * linear + (output if stage == last else 0.0), layers * core, layers * again)
        for stage, layers in enumerate(config.layer_split)
    )


def activation_bytes(config: TrainConfig, vocab_size: int) -> tuple[float, ...]:
    """What one microbatch keeps in each stage from F to B, on one tensor-parallel process. Padded `vocab_size`."""
    if config.has_vision:
        return vision_activation_bytes(config, vocab_size)
    kept, last = [], len(config.layer_split) - 1
    for stage, layers in enumerate(config.layer_split):
        shapes = Shapes.of(config, Site.EDGE if stage in (0, last) else Site.CLOUD)
        held = layers * shapes.layer(config.train.recompute)
        reader = "layer" if layers else "norm" if stage == last else None  # what keeps the stage's input, if anything
        if stage == 0:
            held += shapes.dropout_mask
        elif reader is None or (shapes.norm_casts and not (reader == "layer" and config.train.recompute == "full")):
            held += shapes.stream  # the executor holds the input: its gradient is what goes back
        if stage == last:
            held += shapes.norm + shapes.logits(vocab_size)
        kept.append(float(held))
    return tuple(kept)


def static_bytes(config: TrainConfig, rank: int, vocab_size: int) -> float:
    """Weights, gradients and optimizer states of one process of a pipeline rank; what is frozen has weights alone. Padded
    `vocab_size`."""
    element, size = ELEMENT_BYTES[config.model.precision], config.topology.size(_site(rank))
    wide = max(element, FP32_BYTES)
    # The fp32 copy of 16-bit weights; Adam's two moments (SGD runs without any). Replicas may share them.
    states = (FP32_BYTES if element < FP32_BYTES else 0) + (2 * wide if config.train.optimizer == "adam" else 0)
    learning = wide + states / (size.data if config.train.distributed_optimizer else 1)
    counts, trained = stage_parameters(config, vocab_size), trained_parameters(config, vocab_size)
    mine = config.layout.stages_on(rank)
    held = sum(counts[stage] for stage in mine) * element + sum(trained[stage] for stage in mine) * learning
    return held / size.tensor


def describe_costs(problem: Problem, config: TrainConfig) -> list[CostRow]:
    """The problem as a table for people, modelled or measured (then with the times of microbatch 0)."""
    costs, layout = problem.costs, problem.layout
    work = stage_work(config, _padded_vocab(config, None))
    rows = []
    for stage in layout.stages:
        vision, language = (
            config.lap_layers.layers_of(stage.index) if config.has_vision else (None, config.layer_split[stage.index])
        )
        consumers = layout.consumers(stage.index)
        kinds = (Kind.B,) if costs.can(Kind.B, stage.index) else (Kind.I, Kind.W)
        rows.append(
            CostRow(
                stage=stage.index,
                name=stage.name,
                rank=stage.ranks[0],
                layers=language,
                vision_layers=vision,
                forward_gflop=work[stage.index].forward / 1e9,
                forward_ms=1e3 * costs.time(Kind.F, stage.index, 0),
                backward_ms=1e3 * sum(costs.time(kind, stage.index, 0) for kind in kinds),
                activation_mib=costs.held(stage.index) / MIB,
                message_mib=costs.size(stage.index, consumers[0], True) / MIB if consumers else None,
            )
        )
    return rows


def _site(rank: int) -> Site:
    return Site.EDGE if rank == EDGE_RANK else Site.CLOUD


def _padded_vocab(config: TrainConfig, vocab_size: int | None) -> int:
    if vocab_size is None and config.model.hf is not None:
        vocab_size = vocab_rows(config)  # what both sites know
    elif vocab_size is None and config.data.tokenizer == "bytes":
        vocab_size = bytes_vocab_size(config)
    elif vocab_size is None:
        vocab_size = config.hardware.vocab_size
    return padded_vocab_size(vocab_size, config.sites.edge.tensor_parallel, config.model.hf is not None)


def _speed(config: TrainConfig, rank: int) -> float:
    """Operations a second of all tensor-parallel processes of a pipeline rank."""
    hardware, site = config.hardware, _site(rank)
    tflops = hardware.edge_tflops if site is Site.EDGE else hardware.cloud_tflops
    return tflops * 1e12 * config.topology.size(site).tensor


def _bandwidth(config: TrainConfig) -> float | None:
    """Bytes a second for one edge replica: all of them use the link at once. Its domains' messages go one by one."""
    gbps = config.hardware.link_bandwidth_gbps
    return None if gbps is None else gbps * 1e9 / 8 / config.topology.edge.data


def _shared_wires(config: TrainConfig) -> Iterator[tuple[int, int, Link]]:
    """The edge's neighbours, the first and last rank of each domain, are reached over one link: what goes up shares one
    wire, and so does what comes down."""
    latency = config.hardware.link_latency_ms / 1e3
    for cloud in sorted({rank for stage in (1, -2) for rank in config.layout.stages[stage].ranks}):
        yield EDGE_RANK, cloud, Link(latency, _bandwidth(config), "up")
        yield cloud, EDGE_RANK, Link(latency, _bandwidth(config), "down")


def _cap(config: TrainConfig, layout: Layout, rank: int, vocab_size: int) -> float | None:
    """Bytes for activations on one process of a rank; None: no limit."""
    site = _site(rank)
    gib = getattr(config.hardware, f"{site}_memory_gib")
    if gib is None:
        return None
    static = static_bytes(config, rank, vocab_size)
    workspace = _workspace(config, site, vocab_size if site is Site.EDGE else 0)
    if static + workspace >= gib * GIB:
        raise ConfigError(
            f"pipeline rank {rank} does not fit: hardware.{site}_memory_gib is {gib:g}, but weights, gradients and "
            f"optimizer states take {static / GIB:.3g} GiB and the space to compute in {workspace / GIB:.3g} GiB there; "
            f"give more memory, fewer layers to stages {list(layout.stages_on(rank))} or more tensor_parallel"
        )
    return float(gib * GIB - static - workspace)


def _workspace(config: TrainConfig, site: Site, vocab_size: int) -> float:
    if config.has_vision:
        return vision_workspace(config, site, vocab_size)
    return Shapes.of(config, site).workspace(config.train.recompute, vocab_size)
