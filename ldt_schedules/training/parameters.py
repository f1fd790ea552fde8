"""How many parameters a model has, stage by stage, by arithmetic on shapes.

The count is that of megatron-core's GPTModel with its local layer spec, and of the modules around a ViT:

    layer   norm, QKV [h, d(heads + 2 groups)], norms of q and k [d] if there are some, projection [d heads, h], norm, MLP up
            [h, f] (twice for a gate), down [f, h]
    head    embedding [V, h], learned positions [s, h]
    tail    norm, output [V, h] (none where it is tied to the embedding: both live in the edge process)

    vision  patch embedding [h_v, C T P P]; the projector norm [h_v], [w, w], [w, h] with biases, w = h_v merge_size^2
"""

from __future__ import annotations

import math

from ldt_schedules.training.chat.writing import ByteChat
from ldt_schedules.training.config import TrainConfig
from ldt_schedules.training.sections import ModelSection
from ldt_schedules.training.tokenizer import ByteTokenizer
from ldt_schedules.training.vision_parts import merged_width, patch_values, vit_as_model

ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}

_VOCAB_MULTIPLE = 128  # Megatron's default; matrix units like such sizes


def padded_vocab_size(vocab_size: int, tensor_parallel: int, published: bool = False) -> int:
    """Rows of the embedding: the vocabulary, rounded up so that it divides over the tensor-parallel processes.

    A power of two up to 128 processes gives the same size as 1, so that those runs hold the same model.

    Args:
        published: weights come from elsewhere. Rows that were never trained take part in the softmax, so there are no more
            than the processes need.
    """
    multiple = tensor_parallel if published else math.lcm(_VOCAB_MULTIPLE, tensor_parallel)
    return -(-vocab_size // multiple) * multiple


def bytes_vocab_size(config: TrainConfig) -> int:
    """Of the tokenizer `bytes`: with vision it has the special tokens of a conversation, too."""
    if not config.has_vision:
        return ByteTokenizer.vocab_size
    return ByteChat.with_ids(config.vision.image_token, config.vision.video_token).vocab_size


def layer_parameters(model: ModelSection) -> int:
    """Of one transformer layer."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    query, qkv = model.query_width, model.query_width + 2 * model.kv_width
    up = ffn * (2 if model.activation == "swiglu" else 1)
    weights = hidden * qkv + query * hidden + hidden * up + ffn * hidden
    biases = hidden + up + hidden if model.linear_bias else 0
    biases += qkv if model.linear_bias or model.qkv_bias else 0
    of_heads = 2 * _norm_parameters(model, model.head_width) if model.qk_norm else 0
    return weights + biases + of_heads + 2 * _norm_parameters(model, hidden)


def stage_parameters(config: TrainConfig, vocab_size: int) -> tuple[int, ...]:
    """Of each stage: head, cloud stages, tail. `vocab_size` is the padded one."""
    if config.has_vision:
        return tuple(sum(parts.values()) for parts in vision_parameters(config, vocab_size))
    model = config.model
    counts = [layers * layer_parameters(model) for layers in config.layer_split]
    positions = model.seq_length if model.position_embedding == "learned_absolute" else 0
    counts[0] += (vocab_size + positions) * model.hidden_size
    counts[-1] += _norm_parameters(model, model.hidden_size) + _output_parameters(model, vocab_size)
    return tuple(counts)


def vision_parameters(config: TrainConfig, vocab_size: int) -> tuple[dict[str, int], ...]:
    """Of each stage of a vision-language model: `vit`, `projector`, `language` -> parameters. Padded `vocab_size`."""
    model, vit, laps = config.model, vit_as_model(config), config.lap_layers
    counts = [
        {"vit": vision * layer_parameters(vit), "projector": 0, "language": language * layer_parameters(model)}
        for vision, language in map(laps.layers_of, range(laps.num_stages))
    ]
    joining, width = counts[laps.joining_stage], merged_width(config)
    counts[0]["vit"] += patch_values(config) * vit.hidden_size
    joining["projector"] += vit.hidden_size + (width + 1) * width + (width + 1) * model.hidden_size
    joining["language"] += vocab_size * model.hidden_size
    counts[-1]["language"] += _norm_parameters(model, model.hidden_size) + _output_parameters(model, vocab_size)
    return tuple(counts)


def trained_parameters(config: TrainConfig, vocab_size: int) -> tuple[int, ...]:
    """As `stage_parameters`, without what is frozen."""
    if not config.has_vision:
        return stage_parameters(config, vocab_size)
    return tuple(
        sum(count for part, count in parts.items() if part not in config.vision.frozen)
        for parts in vision_parameters(config, vocab_size)
    )


def _norm_parameters(model: ModelSection, width: int) -> int:
    return width * (2 if model.normalization == "LayerNorm" else 1)


def _output_parameters(model: ModelSection, vocab_size: int) -> int:
    return 0 if model.tie_embeddings else vocab_size * model.hidden_size
