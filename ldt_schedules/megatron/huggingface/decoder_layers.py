"""The parts of a language model that Qwen and Llama have in common: both ends, and a layer.

Names and shapes of the right column are those of the published checkpoints (Qwen/Qwen2.5-*, Qwen/Qwen3-*,
meta-llama/Llama-3*), which transformers writes to this day.
"""

from __future__ import annotations

from ldt_schedules.megatron.huggingface.mapping import Entry, entry
from ldt_schedules.megatron.huggingface.packing import Gated, Grouped, Padded

_GROUPS = Grouped("num_query_groups")
_QKV = (("q_proj", "query_size"), ("k_proj", "key_size"), ("v_proj", "key_size"))


def ends(prefix: str = "") -> tuple[Entry, ...]:
    """Embedding, last norm and output layer. `prefix` is what Megatron's names of the language model begin with."""
    embedding, padded = prefix + "embedding.word_embeddings.weight", Padded("padded_vocab_size")
    return (
        entry(embedding, ("model.embed_tokens.weight", "vocab_size", "hidden_size"), packing=padded),
        entry(prefix + "decoder.final_layernorm.weight", ("model.norm.weight", "hidden_size")),
        entry(
            prefix + "output_layer.weight",
            ("lm_head.weight", "vocab_size", "hidden_size"),
            packing=padded,
            tied_to=embedding,
        ),
    )


def layer(prefix: str = "", *, qkv_bias: bool = False, qk_norm: bool = False) -> tuple[Entry, ...]:
    """A layer, with what not all of them have: biases of q, k and v; a norm of each head's q and k."""
    ours, theirs = prefix + "decoder.layers.{n}.", "model.layers.{n}."
    attention, self_attn = ours + "self_attention.", theirs + "self_attn."
    entries = [
        entry(ours + "input_layernorm.weight", (theirs + "input_layernorm.weight", "hidden_size")),
        entry(
            attention + "linear_qkv.weight",
            *((f"{self_attn}{name}.weight", rows, "hidden_size") for name, rows in _QKV),
            packing=_GROUPS,
        ),
        entry(attention + "linear_proj.weight", (self_attn + "o_proj.weight", "hidden_size", "query_size")),
        entry(ours + "pre_mlp_layernorm.weight", (theirs + "post_attention_layernorm.weight", "hidden_size")),
        entry(
            ours + "mlp.linear_fc1.weight",
            (theirs + "mlp.gate_proj.weight", "ffn_hidden_size", "hidden_size"),
            (theirs + "mlp.up_proj.weight", "ffn_hidden_size", "hidden_size"),
            packing=Gated(),
        ),
        entry(ours + "mlp.linear_fc2.weight", (theirs + "mlp.down_proj.weight", "hidden_size", "ffn_hidden_size")),
    ]
    if qkv_bias:
        biases = ((f"{self_attn}{name}.bias", rows) for name, rows in _QKV)
        entries.append(entry(attention + "linear_qkv.bias", *biases, packing=_GROUPS))
    if qk_norm:
        entries += [
            entry(f"{attention}{head}_layernorm.weight", (f"{self_attn}{head}_norm.weight", "head_dim"))
            for head in ("q", "k")
        ]
    return tuple(entries)
