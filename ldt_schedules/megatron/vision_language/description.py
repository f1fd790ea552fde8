"""What a vision-language model is, how it is cut, which parts learn; and what a split one cannot do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ldt_schedules.errors import ConfigError
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


@dataclass(frozen=True)
class Split:
    """Layers of the stages of a U of P ranks that is walked twice.

    Attributes:
        vision_layers: ViT layers of the stages 0..P.
        language_layers: language layers of the stages P..2P.
    """

    vision_layers: tuple[int, ...]
    language_layers: tuple[int, ...]

    def __post_init__(self) -> None:
        vision, language = len(self.vision_layers), len(self.language_layers)
        if vision != language or vision < 2 or min(*self.vision_layers, *self.language_layers) < 0:
            raise ConfigError(
                f"layers {list(self.vision_layers)} of the ViT and {list(self.language_layers)} of the language model: each "
                "list needs one number, 0 or more, for each of the P + 1 stages of its lap"
            )

    @property
    def num_ranks(self) -> int:
        return len(self.vision_layers) - 1

    @property
    def num_stages(self) -> int:
        return 2 * self.num_ranks + 1


def check_vision_language(model: VisionLanguageModel) -> None:
    """Raises ConfigError for what the stages cannot do."""
    vision, language = model.vision, model.language
    _check_parallel(vision, language)
    section = list(language.mrope_section or [])
    if len(section) != 3 or 2 * sum(section) != language.kv_channels:
        raise ConfigError(
            f"mrope_section {section} must be three numbers (time, height, width) that sum to half of the width of a head, "
            f"{language.kv_channels // 2}"
        )
    if vision.kv_channels % 4:
        raise ConfigError(
            f"vision heads of width {vision.kv_channels} cannot turn with row and column; vision.hidden_size / "
            "vision.num_attention_heads must be a multiple of 4"
        )
    if vision.window_tokens < 1:
        raise ConfigError("vision.window_size must be at least patch_size x merge_size pixels")
    if vision.output_size != language.hidden_size:
        raise ConfigError(
            f"the projector gives {vision.output_size} numbers, the language model takes {language.hidden_size}"
        )
    if any(not 0 <= number < vision.num_layers for number in vision.full_attention_layers):
        raise ConfigError(
            f"vision.full_attention_layers {list(vision.full_attention_layers)} names a layer that is not there; "
            f"{vision.num_layers} layers are numbered from 0"
        )
    tokens = (model.image_token, model.video_token)
    if tokens[0] == tokens[1] or not all(0 <= token < model.vocab_size for token in tokens):
        raise ConfigError(
            f"image_token {tokens[0]} and video_token {tokens[1]} must be two different ids below the vocabulary's "
            f"{model.vocab_size} rows"
        )


def _check_parallel(vision: VisionConfig, language: Any) -> None:
    if vision.sequence_parallel or language.sequence_parallel:
        raise ConfigError(
            "sequence parallelism cuts a sequence in equal parts; patches come in any number, and the edge puts features "
            "into a whole sequence. Turn it off for both sites of a vision-language model"
        )
    if vision.context_parallel_size > 1 or language.context_parallel_size > 1:
        raise ConfigError("a vision-language model cannot run with context parallelism; set it to 1")
    for name, config in (("vision", vision), ("model", language)):
        size = config.tensor_model_parallel_size
        for what in ("num_attention_heads", "num_query_groups"):
            if getattr(config, what) % size:
                raise ConfigError(f"{name}.{what} {getattr(config, what)} is no multiple of tensor_parallel, {size}")


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
