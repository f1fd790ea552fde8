"""The sizes of a vision-language model's parts, in the words that there are for a model of text.

    vit         patch embedding, ViT layers         stages 0..P
    projector   norm, two linear layers             stage P
    language    embedding, layers, norm, output     stages P..2P

A ViT layer is a layer of a language model with RMSNorm, a gated MLP and biases; only its attention is not causal, and
inside windows or frames.
"""

from __future__ import annotations

from ldt_schedules.training.config import TrainConfig
from ldt_schedules.training.sections import ModelSection

_CHANNELS = 3


def vit_as_model(config: TrainConfig) -> ModelSection:
    """The ViT's layers. `seq_length` says nothing: how many patches there are, the images decide."""
    vision = config.vision
    return ModelSection(
        num_layers=vision.num_layers,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.ffn_hidden_size,
        num_attention_heads=vision.num_attention_heads,
        num_query_groups=vision.num_attention_heads,
        seq_length=1,
        normalization="RMSNorm",
        activation="swiglu",
        linear_bias=True,
        precision=config.model.precision,
    )  # type: ignore[call-arg]


def patch_values(config: TrainConfig) -> int:
    """Numbers in a flattened patch: channels x frames x height x width."""
    vision = config.vision
    return _CHANNELS * vision.temporal_patch_size * vision.patch_size**2


def merged_width(config: TrainConfig) -> int:
    """The patches that become one token, put beside each other, elements."""
    return config.vision.hidden_size * config.vision.merge_size**2
