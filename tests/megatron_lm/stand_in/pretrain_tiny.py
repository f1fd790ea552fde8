"""A user's training script for the stand-in: provider, forward step and data, as pretrain_gpt.py has them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.training import get_args
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.training import pretrain
from megatron.training.utils import get_batch_on_this_tp_rank

from ldt_schedules.megatron.initialization import initialize_by_name


def model_provider(pre_process: bool = True, post_process: bool = True, **unused: Any) -> GPTModel:
    args = get_args()
    config = core_transformer_config_from_args(args)
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(),
        vocab_size=args.vocab_size,
        max_sequence_length=args.seq_length,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
    )
    initialize_by_name(model, config, args.seed)  # the same weights however the model is split
    return model


def loss_func(loss_mask: torch.Tensor, output: torch.Tensor) -> Any:
    loss = torch.sum(output.view(-1) * loss_mask.view(-1))
    tokens = loss_mask.sum().to(torch.int)
    return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens.float()])}


def forward_step(data_iterator: Any, model: Any) -> Any:
    if not (parallel_state.is_pipeline_first_stage() or parallel_state.is_pipeline_last_stage()):
        return model(None, None, None), None
    batch = get_batch_on_this_tp_rank(data_iterator)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, partial(loss_func, batch["loss_mask"])


def datasets(args: Any) -> tuple[Any, Any, Any]:
    """Three splits; a process that opens them says so."""
    print(f"rank {args.rank} of {args.world_size} opens {args.data_path or 'mock data'}", flush=True)
    return tuple(_samples(args, number) for number in range(3))


def _samples(args: Any, split: int) -> Any:
    """Sample n of the split goes to replica n mod dp, a microbatch of one sample."""
    rank, size = parallel_state.get_data_parallel_rank(), args.data_parallel_size
    number = rank
    while True:
        generator = torch.Generator().manual_seed(1000 * split + number)
        text = torch.randint(args.vocab_size, (1, args.seq_length + 1), generator=generator)
        mask = (torch.rand(1, args.seq_length, generator=generator) < 0.8).float()
        tokens, labels = text[:, :-1].contiguous(), text[:, 1:].contiguous()
        positions = torch.arange(args.seq_length).unsqueeze(0)
        yield {"tokens": tokens, "labels": labels, "position_ids": positions, "loss_mask": mask}
        number += size


def more_arguments(parser: Any) -> Any:
    parser.add_argument("--own-flag", type=int, default=0)
    return parser


if __name__ == "__main__":
    pretrain(datasets, model_provider, None, forward_step, extra_args_provider=more_arguments)
