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


def lap_stages(config: TrainConfig) -> tuple[tuple[int, int], ...]:
    """Layers of the ViT and of the language model in each stage, 0..2P; of an edge that is alone in its only one."""
    layers = config.lap_layers
    if config.num_pipeline_ranks == 1:
        return ((layers.vit[0], layers.llm[0]),)
    return tuple((layers.vit_of(stage), layers.llm_of(stage)) for stage in range(2 * layers.num_places + 1))


def joining_stage(config: TrainConfig) -> int:
    """The stage with projector and text embedding: P; of an edge that is alone 0."""
    return config.lap_layers.joining_stage if config.num_pipeline_ranks > 1 else 0
