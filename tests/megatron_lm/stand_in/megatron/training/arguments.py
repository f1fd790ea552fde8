"""Arguments: the few that the stand-in's loop reads, under Megatron's names."""

from __future__ import annotations

import argparse
import os
from typing import Any

_NUMBERS = {
    "--num-layers": 4, "--hidden-size": 32, "--num-attention-heads": 4, "--seq-length": 16, "--micro-batch-size": 1,
    "--global-batch-size": 4, "--train-iters": 3, "--eval-iters": 2, "--eval-interval": 2, "--vocab-size": 64,
    "--tensor-model-parallel-size": 1, "--pipeline-model-parallel-size": 1, "--context-parallel-size": 1, "--seed": 1234,
    "--decoder-first-pipeline-num-layers": None, "--exit-interval": None,
}  # fmt: skip
_TEXTS = ("--data-path", "--tokenizer-type", "--tokenizer-model", "--save", "--load", "--rerun-mode")
_SWITCHES = (
    "--sequence-parallel", "--untie-embeddings-and-output-weights", "--mock-data", "--calculate-per-token-loss",
    "--log-params-norm", "--sft",
)  # fmt: skip


def add_megatron_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    for flag, default in _NUMBERS.items():
        parser.add_argument(flag, type=int, default=default)
    for flag in _TEXTS:
        parser.add_argument(flag)
    for flag in _SWITCHES:
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--lr", type=float, default=0.1)
    return parser


def parse_args(extra_args_provider: Any = None) -> argparse.Namespace:
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    if extra_args_provider is not None:
        parser = extra_args_provider(parser)
    args = parser.parse_args()
    args.rank, args.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return args


def validate_args(args: argparse.Namespace) -> None:
    """What Megatron derives and demands of one homogeneous world."""
    replica = args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    assert args.world_size % replica == 0, f"world size {args.world_size} is not a multiple of {replica}"
    args.data_parallel_size = args.world_size // replica
    if args.decoder_first_pipeline_num_layers is None:
        assert args.num_layers % args.pipeline_model_parallel_size == 0, "layers do not divide by the pipeline size"
    assert args.global_batch_size % (args.micro_batch_size * args.data_parallel_size) == 0
    args.iteration = args.consumed_train_samples = args.consumed_valid_samples = 0


def core_transformer_config_from_args(args: argparse.Namespace) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        num_layers_in_first_pipeline_stage=args.decoder_first_pipeline_num_layers,
        sequence_parallel=args.sequence_parallel,
        calculate_per_token_loss=args.calculate_per_token_loss,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        use_cpu_initialization=True,
        pipeline_dtype=None if args.pipeline_model_parallel_size == 1 else __import__("torch").float32,
    )
