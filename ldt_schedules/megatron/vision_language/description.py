"""What a vision-language model is, and which parts of it learn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron.vision_language import limits
from ldt_schedules.megatron.vision_language.vision import VisionConfig

PARTS = ("vit", "projector", "language")


@dataclass(frozen=True, kw_only=True)
class VisionLanguageModel:
    """Everything that the stages of one model have in common.

    Attributes:
        vision: of the whole ViT.
        language: TransformerConfig of the whole language model, with `mrope_section`.
        vocab_size: rows of the embedding, a multiple of the tensor-parallel size.
        tied: the output layer uses the embedding's weight.
        image_token, video_token: the ids in whose places features go.
    """

    vision: VisionConfig
    language: Any
    vocab_size: int
    max_sequence_length: int
    rope_theta: float
    tied: bool
    image_token: int
    video_token: int

    def __post_init__(self) -> None:
        check_vision_language(self)


def check_vision_language(model: VisionLanguageModel) -> None:
    """Raises ConfigError for what the stages cannot do."""
    problems = [*_limits_of(model.vision, model.language), *_joining_problems(model)]
    if problems:
        raise ConfigError("\n".join(problems))


def _limits_of(vision: VisionConfig, language: Any) -> Iterator[str]:
    yield from limits.vision_problems(
        num_layers=vision.num_layers,
        hidden_size=vision.hidden_size,
        num_attention_heads=vision.num_attention_heads,
        full_attention_layers=vision.full_attention_layers,
        window_tokens=vision.window_tokens,
    )
    yield from limits.mrope_problems(language.mrope_section, language.kv_channels)
    towers, divided = {"vision": vision, "model": language}, ("num_attention_heads", "num_query_groups")
    yield from limits.parallel_problems(
        "",
        tensor=language.tensor_model_parallel_size,  # `vision_config` takes the sizes of the groups from the language model
        sequence_parallel=language.sequence_parallel,
        context=language.context_parallel_size,
        divided={f"{name}.{key}": getattr(tower, key) for name, tower in towers.items() for key in divided},
    )


def _joining_problems(model: VisionLanguageModel) -> Iterator[str]:
    """Where the two towers meet."""
    gives, takes = model.vision.output_size, model.language.hidden_size
    if gives != takes:
        yield f"the projector gives {gives} numbers, the language model takes {takes}"
    tokens = (model.image_token, model.video_token)
    if tokens[0] == tokens[1] or not all(0 <= token < model.vocab_size for token in tokens):
        yield (
            f"image_token {tokens[0]} and video_token {tokens[1]} must be two different ids below the vocabulary's "
            f"{model.vocab_size} rows"
        )


def freeze(module: torch.nn.Module, parts: Sequence[str]) -> None:
    """Take parameters of a stage, or of a whole model, out of training.

    Args:
        parts: "vit" (patch embedding and ViT layers), "projector", "language" (embedding, layers, norm, output layer).

    Raises:
        ConfigError: another name.
    """
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise ConfigError(f"vision.frozen names {', '.join(unknown)}; the parts of the model are {', '.join(PARTS)}")
    for name, parameter in module.named_parameters():
        if part_of(name) in parts:
            parameter.requires_grad_(False)


def part_of(name: str) -> str:
    """The part that a parameter of a stage belongs to."""
    if name.startswith("language."):
        return "language"
    assert name.startswith("vision."), name
    return "projector" if name.startswith("vision.projector.") else "vit"
