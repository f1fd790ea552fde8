"""What the U needs of megatron-core and has no seam for. Declarations only: the code is in ldt_schedules.megatron."""

from __future__ import annotations

from patches.declaring import megatron
from patches.manager import Patch


def _core(target: str, factory: str, reason: str, signatures: tuple[tuple[str, ...], ...]) -> Patch:
    return megatron(f"core.{target}", f"megatron.{factory}", reason, signatures)


_CONFIG_AND_RANK = (("config",), ("config", "vp_stage"), ("config", "vp_stage", "pp_rank"))

_BY_POSITION = "up to 0.12 the groups of a checkpoint are loaded by position; the cloud's come in another order"

PATCHES: tuple[Patch, ...] = (
    _core(
        "pipeline_parallel.schedules:get_forward_backward_func",
        "forward_backward:select_forward_backward_func",
        "training loops ask here which schedule to run",
        ((), ("pp_size", "vp_size")),
    ),
    _core(
        "transformer.transformer_block:get_num_layers_to_build",
        "layer_span:num_layers_of_span",
        "the number of layers of a chunk follows from the pipeline size of one world, a U has two",
        _CONFIG_AND_RANK,
    ),
    _core(
        "transformer.transformer_layer:get_transformer_layer_offset",
        "layer_span:offset_of_span",
        "the same, for the number of the first layer",
        _CONFIG_AND_RANK,
    ),
    _core(
        "parallel_state:is_pipeline_first_stage",
        "stage_predicates:is_first_stage",
        "in a world of one site the cloud's first rank takes itself for the model's first stage",
        (("ignore_virtual",), ("ignore_virtual", "vp_stage")),
    ),
    _core(
        "parallel_state:is_pipeline_last_stage",
        "stage_predicates:is_last_stage",
        "the same for the last stage: without it the cloud would look for a loss",
        (("ignore_virtual",), ("ignore_virtual", "vp_stage")),
    ),
    _core(
        "tensor_parallel.cross_entropy:VocabParallelCrossEntropy.calculate_logits_max",
        "loss_precision:logits_max_in_their_precision",
        "it rounds to float32, which hides what a run in float64 is to show",
        (("vocab_parallel_logits",),),
    ),
    _core(
        "optimizer.clip_grads:get_grad_norm_fp32",
        "cross_site:grad_norm_of_both_sites",
        "the norm of the whole model needs the other site's part",
        (("grads_for_norm", "norm_type", "grad_stats_parallel_group"),),
    ),
    _core(
        "optimizer.clip_grads:count_zeros_fp32",
        "cross_site:zeros_of_both_sites",
        "the same for the number of zeros (--log-num-zeros-in-grad)",
        (
            ("parameters", "grad_stats_parallel_group", "use_decoupled_grad"),
            ("parameters", "grad_stats_parallel_group", "use_decoupled_grad", "tp_group"),
        ),
    ),
    _core(
        "transformer.transformer_block:TransformerBlock.sharded_state_dict",
        "checkpoints.layer_keys:a_key_for_each_layer",
        "a key that stacks all layers cannot be saved by a site that holds some",
        (("self", "prefix", "sharded_offsets", "metadata"),),
    ),
    _core(
        "optimizer.optimizer:MixedPrecisionOptimizer._unscale_main_grads_and_check_for_nan",
        "cross_site:overflow_on_either_site",
        "an overflow on one site must make both skip the step and lower both loss scales",
        (("self",),),
    ),
    _core(
        "optimizer.optimizer:MixedPrecisionOptimizer.prepare_grads",
        "cross_site:non_finite_on_either_site",
        "without a loss scale Megatron steps with an inf; on two sites that would spoil one and spare the other",
        (("self",),),
    ),
    _core(
        "optimizer.optimizer:FP32Optimizer.prepare_grads",
        "cross_site:non_finite_on_either_site",
        "the same",
        (("self",),),
    ),
    *(
        _core(
            f"optimizer.optimizer:{kind}.step_with_ready_grads",
            "two_phases:applied_by_all_or_none",
            "no process may change weights before all of both sites are ready to",
            (("self",),),
        )
        for kind in ("MixedPrecisionOptimizer", "FP32Optimizer")
    ),
    *(
        _core(target, "parameter_groups:load_groups_by_identity", _BY_POSITION, (("self", "state_dict"),))
        for target in (
            "optimizer.optimizer:FP32Optimizer.load_state_dict",
            "optimizer.optimizer:Float16OptimizerWithFloat16Params.load_state_dict",
            "optimizer.distrib_optimizer:DistributedOptimizer.load_state_dict",
        )
    ),
)
