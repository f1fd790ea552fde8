"""Which of Megatron's arguments must be equal on both sites: all, but for those that are a site's own business."""

from __future__ import annotations

import hashlib
from typing import Any

from ldt_schedules.megatron_lm.flags import Flags
from ldt_schedules.megatron_lm.site_arguments import EDGE_ONLY_FLAGS

_OF_A_SITE = {
    "rank", "world_size", "local_rank", "data_parallel_size", "tensor_model_parallel_size",
    "pipeline_model_parallel_size", "transformer_pipeline_model_parallel_size", "expert_tensor_parallel_size",
    "sequence_parallel", "async_tensor_model_parallel_allreduce", "untie_embeddings_and_output_weights",
    "decoder_first_pipeline_num_layers", "model_parallel_size", "save", "load", "mock_data", "padded_vocab_size",
    "transformer_impl", "attention_backend", "num_workers", "distributed_backend", "use_flash_attn",
    "gradient_accumulation_fusion", "masked_softmax_fusion", "bias_gelu_fusion", "bias_swiglu_fusion",
    "bias_dropout_fusion", "apply_rope_fusion", "cross_entropy_loss_fusion", "cross_entropy_fusion_impl",
    "persist_layer_norm", "use_distributed_optimizer", "manual_gc", "manual_gc_interval", "manual_gc_eval",
    "empty_unused_memory_level", "start_time", "num_dataset_builder_threads", "mmap_bin_files",
    "exit_signal_handler_for_dataloader", "legacy_tokenizer", "trust_remote_code", "dataloader_type",
    "create_attention_mask_in_dataloader", "iterations_to_skip", "check_for_nan_in_loss_and_grad",
}  # fmt: skip
"""Sizes, files, kernels of a site; the rest of its memory and speed is in the prefixes."""

_PREFIXES = (
    "log_", "tensorboard_", "wandb_", "timing_log", "profile", "one_logger", "enable_one_logger", "ckpt_", "dist_ckpt",
    "recompute_", "overlap_", "ddp_", "tp_comm_", "data_", "fim_", "inference_", "tokenizer_", "rl_", "nccl_",
    "ldt_", "local_", "align_", "enable_gloo", "use_dist_ckpt", "auto_detect_ckpt", "app_tag", "inprocess_",
)  # fmt: skip

_MAX_TEXT = 200

_EDGE_ONLY = {flag.removeprefix("--").replace("-", "_") for flag in EDGE_ONLY_FLAGS}


def shared_arguments(args: Any, flags: Flags) -> dict[str, Any]:
    """Name -> value as text, of what both sites must have alike: Megatron's arguments after its validation, and ours.

    What may be a path, or is long, is sent as its hash.
    """
    shared = {
        name: _without_paths(repr(value))
        for name, value in vars(args).items()
        if name not in _OF_A_SITE and name not in _EDGE_ONLY and not name.startswith(_PREFIXES)
    }
    ours = {
        "--ldt-layers": list(flags.layers),
        "--ldt-schedule": flags.schedule,
        "tied embeddings": flags.tied,
        "sequence parallel": flags.sequence_parallel,
        "tensor sizes (edge, cloud)": [flags.edge_tensor_size, flags.cloud_tensor_size],
    }
    return {**shared, **ours}


def _without_paths(text: str) -> str:
    if len(text) <= _MAX_TEXT and not any(separator in text for separator in "/\\"):
        return text
    return f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"
