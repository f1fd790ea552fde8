"""From a config to the description of its run, by arithmetic on shapes: nothing is built, nothing is started."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ldt_schedules.planning.layout import EDGE_RANK, Layout
from ldt_schedules.topology import Site
from ldt_schedules.training.config import TrainConfig
from ldt_schedules.training.data_format import has_segments, holds_messages
from ldt_schedules.training.parameters import (
    ELEMENT_BYTES,
    padded_vocab_size,
    stage_parameters,
    trained_parameters,
)
from ldt_schedules.training.reports import LinkUse, RankRow, RunDescription
from ldt_schedules.training.vision_shapes import Patches

_DEFAULT_CORPUS = "the sources of Python's standard library"
_DEFAULT_CHAT = "questions about the functions of Python's standard library"
_DEFAULT_CHARTS = "drawn charts with questions"


def describe_run(config: TrainConfig, vocab_size: int, contents: str = "") -> RunDescription:
    """What the first screen shows.

    Args:
        vocab_size: the tokenizer's, special tokens counted, before padding.
        contents: what was found in the data, where they are open.
    """
    train = config.train
    own_data = _DEFAULT_CHARTS if config.has_vision else _DEFAULT_CHAT if holds_messages(config) else _DEFAULT_CORPUS
    found = f": {contents}" if contents else ""
    return RunDescription(
        ranks=tuple(
            _rank_rows(
                config, padded_vocab_size(vocab_size, config.sites.edge.tensor_parallel, config.model.hf is not None)
            )
        ),
        link=_link_use(config) if config.num_pipeline_ranks > 1 else None,
        model=_model(config, vocab_size),
        data=f"{config.data.path or own_data}, tokenizer {config.data.tokenizer}{found}",
        schedule=_schedule_name(config),
        iterations=train.iterations,
        num_microbatches=config.num_microbatches,
        global_batch_size=train.global_batch_size,
        tokens_per_step=train.global_batch_size * config.model.seq_length,
        output_dir=train.output_dir,
        frozen=tuple(config.vision.frozen) if config.has_vision else (),
        bare=tuple(_bare(config)),
    )


def _bare(config: TrainConfig) -> Iterator[str]:
    """What leaves the edge before a layer has mixed it: embeddings of patches are linear in the pixels, those of tokens are
    rows of a table."""
    if config.num_pipeline_ranks == 1:
        return
    if config.has_vision and not config.lap_layers.vit[0]:
        yield "the patch embedding"
    if not (config.lap_layers.llm if config.has_vision else config.layer_split)[0]:
        yield "the embedding of tokens"


def _schedule_name(config: TrainConfig) -> str:
    if config.num_pipeline_ranks == 1:
        return "none: the edge is alone"
    if config.schedule.table is not None:
        return f"table {config.schedule.table}"
    return config.schedule.planner


def _model(config: TrainConfig, vocab_size: int) -> str:
    model, vision = config.model, config.vision
    language = f"{model.num_layers} layers, hidden {model.hidden_size}, {model.num_attention_heads} heads"
    rest = f"sequence {model.seq_length}, vocabulary {vocab_size}, {model.precision}"
    if not config.has_vision:
        return f"GPT, {language}, {rest}"
    windows = f"windows of {vision.window_size} pixels" if vision.num_layers > len(vision.full_attention_layers) else ""
    sees = f"{vision.num_layers} layers, hidden {vision.hidden_size}, {vision.num_attention_heads} heads"
    return f"vision: {', '.join(filter(None, (sees, windows)))}; language: {language}, {rest}"


def _rank_rows(config: TrainConfig, padded_vocab: int) -> Iterator[RankRow]:
    counts, trained = stage_parameters(config, padded_vocab), trained_parameters(config, padded_vocab)
    vision, language = _splits(config)
    for rank in range(config.num_pipeline_ranks):
        stages = config.layout.stages_on(rank)
        site = Site.EDGE if rank == EDGE_RANK else Site.CLOUD
        yield RankRow(
            site=str(site),
            pipeline_rank=rank,
            processes=config.topology.size(site).replicas,
            layers=_spans(language, stages),
            parameters=sum(counts[s] for s in stages),
            holds=_edge_holds(config) if rank == EDGE_RANK else (),
            vision_layers=None if vision is None else _spans(vision, stages),
            trained_parameters=sum(trained[s] for s in stages),
        )


def _splits(config: TrainConfig) -> tuple[tuple[int, ...] | None, tuple[int, ...]]:
    """Of each stage the ViT's layers (None of a model of text alone), and the language model's."""
    if not config.has_vision:
        return None, config.layer_split
    laps = config.lap_layers
    vision, language = zip(*map(laps.layers_of, range(laps.num_stages)), strict=True)
    return vision, language


def _spans(split: tuple[int, ...], stages: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """First and last layer of each of `stages` that has any."""
    return tuple((sum(split[:s]), sum(split[: s + 1]) - 1) for s in stages if split[s])


def _edge_holds(config: TrainConfig) -> tuple[str, ...]:
    output = "output layer (the embedding's weight)" if config.model.tie_embeddings else "output layer"
    if not config.has_vision:
        return ("data", "labels", "embedding", output, "loss")
    return ("pixels", "tokens", "labels", "patch embedding", "projector", "embedding", output, "loss")


def _link_use(config: TrainConfig) -> LinkUse:
    model, train = config.model, config.train
    shape = (model.seq_length, train.micro_batch_size, model.hidden_size)
    patches = (round(Patches.of(config).count), 1, config.vision.hidden_size) if config.has_vision else None
    joining = config.lap_layers.joining_stage if config.has_vision else 0
    up, down = _crossing(config.layout, shape, patches or shape, joining)
    element, microbatches = ELEMENT_BYTES[model.precision], config.num_microbatches * config.data_parallel
    return LinkUse(
        address=config.link.address if config.link.port else f"{config.link.host}, port chosen at the start",
        dtype=model.precision,
        shape=shape,
        vision_shape=patches,
        segmented=has_segments(config),
        up_bytes_per_microbatch=up * element,
        down_bytes_per_microbatch=down * element,
        up_bytes_per_step=up * element * microbatches,
        down_bytes_per_step=down * element * microbatches,
    )


def _crossing(
    layout: Layout, shape: tuple[int, int, int], first_lap: tuple[int, int, int], joining: int
) -> tuple[int, int]:
    """Elements that a microbatch sends up and down: each activation between the sites goes one way, and its gradient, if
    anybody needs it, the other."""
    sent = {True: 0, False: 0}
    for stage in layout.stages[:-1]:
        here, there = stage.ranks[0] == EDGE_RANK, layout.stages[stage.index + 1].ranks[0] == EDGE_RANK
        if here != there:
            size = math.prod(first_lap if stage.index < joining else shape)
            sent[here] += size
            sent[there] += size if layout.has_backward(stage.index) else 0
    return sent[True], sent[False]
