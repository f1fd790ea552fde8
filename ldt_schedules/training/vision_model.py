"""From the training config to a vision-language model."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule

from ldt_schedules.megatron.session import Session
from ldt_schedules.megatron.vision_language.chunks import build_vision_language
from ldt_schedules.megatron.vision_language.description import VisionLanguageModel
from ldt_schedules.megatron.vision_language.microbatches import VisionLanguageMicrobatches
from ldt_schedules.megatron.vision_language.vision import vision_config
from ldt_schedules.topology import Place
from ldt_schedules.training.config import TrainConfig
from ldt_schedules.training.vocabulary import Vocabulary


def vision_language_module(config: TrainConfig, language: Any, place: Place, vocabulary: Vocabulary) -> MegatronModule:
    """This process's part. `language` is the TransformerConfig of the whole language model in this site's world."""
    model = described(config, language, vocabulary)
    stages = config.layout.stages_on(place.pipeline_rank)
    return build_vision_language(model, config.lap_layers, stages, config.vision.frozen)


def described(config: TrainConfig, language: Any, vocabulary: Vocabulary) -> VisionLanguageModel:
    """The whole model in the world of one site, whose TransformerConfig `language` is."""
    vision = config.vision
    return VisionLanguageModel(
        vision=vision_config(
            language,
            num_layers=vision.num_layers,
            hidden_size=vision.hidden_size,
            ffn_hidden_size=vision.ffn_hidden_size,
            num_attention_heads=vision.num_attention_heads,
            full_attention_layers=tuple(vision.full_attention_layers),
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            merge_size=vision.merge_size,
            window_size=vision.window_size,
        ),
        language=language,
        vocab_size=vocabulary.rows,
        max_sequence_length=config.model.seq_length,
        rope_theta=config.model.rope_theta,
        tied=config.model.tie_embeddings,
        image_token=vocabulary.image_token,
        video_token=vocabulary.video_token,
    )


def announce_microbatches(config: TrainConfig, run: Session, device: torch.device) -> None:
    """Tell the session what microbatches of this model are like."""
    run.microbatch_format = VisionLanguageMicrobatches(
        joining_stage=config.lap_layers.joining_stage,
        vision_width=config.vision.hidden_size,
        language_width=config.model.hidden_size,
        device=device,
    )
