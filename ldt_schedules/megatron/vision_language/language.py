"""A chunk of the language model: megatron-core's GPTModel with M-RoPE, attention inside segments."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel

from ldt_schedules.megatron.layer_span import LayerSpan, span_of
from ldt_schedules.megatron.segment_attention import SegmentAttention
from ldt_schedules.megatron.vision_language.layers import block_of


def language_chunk(
    config: Any,
    *,
    vocab_size: int,
    max_sequence_length: int,
    rope_theta: float,
    tied: bool,
    pre_process: bool,
    post_process: bool,
) -> GPTModel:
    """The layers of the config's span, with the embedding (`pre_process`) and the output layer (`post_process`).

    Called as every GPTModel is, with `position_ids` `[3, b, s]`, and segments `[b, s]` (or None) as its `attention_mask`.

    Args:
        config: a TransformerConfig with `mrope_section` and the chunk's span (`layer_span.config_with_span`).
        vocab_size: rows of the embedding, a multiple of the tensor-parallel size.
        tied: the output layer uses the embedding's weight; who builds two ends of one model makes them one parameter.
    """
    span = span_of(config) or LayerSpan(0, config.num_layers)
    gpt = GPTModel(
        config=config,
        transformer_layer_spec=block_of([SegmentAttention] * span.count, causal=True, rotate_in_float32=False),
        vocab_size=vocab_size,
        max_sequence_length=max_sequence_length,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        # The middle holds neither end: told of a tie, Megatron would look for the other copy in its own world.
        share_embeddings_and_output_weights=tied and (pre_process or post_process),
        position_embedding_type="mrope",
        rotary_base=rope_theta,
    )
    return gpt.to(config.params_dtype)  # torch's norms are made in float32
