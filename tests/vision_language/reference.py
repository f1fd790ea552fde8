"""transformers' Qwen2.5-VL: the same tiny model, its weights under our names, and how far ours is from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.vision_language import tiny

Tensors = dict[str, torch.Tensor]


def reference_model(dtype: torch.dtype) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=tiny.VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=tiny.LANGUAGE_LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": tiny.MROPE},
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=tiny.PAD,
        ),
        vision_config=dict(
            depth=tiny.VISION_LAYERS,
            hidden_size=32,
            intermediate_size=40,
            num_heads=2,
            patch_size=2,
            temporal_patch_size=2,
            spatial_merge_size=tiny.MERGE,
            window_size=8,
            out_hidden_size=32,
            fullatt_block_indexes=list(tiny.FULL_ATTENTION),
            tokens_per_second=2,
        ),
        image_token_id=tiny.IMAGE,
        video_token_id=tiny.VIDEO,
        vision_start_token_id=60,
        vision_end_token_id=61,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(3)
    model = Qwen2_5_VLForConditionalGeneration(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.25 * torch.randn_like(parameter) + (1.0 if "norm" in name or "ln_q" in name else 0.0))
    return model


def keep_float64() -> None:
    """The reference rounds to float32 in its norm and where its ViT rotates, also in a float64 model.

    A comparison at 1e-9 would end there. So both are written anew, the same formulas in the dtype that they are given.
    """
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as theirs

    def norm(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        cos, sin = cos.unsqueeze(-2).to(q.dtype), sin.unsqueeze(-2).to(q.dtype)
        return q * cos + theirs.rotate_half(q) * sin, k * cos + theirs.rotate_half(k) * sin

    theirs.Qwen2_5_VLRMSNorm.forward = norm
    theirs.apply_rotary_pos_emb_vision = rotate


def logits_of(model: Any, batch: Tensors) -> torch.Tensor:
    """`[b, s, vocabulary]`; images and videos are handed over apart."""
    ids, grids = batch["input_ids"], batch["grids"]
    is_video = [_token_of(ids, number) == tiny.VIDEO for number in range(len(grids))]
    pixels = batch["pixel_values"].split(grids.prod(1).tolist())
    inputs: dict[str, Any] = {}
    for wanted, values, sizes in (
        (False, "pixel_values", "image_grid_thw"),
        (True, "pixel_values_videos", "video_grid_thw"),
    ):
        mine = [number for number, video in enumerate(is_video) if video is wanted]
        if mine:
            inputs[values], inputs[sizes] = torch.cat([pixels[number] for number in mine]), grids[mine]
    output = model(
        input_ids=ids,
        attention_mask=(~batch["padding"]).long(),
        position_ids=batch["position_ids"],
        mm_token_type_ids=(ids == tiny.IMAGE).int() + 2 * (ids == tiny.VIDEO).int(),
        use_cache=False,
        **inputs,
    )
    logits: torch.Tensor = output.logits
    return logits


def _token_of(ids: torch.Tensor, number: int) -> int:
    """Placeholder of image or video `number`; between two stands text, or the end of a sample."""
    found = -1
    for sample in ids.tolist():
        before = None
        for token in sample:
            if token in (tiny.IMAGE, tiny.VIDEO) and token != before:
                found += 1
                if found == number:
                    return int(token)
            before = token
    raise AssertionError(f"no placeholder {number}")


def in_our_names(theirs: Tensors) -> Tensors:
    """Weights of transformers' model, or their gradients, as the whole model's."""
    ours = {
        "vision.patch_embed.weight": theirs["model.visual.patch_embed.proj.weight"].flatten(1),
        "vision.projector.norm.weight": theirs["model.visual.merger.ln_q.weight"],
        "language.embedding.word_embeddings.weight": theirs["model.language_model.embed_tokens.weight"],
        "language.decoder.final_layernorm.weight": theirs["model.language_model.norm.weight"],
        "language.output_layer.weight": theirs["lm_head.weight"],
    }
    for kind in ("weight", "bias"):
        ours[f"vision.projector.mlp.linear_fc1.{kind}"] = theirs[f"model.visual.merger.mlp.0.{kind}"]
        ours[f"vision.projector.mlp.linear_fc2.{kind}"] = theirs[f"model.visual.merger.mlp.2.{kind}"]
    for number in range(tiny.VISION_LAYERS):
        own, their = f"vision.decoder.layers.{number}", f"model.visual.blocks.{number}"
        _norms_and_mlp(ours, own, theirs, their, ("norm1", "norm2"), ("weight", "bias"))
        for kind in ("weight", "bias"):
            three = theirs[f"{their}.attn.qkv.{kind}"].unflatten(0, (3, 2, 16))
            ours[f"{own}.self_attention.linear_qkv.{kind}"] = three.transpose(0, 1).flatten(0, 2)
            ours[f"{own}.self_attention.linear_proj.{kind}"] = theirs[f"{their}.attn.proj.{kind}"]
    for number in range(tiny.LANGUAGE_LAYERS):
        own, their = f"language.decoder.layers.{number}", f"model.language_model.layers.{number}"
        _norms_and_mlp(ours, own, theirs, their, ("input_layernorm", "post_attention_layernorm"), ("weight",))
        for kind in ("weight", "bias"):
            q, k, v = (theirs[f"{their}.self_attn.{part}_proj.{kind}"].unflatten(0, (2, -1)) for part in "qkv")
            ours[f"{own}.self_attention.linear_qkv.{kind}"] = torch.cat([q, k, v], dim=1).flatten(0, 1)
        ours[f"{own}.self_attention.linear_proj.weight"] = theirs[f"{their}.self_attn.o_proj.weight"]
    return ours


def _norms_and_mlp(
    ours: Tensors, own: str, theirs: Tensors, their: str, norms: tuple[str, str], kinds: tuple[str, ...]
) -> None:
    ours[f"{own}.input_layernorm.weight"] = theirs[f"{their}.{norms[0]}.weight"]
    ours[f"{own}.pre_mlp_layernorm.weight"] = theirs[f"{their}.{norms[1]}.weight"]
    for kind in kinds:
        gate, up = theirs[f"{their}.mlp.gate_proj.{kind}"], theirs[f"{their}.mlp.up_proj.{kind}"]
        ours[f"{own}.mlp.linear_fc1.{kind}"] = torch.cat([gate, up])
        ours[f"{own}.mlp.linear_fc2.{kind}"] = theirs[f"{their}.mlp.down_proj.{kind}"]


def distances(dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Of each batch: of the logits, absolutely; in float64 of losses, and of each gradient, relative to the largest."""
    from ldt_schedules.megatron.vision_language.stages import UnsplitVisionLanguageModel

    theirs = reference_model(dtype)
    if dtype is torch.float64:
        keep_float64()
    ours = UnsplitVisionLanguageModel(tiny.model(dtype))
    weights = in_our_names(dict(theirs.named_parameters()))
    own_names = {name for name, _ in tiny.named_parameters(ours)}
    assert own_names == set(weights), own_names ^ set(weights)
    tiny.load(ours, weights)
    return {name: _distances(theirs, ours, tiny.microbatch(samples, dtype)) for name, samples in tiny.BATCHES.items()}


def _distances(theirs: Any, ours: Any, batch: Tensors) -> dict[str, float]:
    valid = ~batch["padding"]
    logits = ours({name: value for name, value in batch.items() if name != "labels"})
    expected = logits_of(theirs, batch)
    found = {"logits": float((logits - expected)[valid].abs().max()), "size": float(expected[valid].abs().max())}
    if logits.dtype is not torch.float64:
        return found
    cross_entropy: Callable[..., torch.Tensor] = torch.nn.functional.cross_entropy
    losses = cross_entropy(expected.transpose(1, 2), batch["labels"], reduction="none")
    for module in (theirs, ours):
        module.zero_grad(set_to_none=True)
    tiny.masked_mean(losses, batch).backward()
    own_losses = ours(batch)
    tiny.masked_mean(own_losses, batch).backward()
    found["losses"] = float((own_losses - losses)[valid].abs().max())
    gradients = in_our_names(
        {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in theirs.named_parameters()}
    )
    for name, parameter in tiny.named_parameters(ours):
        assert parameter.grad is not None, f"{name} has no gradient"
        scale = float(gradients[name].abs().max())
        apart = float((parameter.grad - gradients[name]).abs().max())
        found[f"gradient of {name}"] = apart / scale if scale else apart
    return found


def in_a_world(rank: int, ports: dict[str, int], dtypes: tuple[torch.dtype, ...]) -> list[dict[str, dict[str, float]]]:
    """What a worker runs: float64 last, it changes the reference."""
    tiny.open_world(rank, ports)
    return [distances(dtype) for dtype in dtypes]
