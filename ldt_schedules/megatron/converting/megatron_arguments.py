"""The arguments that Megatron-LM looks for in a checkpoint (`args`), and what it does with them.

megatron/training/checkpointing.py, core_v0.12.1 to core_v0.16.1:

    load_checkpoint              parallel sizes (must be there in 0.12), no_save_optim, no_save_rng, consumed samples
    check_checkpoint_args        the sizes of the model must be those of the command line
    load_args_from_checkpoint    --use-checkpoint-args: the model's arguments are taken from the checkpoint

Nothing else is kept of what a run has saved: its paths (data, tokenizer, logs) are nobody else's business.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from ldt_schedules.megatron.converting.plain_values import is_plain

KEPT = frozenset(
    {"num_layers", "hidden_size", "ffn_hidden_size", "seq_length", "num_attention_heads", "num_query_groups"}
    | {"group_query_attention", "kv_channels", "max_position_embeddings", "position_embedding_type", "qk_layernorm"}
    | {
        "add_position_embedding",
        "use_rotary_position_embeddings",
        "rotary_base",
        "rotary_percent",
        "rotary_interleaved",
    }
    | {"add_bias_linear", "add_qkv_bias", "squared_relu", "swiglu", "untie_embeddings_and_output_weights"}
    | {"apply_layernorm_1p", "normalization", "norm_epsilon", "apply_query_key_layer_scaling", "attention_dropout"}
    | {"hidden_dropout", "make_vocab_size_divisible_by", "padded_vocab_size", "tokenizer_type", "global_batch_size"}
    | {"consumed_train_samples", "skipped_train_samples", "consumed_valid_samples", "data_parallel_random_init"}
    | {"use_distributed_optimizer", "fp16", "bf16"}
)


def arguments_of_settings(model: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron-LM's names of a model's settings.

    Args:
        model: keys of our config's `model`, as `Architecture.settings` gives them too; what is absent stays absent.
    """
    names = {
        "num_layers": "num_layers",
        "hidden_size": "hidden_size",
        "ffn_hidden_size": "ffn_hidden_size",
        "num_attention_heads": "num_attention_heads",
        "num_query_groups": "num_query_groups",
        "head_dim": "kv_channels",
        "seq_length": "seq_length",
        "normalization": "normalization",
        "norm_eps": "norm_epsilon",
        "rope_theta": "rotary_base",
        "linear_bias": "add_bias_linear",
        "qkv_bias": "add_qkv_bias",
        "qk_norm": "qk_layernorm",
        "position_embedding": "position_embedding_type",
    }
    given = {theirs: model[ours] for ours, theirs in names.items() if model.get(ours) is not None}
    if "num_attention_heads" in given and "hidden_size" in given:
        given.setdefault("kv_channels", given["hidden_size"] // given["num_attention_heads"])
    if {"num_attention_heads", "num_query_groups"} <= given.keys():
        given["group_query_attention"] = given["num_query_groups"] != given["num_attention_heads"]
    if "seq_length" in given:
        given["max_position_embeddings"] = given["seq_length"]
    if "activation" in model:
        given["swiglu"] = model["activation"] == "swiglu"
    if "tie_embeddings" in model:
        given["untie_embeddings_and_output_weights"] = not model["tie_embeddings"]
    return given


def arguments_of_checkpoint(common: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of the arguments in a common state; nothing of one that has none."""
    given = vars(common["args"]) if isinstance(common.get("args"), Namespace) else {}
    return {name: value for name, value in given.items() if name in KEPT and is_plain(value)}


def namespace(arguments: Mapping[str, Any], *, optimizer: bool) -> Namespace:
    """`args` of a checkpoint without random states, which Megatron reads at any parallel sizes."""
    return Namespace(
        **{
            "add_position_embedding": True,
            "make_vocab_size_divisible_by": 128,
            "consumed_train_samples": 0,
            "skipped_train_samples": 0,
            "consumed_valid_samples": 0,
            **arguments,
            "tensor_model_parallel_size": 1,
            "pipeline_model_parallel_size": 1,
            "no_save_rng": True,
            "no_save_optim": not optimizer,
            "ckpt_format": "torch_dist",
            "ckpt_fully_parallel_save": True,  # up to 0.12: a distributed optimizer's state by parameter, not by buffer
        }
    )
