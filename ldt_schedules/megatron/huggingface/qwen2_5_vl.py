"""The table of Qwen2.5-VL.

Names and shapes of the right column are those of the published checkpoints (Qwen/Qwen2.5-VL-3B-Instruct and its larger
siblings), which transformers writes to this day. transformers 4.52 and later call the same modules `model.visual` and
`model.language_model` in memory, and some checkpoints have been saved so: the second spelling.
"""

from __future__ import annotations

from ldt_schedules.megatron.huggingface.decoder_layers import ends, layer
from ldt_schedules.megatron.huggingface.mapping import Architecture, Spelling, entry
from ldt_schedules.megatron.huggingface.packing import Fused, Gated
from ldt_schedules.megatron.huggingface.qwen2_5_vl_settings import settings

_PATCH = ("vision.in_channels", "vision.temporal_patch_size", "vision.patch_size", "vision.patch_size")
_WIDTH, _FFN, _MERGED = "vision.hidden_size", "vision.ffn_hidden_size", "vision.merged_size"
_HEADS = Fused("vision.num_attention_heads")

_ONCE = (
    entry("vision.patch_embed.weight", ("visual.patch_embed.proj.weight", _WIDTH, *_PATCH)),
    entry("vision.projector.norm.weight", ("visual.merger.ln_q.weight", _WIDTH)),
    entry("vision.projector.mlp.linear_fc1.weight", ("visual.merger.mlp.0.weight", _MERGED, _MERGED)),
    entry("vision.projector.mlp.linear_fc1.bias", ("visual.merger.mlp.0.bias", _MERGED)),
    entry("vision.projector.mlp.linear_fc2.weight", ("visual.merger.mlp.2.weight", "hidden_size", _MERGED)),
    entry("vision.projector.mlp.linear_fc2.bias", ("visual.merger.mlp.2.bias", "hidden_size")),
    *ends("language."),
)

_V, _VISUAL = "vision.decoder.layers.{n}.", "visual.blocks.{n}."

_VISION_LAYER = (
    entry(_V + "input_layernorm.weight", (_VISUAL + "norm1.weight", _WIDTH)),
    entry(
        _V + "self_attention.linear_qkv.weight",
        (_VISUAL + "attn.qkv.weight", "vision.qkv_size", _WIDTH),
        packing=_HEADS,
    ),
    entry(_V + "self_attention.linear_qkv.bias", (_VISUAL + "attn.qkv.bias", "vision.qkv_size"), packing=_HEADS),
    entry(_V + "self_attention.linear_proj.weight", (_VISUAL + "attn.proj.weight", _WIDTH, _WIDTH)),
    entry(_V + "self_attention.linear_proj.bias", (_VISUAL + "attn.proj.bias", _WIDTH)),
    entry(_V + "pre_mlp_layernorm.weight", (_VISUAL + "norm2.weight", _WIDTH)),
    entry(
        _V + "mlp.linear_fc1.weight",
        (_VISUAL + "mlp.gate_proj.weight", _FFN, _WIDTH),
        (_VISUAL + "mlp.up_proj.weight", _FFN, _WIDTH),
        packing=Gated(),
    ),
    entry(
        _V + "mlp.linear_fc1.bias",
        (_VISUAL + "mlp.gate_proj.bias", _FFN),
        (_VISUAL + "mlp.up_proj.bias", _FFN),
        packing=Gated(),
    ),
    entry(_V + "mlp.linear_fc2.weight", (_VISUAL + "mlp.down_proj.weight", _WIDTH, _FFN)),
    entry(_V + "mlp.linear_fc2.bias", (_VISUAL + "mlp.down_proj.bias", _WIDTH)),
)

QWEN2_5_VL = Architecture(
    name="Qwen2_5_VLForConditionalGeneration",
    once=_ONCE,
    layers={"vision.num_layers": _VISION_LAYER, "num_layers": layer("language.", qkv_bias=True)},
    settings=settings,
    spellings=(
        Spelling(),
        Spelling((("visual.", "model.visual."), ("model.", "model.language_model."))),
    ),
)
