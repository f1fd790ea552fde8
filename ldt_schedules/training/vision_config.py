"""What can be wrong with the config of a vision-language model, over several keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ldt_schedules.megatron.vision_language import limits
from ldt_schedules.training.sections import OTHER_SHAPES, VisionSection, set_among

OTHER_LAYERS = ("head_dim", "qk_norm", "rope_scaling")
"""Keys of `model` with which a layer is another one than the vision-language model is built of."""

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
    given = [f"model.{key}" for key in OTHER_LAYERS if getattr(config.model, key)]
    given += [f"model.megatron.{name}" for name in set_among(OTHER_SHAPES, config.model.megatron)]
    for key in given:
        yield f"{key} asks for other layers than a vision-language model has here; leave it out"
    if len(set(config.vision.frozen)) == 3:
        yield "vision.frozen names vit, projector and language: nothing would be trained; leave one of them out"


def mrope_section(config: TrainConfig) -> list[int]:
    """Rotary angles of time, height and width; they add up to half of a head's width."""
    if config.model.mrope_section is not None:
        return config.model.mrope_section
    angles = config.model.head_width // 2
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


def _shape_problems(config: TrainConfig) -> Iterator[str]:
    vision = config.vision
    yield from limits.vision_problems(
        num_layers=vision.num_layers,
        hidden_size=vision.hidden_size,
        num_attention_heads=vision.num_attention_heads,
        full_attention_layers=vision.full_attention_layers,
        window_tokens=vision.window_size // (vision.patch_size * vision.merge_size),
    )
    yield from limits.pixel_problems(vision.min_pixels, vision.max_pixels, vision.patch_size, vision.merge_size)


def _rotary_problems(config: TrainConfig) -> Iterator[str]:
    model = config.model
    if model.position_embedding != "rope":
        yield f"model.position_embedding {model.position_embedding}: a vision-language model has rope in three directions"
        return
    yield from limits.mrope_problems(mrope_section(config), model.head_width)


def _site_problems(config: TrainConfig) -> Iterator[str]:
    vision = config.vision
    sites = {"edge": config.sites.edge, **({"cloud": config.sites.cloud} if config.sites.cloud.pipeline_ranks else {})}
    for name, site in sites.items():
        yield from limits.parallel_problems(
            f"sites.{name}.",
            tensor=site.tensor_parallel,
            sequence_parallel=site.sequence_parallel,
            context=1,  # the config has no key for it, and `OTHER_SHAPES` keeps Megatron's field out
            divided={f"vision.{key}": getattr(vision, key) for key in ("num_attention_heads", "ffn_hidden_size")},
        )
