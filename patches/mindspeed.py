"""What we put into MindSpeed's trainers. Declarations only: the code is in ldt_schedules.mindspeed.

    MindSpeed-MM     import mindspeed.megatron_adaptor, then mindspeed_mm, then `patches.mindspeed.install()`
    MindSpeed-LLM    `patches.mindspeed.install_llm()`, then import mindspeed_llm

`FOR_MM` and `FOR_LLM` go through MindSpeed's own patch manager, `MM_STARTUP` and `LLM_FEATURES` through ours: MindSpeed
needs these before its manager has read the model's json.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ldt_schedules.mindspeed import llm, mm
from patches import megatron_core, megatron_training
from patches.manager import Patch

if TYPE_CHECKING:
    from ldt_schedules.megatron.session import Session

_VERSIONS = ">=0.12.1,<0.13"
"""Of megatron-core. All releases of MindSpeed-MM and -LLM that have layerwise-disaggregated training are made for 0.12.1;
their own version numbers do not change."""

_MM_PARALLEL_STATE = "mindspeed_mm.patchs.layerwise_disaggregated_training.parallel_state_patch"

FOR_MM: tuple[Patch, ...] = megatron_core.PATCHES
"""What the model-json key `patch.layerwise_disaggregated_training` stands for."""


def _startup(target: str, factory: str, reason: str, signatures: tuple[tuple[str, ...], ...] = ()) -> Patch:
    return Patch(
        target=target,
        factory=f"ldt_schedules.mindspeed.{factory}",
        reason=reason,
        package="megatron-core",
        versions=_VERSIONS,
        signatures=signatures,
    )


MM_STARTUP: tuple[Patch, ...] = (
    _startup(
        f"{_MM_PARALLEL_STATE}:pre_validate_args_for_vtp",
        "mm:arguments_stay",
        "it invents a world size for Megatron's check; a site has a true one",
        (("args",),),
    ),
    _startup(
        f"{_MM_PARALLEL_STATE}:post_validate_args_for_vtp",
        "mm:arguments_stay",
        "it computes the replicas from the launcher's node number; on one host that gives 0",
        (("args",),),
    ),
    _startup(
        "megatron.core.parallel_state:initialize_model_parallel",
        "mm:left_alone",
        "MindSpeed-MM would replace it by a forged one that holds both sites",
    ),
)

_VLM_FORWARD = (
    *("self", "input_ids", "pixel_values", "image_grid_thw", "attention_mask", "labels", "inference_params"),
    *("decoder_input", "position_ids", "packed_seq_params", "extra_block_kwargs", "cache_position", "rope_deltas"),
    *("image_flags", "transfer", "args", "kwargs"),
)

MM_VISION_LANGUAGE: tuple[Patch, ...] = (
    _startup(
        "mindspeed_mm.models.vision.vision_encoders.vision_transformer_block:Qwen2VLVisionTransformerBlock.forward",
        "mm_vision_language:layers_counted",
        "it asks Megatron for its rank, which each site counts for itself, and counts the layers before the last ones wrongly",
    ),
    _startup(
        "mindspeed_mm.models.vlm_model:VLMModel.forward",
        "mm_vision_language:none_are_no_rows",
        "a microbatch may have no image, and there must be something to hand over",
        (_VLM_FORWARD,),
    ),
    _startup(
        "mindspeed_mm.models.vision.vision_model:VisionModel.forward",
        "mm_vision_language:nothing_seen",
        "the ViT cannot make windows of no image",
        (("self", "images", "image_grid_thw", "args", "kwargs"),),
    ),
)
"""For a run whose session exchanges MM's vision-language microbatches."""

FOR_LLM: tuple[Patch, ...] = (
    *megatron_core.PATCHES,
    *megatron_training.PATCHES,
    Patch(
        target="mindspeed_llm.training.training:pretrain",
        factory="ldt_schedules.megatron_lm.joining:leave_after",
        reason="a main program of its own, beside Megatron's; the sites must leave the link together",
        package="megatron-core",
        versions=_VERSIONS,
        signatures=(megatron_training.PRETRAIN[:7],),
    ),
)
"""What our feature registers with MindSpeed-LLM."""

LLM_FEATURES: tuple[Patch, ...] = (
    _startup(
        "mindspeed.features_manager.features_manager:MindSpeedFeaturesManager.set_features_list",
        "llm:with_our_feature",
        "importing mindspeed_llm sets the list of features and applies it at once",
        (("features_list",),),
    ),
)


def install() -> None:
    """Take over the model-json key `patch.layerwise_disaggregated_training` of MindSpeed-MM.

    Call it after `import mindspeed.megatron_adaptor` and `import mindspeed_mm`, before `pretrain`.

    Raises:
        patches.manager.PatchError: the wrong moment, or something that does not fit what is installed, by name.
    """
    mm.take_over(FOR_MM, MM_STARTUP)


def serve_vision_language(run: Session) -> None:
    """Let `run` train MindSpeed-MM's vision-language model: Qwen2-VL and Qwen2.5-VL, in two laps, three chunks a process.

    Call it after `join_link`, on both sites, with MM's arguments set. The cloud is told grids, padding and positions of each
    microbatch, see `ldt_schedules.mindspeed.mm_microbatches`.

    Raises:
        ldt_schedules.errors.ConfigError: a model, or an option, that cannot be split so.
        patches.manager.PatchError: MM's model is not the one that was patched.
    """
    from ldt_schedules.mindspeed import mm_vision_language  # it imports Megatron, which MindSpeed wants to be first at

    mm_vision_language.serve(run, MM_VISION_LANGUAGE)


def install_llm() -> None:
    """Make MindSpeed-LLM pick up our feature in the place of its three. Call it before `import mindspeed_llm`.

    Raises:
        patches.manager.PatchError: the wrong moment, or something that does not fit what is installed, by name.
    """
    llm.announce(LLM_FEATURES)
