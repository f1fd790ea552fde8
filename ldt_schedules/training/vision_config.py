"""What can be wrong with the config of a vision-language model, over several keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ldt_schedules.topology import nearest_multiples
from ldt_schedules.training.sections import OTHER_SHAPES, VisionSection, set_among

OTHER_LAYERS = (*OTHER_SHAPES, "qk_layernorm")
"""Fields of TransformerConfig with which a layer is another one than the vision-language model is built of."""

ONE_LAP, TWO_LAPS = "ldt_1f1b", "ldt_2lap_1f1b"
"""The published orders: of a text model's U, and of one that is walked twice."""

if TYPE_CHECKING:
    from ldt_schedules.training.config import TrainConfig


def vision_problems(config: TrainConfig) -> Iterator[str]:
    """One sentence for each mistake; none for a model of text alone."""
    if not config.has_vision:
        yield from _without_vision(config)
        return
    yield from _shape_problems(config)
    yield from _rotary_problems(config)
    yield from _site_problems(config)
    if config.schedule.planner == ONE_LAP:
        yield f"schedule.planner {ONE_LAP} goes round the U once, a vision-language model twice; use {TWO_LAPS}, auto or gpipe"
    if config.train.save_hf is not None and config.model.hf is None:
        yield (
            "train.save_hf writes what model.hf was read from, with new weights, but model.hf is null; set it, or leave "
            "train.save_hf out"
        )
    for name in set_among(OTHER_LAYERS, config.model.megatron):
        yield f"model.megatron.{name} asks for other layers than a vision-language model has here; leave it out"
    if len(set(config.vision.frozen)) == 3:
        yield "vision.frozen names vit, projector and language: nothing would be trained; leave one of them out"


def mrope_section(config: TrainConfig) -> list[int]:
    """Rotary angles of time, height and width; they add up to half of a head's width."""
    if config.model.mrope_section is not None:
        return config.model.mrope_section
    angles = config.model.hidden_size // config.model.num_attention_heads // 2
    space = 3 * angles // 8
    return [angles - 2 * space, space, space]


def _without_vision(config: TrainConfig) -> Iterator[str]:
    if config.schedule.planner == TWO_LAPS:
        yield f"schedule.planner {TWO_LAPS} is for vision-language models, and vision.num_layers is 0; use {ONE_LAP}"
    if config.vision != VisionSection():
        yield "vision: its keys are for vision-language models, and vision.num_layers is 0; set it, or leave vision out"
    given = [key for key in ("encoder_dp_balance", "log_tps") if getattr(config.train, key)]
    for key in given:
        yield f"train.{key} is for vision-language models, and vision.num_layers is 0; set train.{key}=false"
    if config.model.mrope_section is not None:
        yield "model.mrope_section is for vision-language models, and vision.num_layers is 0; leave it out"
    for key in ("hf", "save_hf"):
        section = config.model if key == "hf" else config.train
        if getattr(section, key) is not None:
            name = f"{'model' if key == 'hf' else 'train'}.{key}"
            yield f"{name}: weights of Hugging Face directories are read for vision-language models alone; leave it out"


def _shape_problems(config: TrainConfig) -> Iterator[str]:
    vision = config.vision
    heads = vision.num_attention_heads
    if vision.hidden_size % (4 * heads):
        yield (
            f"vision.hidden_size {vision.hidden_size} / vision.num_attention_heads {heads} must be a multiple of 4 (rotary "
            f"angles for height and width); {nearest_multiples(vision.hidden_size, 4 * heads)} would do"
        )
    token = vision.patch_size * vision.merge_size
    if vision.window_size % token:
        yield (
            f"vision.window_size {vision.window_size} is no multiple of vision.patch_size x vision.merge_size = {token} "
            f"pixels; {nearest_multiples(vision.window_size, token)} would do"
        )
    beyond = [layer for layer in vision.full_attention_layers if not 0 <= layer < vision.num_layers]
    if beyond:
        yield f"vision.full_attention_layers {beyond} do not exist: vision.num_layers is {vision.num_layers}, counted from 0"
    if vision.min_pixels > vision.max_pixels:
        yield f"vision.min_pixels {vision.min_pixels} is above vision.max_pixels {vision.max_pixels}; lower it"


def _rotary_problems(config: TrainConfig) -> Iterator[str]:
    model = config.model
    if model.position_embedding != "rope":
        yield f"model.position_embedding {model.position_embedding}: a vision-language model has rope in three directions"
        return
    angles = model.hidden_size // model.num_attention_heads // 2
    section = mrope_section(config)
    if len(section) != 3 or sum(section) != angles or min(section) < 0:
        yield (
            f"model.mrope_section {section} must be three numbers (time, height, width) that add up to half of a head's "
            f"width, {angles}"
        )


def _site_problems(config: TrainConfig) -> Iterator[str]:
    vision = config.vision
    sites = {"edge": config.sites.edge, **({"cloud": config.sites.cloud} if config.sites.cloud.pipeline_ranks else {})}
    for name, site in sites.items():
        if site.sequence_parallel:
            yield (
                f"sites.{name}.sequence_parallel: a vision-language model does not split sequences over tensor-parallel "
                "processes; turn it off"
            )
        for key in ("num_attention_heads", "ffn_hidden_size"):
            value = getattr(vision, key)
            if value % site.tensor_parallel:
                yield (
                    f"vision.{key} {value} is not a multiple of sites.{name}.tensor_parallel {site.tensor_parallel}; change "
                    f"one of them ({nearest_multiples(value, site.tensor_parallel)} would do)"
                )
