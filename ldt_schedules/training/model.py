"""From the training config to megatron-core objects: TransformerConfig, GPT chunks, DistributedDataParallel, optimizer.

The same code builds an edge, a cloud process and a model in one process; only the place differs.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
import torch.nn.functional as functional
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron.chunks import build_chunks
from ldt_schedules.megatron.initialization import initialize_by_name
from ldt_schedules.megatron.layer_span import span_of
from ldt_schedules.megatron.modalities import Modality
from ldt_schedules.megatron.rotary import inverse_frequencies, set_frequencies, softmax_scale
from ldt_schedules.megatron.segmented_gpt import SegmentedGPT
from ldt_schedules.topology import Place, Site, Topology
from ldt_schedules.training.config import TrainConfig
from ldt_schedules.training.huggingface_model import load_weights
from ldt_schedules.training.layer_spec import block_spec
from ldt_schedules.training.vision_config import mrope_section
from ldt_schedules.training.vision_model import vision_language_module
from ldt_schedules.training.vocabulary import Vocabulary

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
_ACTIVATIONS = {"gelu": (functional.gelu, False), "swiglu": (functional.silu, True)}


@dataclass
class Trained:
    """What a training loop holds.

    Attributes:
        model: the DistributedDataParallel module of this process; a list of one where Megatron wants a list.
    """

    config: TransformerConfig
    model: DistributedDataParallel
    optimizer: Any
    scheduler: OptimizerParamScheduler


def transformer_config(config: TrainConfig, topology: Topology, site: Site) -> TransformerConfig:
    """The whole model's config in the world of one site."""
    model, size = config.model, topology.size(site)
    activation, gated = _ACTIVATIONS[model.activation]
    dtype = _DTYPES[model.precision]
    recompute = config.train.recompute
    known = [field.name for field in fields(TransformerConfig)]
    for name in model.megatron:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f"model.megatron.{name} is no field of megatron-core's TransformerConfig"
                + (f"; did you mean {near[0]}?" if near else "")
            )
    ours = dict(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_width,
        qk_layernorm=model.qk_norm,
        softmax_scale=softmax_scale(model.head_width, model.scaling),
        layernorm_epsilon=model.norm_eps,
        add_qkv_bias=model.qkv_bias,
        normalization=model.normalization,
        activation_func=activation,
        gated_linear_unit=gated,
        add_bias_linear=model.linear_bias,
        attention_dropout=model.dropout,
        hidden_dropout=model.dropout,
        tensor_model_parallel_size=size.tensor,
        context_parallel_size=size.context,
        sequence_parallel=size.sequence_parallel,
        pipeline_model_parallel_size=topology.pipeline_size(site),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        fp16=model.precision == "fp16",
        bf16=model.precision == "bf16",
        calculate_per_token_loss=config.train.calculate_per_token_loss,
        recompute_granularity=None if recompute == "none" else recompute,
        recompute_method="uniform" if recompute == "full" else None,
        recompute_num_layers=1 if recompute == "full" else None,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        deallocate_pipeline_outputs=True,
    )
    if config.has_vision:
        ours["mrope_section"] = mrope_section(config)
    return TransformerConfig(**{**ours, **model.megatron})


def _gpt(
    chunk_config: TransformerConfig, *, pre_process: bool, post_process: bool, train: TrainConfig, vocab_size: int
) -> SegmentedGPT:
    model, span = train.model, span_of(chunk_config)
    assert span is not None, "build_chunks gives every chunk its span"
    # The cloud holds neither end: told of a tie, Megatron would look for the other copy in the cloud's own world.
    tied = model.tie_embeddings and (pre_process or post_process)
    gpt = SegmentedGPT(
        config=chunk_config,
        transformer_layer_spec=block_spec(chunk_config, span.count),
        vocab_size=vocab_size,
        max_sequence_length=model.seq_length,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        share_embeddings_and_output_weights=tied,
        position_embedding_type=model.position_embedding,
        rotary_base=model.rope_theta,
    )
    if model.rope_scaling is not None:
        set_frequencies(gpt, inverse_frequencies(model.head_width, model.rope_theta, model.scaling))
    # torch's norms are made in float32. Megatron's Float16Module narrows them; nothing of Megatron's widens them.
    return gpt.double() if model.precision == "fp64" else gpt


def build_module(
    config: TrainConfig,
    whole: TransformerConfig,
    place: Place,
    vocabulary: Vocabulary,
    modalities: Sequence[Modality] = (),
    first_weights: bool = True,
) -> MegatronModule:
    """The chunks of this process, not yet wrapped. `whole` is the whole model's config here; for the others see `build`."""
    if config.has_vision:
        module = vision_language_module(config, whole, place, vocabulary)
    else:
        provider = partial(_gpt, train=config, vocab_size=vocabulary.rows)
        tied = config.model.tie_embeddings
        module = build_chunks(whole, config.layer_split, place, provider, tied, modalities=modalities)
    if first_weights and config.model.hf is None:
        initialize_by_name(module, whole, config.train.seed)
    elif first_weights:
        load_weights(config, module, place, vocabulary.rows)
    return module


def build(
    config: TrainConfig,
    topology: Topology,
    place: Place,
    vocabulary: Vocabulary,
    ddp_config: DistributedDataParallelConfig | None = None,
    modalities: Sequence[Modality] = (),
    first_weights: bool = True,
) -> Trained:
    """Model, optimizer and learning-rate schedule of this process.

    Args:
        ddp_config: how gradients are reduced inside the site; default Megatron's, without overlap.
        modalities: encoders beside the text, as stages of the edge.
        first_weights: draw or load the weights; not where a checkpoint gives all of them.

    Raises:
        ConfigError: `model.megatron` names a field that TransformerConfig does not have.
    """
    whole = transformer_config(config, topology, place.site)
    module = build_module(config, whole, place, vocabulary, modalities, first_weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Apex is not installed" and the like: said once by Megatron's import
        if ddp_config is None:
            ddp_config = DistributedDataParallelConfig(
                grad_reduce_in_fp32=config.model.precision != "fp64",
                use_distributed_optimizer=config.train.distributed_optimizer,
                overlap_grad_reduce=config.train.overlap_grad_reduce,
            )
        ddp = DistributedDataParallel(config=whole, ddp_config=ddp_config, module=module)
        optimizer = get_megatron_optimizer(_optimizer_config(config, ddp_config), [ddp])
    whole.finalize_model_grads_func = finalize_model_grads
    whole.grad_scale_func = optimizer.scale_loss
    whole.no_sync_func = ddp.no_sync
    return Trained(whole, ddp, optimizer, _scheduler(config, optimizer))


def _optimizer_config(config: TrainConfig, ddp_config: DistributedDataParallelConfig) -> OptimizerConfig:
    train = config.train
    return OptimizerConfig(
        use_distributed_optimizer=ddp_config.use_distributed_optimizer,
        optimizer=train.optimizer,
        lr=train.lr,
        min_lr=train.min_lr,
        weight_decay=train.weight_decay,
        clip_grad=train.clip_grad,
        sgd_momentum=0.0,
        fp16=config.model.precision == "fp16",
        bf16=config.model.precision == "bf16",
        params_dtype=_DTYPES[config.model.precision],
        initial_loss_scale=2.0**16,
    )


def _scheduler(config: TrainConfig, optimizer: Any) -> OptimizerParamScheduler:
    train = config.train
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=train.lr,
        min_lr=train.min_lr,
        lr_warmup_steps=train.warmup_iterations,
        lr_decay_steps=max(train.lr_decay_iterations or train.iterations, train.warmup_iterations + 1),
        lr_decay_style="cosine",
        start_wd=train.weight_decay,
        end_wd=train.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
