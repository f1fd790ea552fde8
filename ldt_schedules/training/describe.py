"""From a config to the description of its run, by arithmetic on shapes: nothing is built, nothing is started.

The parameter count is that of megatron-core's GPTModel with its local layer spec:

    layer   norm, QKV [h, d(heads + 2 groups)], projection [h, h], norm, MLP up [h, f] (twice for a gate), down [f, h]
    head    embedding [V, h], learned positions [s, h]
    tail    norm, output [V, h] (none where it is tied to the embedding: both live in the edge process)
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from ldt_schedules.topology import Site
from ldt_schedules.training.config import TrainConfig
from ldt_schedules.training.reports import LinkUse, RankRow, RunDescription
from ldt_schedules.training.sections import ModelSection

ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}

_DEFAULT_CORPUS = "the sources of Python's standard library"
_VOCAB_MULTIPLE = 128  # Megatron's default; matrix units like such sizes


def padded_vocab_size(vocab_size: int, tensor_parallel: int) -> int:
    """Rows of the embedding: the vocabulary, rounded up so that it divides over the tensor-parallel processes.

    A power of two up to 128 processes gives the same size as 1, so that those runs hold the same model.
    """
    multiple = math.lcm(_VOCAB_MULTIPLE, tensor_parallel)
    return -(-vocab_size // multiple) * multiple


def layer_parameters(model: ModelSection) -> int:
    """Of one transformer layer."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    qkv = hidden + 2 * model.num_query_groups * (hidden // model.num_attention_heads)
    up = ffn * (2 if model.activation == "swiglu" else 1)
    weights = hidden * qkv + hidden * hidden + hidden * up + ffn * hidden
    biases = qkv + hidden + up + hidden if model.linear_bias else 0
    return weights + biases + 2 * _norm_parameters(model)


def stage_parameters(config: TrainConfig, vocab_size: int) -> tuple[int, ...]:
    """Of each stage: head, cloud stages, tail. `vocab_size` is the padded one."""
    model = config.model
    counts = [layers * layer_parameters(model) for layers in config.layer_split]
    positions = model.seq_length if model.position_embedding == "learned_absolute" else 0
    counts[0] += (vocab_size + positions) * model.hidden_size
    counts[-1] += _norm_parameters(model) + (0 if model.tie_embeddings else vocab_size * model.hidden_size)
    return tuple(counts)


def _norm_parameters(model: ModelSection) -> int:
    return model.hidden_size * (2 if model.normalization == "LayerNorm" else 1)


def describe_run(config: TrainConfig, vocab_size: int) -> RunDescription:
    """What the first screen shows. `vocab_size` is the tokenizer's, before padding."""
    model, train = config.model, config.train
    return RunDescription(
        ranks=tuple(_rank_rows(config, padded_vocab_size(vocab_size, config.sites.edge.tensor_parallel))),
        link=_link_use(config) if config.num_pipeline_ranks > 1 else None,
        model=(
            f"GPT, {model.num_layers} layers, hidden {model.hidden_size}, {model.num_attention_heads} heads, "
            f"sequence {model.seq_length}, vocabulary {vocab_size}, {model.precision}"
        ),
        data=f"{config.data.path or _DEFAULT_CORPUS}, tokenizer {config.data.tokenizer}",
        schedule=_schedule_name(config),
        iterations=train.iterations,
        num_microbatches=config.num_microbatches,
        global_batch_size=train.global_batch_size,
        tokens_per_step=train.global_batch_size * model.seq_length,
        output_dir=train.output_dir,
    )


def _schedule_name(config: TrainConfig) -> str:
    if config.num_pipeline_ranks == 1:
        return "none: the edge is alone"
    if config.schedule.table is not None:
        return f"table {config.schedule.table}"
    return config.schedule.planner


def _rank_rows(config: TrainConfig, padded_vocab: int) -> Iterator[RankRow]:
    counts, split = stage_parameters(config, padded_vocab), config.layer_split
    starts = [sum(split[:stage]) for stage in range(len(split))]
    for rank in range(config.num_pipeline_ranks):
        stages = [stage for stage in range(len(split)) if stage % config.num_pipeline_ranks == rank]
        site = Site.EDGE if rank == 0 else Site.CLOUD
        yield RankRow(
            site=str(site),
            pipeline_rank=rank,
            processes=config.topology.size(site).replicas,
            layers=tuple((starts[s], starts[s] + split[s] - 1) for s in stages if split[s]),
            parameters=sum(counts[s] for s in stages),
            holds=_edge_holds(config) if rank == 0 else (),
        )


def _edge_holds(config: TrainConfig) -> tuple[str, ...]:
    output = "output layer (the embedding's weight)" if config.model.tie_embeddings else "output layer"
    return ("data", "labels", "embedding", output, "loss")


def _link_use(config: TrainConfig) -> LinkUse:
    model, train = config.model, config.train
    shape = (model.seq_length, train.micro_batch_size, model.hidden_size)
    one_tensor = math.prod(shape) * ELEMENT_BYTES[model.precision]
    # Each way two tensors a microbatch: an activation, and the gradient of the activation that went the other way.
    each_way, microbatches = 2 * one_tensor, config.num_microbatches * config.data_parallel
    return LinkUse(
        address=config.link.address if config.link.port else f"{config.link.host}, port chosen at the start",
        dtype=model.precision,
        shape=shape,
        up_bytes_per_microbatch=each_way,
        down_bytes_per_microbatch=each_way,
        up_bytes_per_step=each_way * microbatches,
        down_bytes_per_step=each_way * microbatches,
    )
