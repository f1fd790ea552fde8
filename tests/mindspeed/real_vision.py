"""MindSpeed-MM's own `VLMModel`, a tiny Qwen2.5-VL, with its own forward step and train step, on a CPU: one process of a run.

Kernels that exist for accelerators only are written out. The model's json is of the form that MM ships, with
`pipeline_num_layers` as for its own disaggregated training (a row for each of three chunks, a column for each rank).
"""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from tests.mindspeed import real_mm

IMAGE, VISION_START, VOCABULARY, SEQUENCE = 151655, 151652, 151664, 30
WIDTHS = {"vision": 32, "language": 48}
VIT = {2: [[1, 2], [1, 0], [0, 0]], 3: [[1, 1, 1], [1, 0, 0], [0, 0, 0]]}
LANGUAGE = {2: [[0, 0], [0, 3], [0, 0]], 3: [[0, 0, 0], [0, 2, 1], [0, 0, 0]]}
IMAGES = ((((1, 4, 4),), ((1, 2, 6), (1, 4, 2))), ((), ()), ((), ((1, 6, 6),)))
_LANGUAGE = {
    "num_layers": 3,
    "hidden_size": WIDTHS["language"],
    "ffn_hidden_size": 64,
    "num_attention_heads": 6,
    "num_query_groups": 2,
    "group_query_attention": True,
    "max_position_embeddings": 256,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}
"""What the json of the model and Megatron's arguments must agree on."""
_COMMON = {
    "use_fused_rotary_pos_emb": True,
    "bf16": True,
    "params_dtype": "fp32",
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-6,
}


def model_json(like: int) -> dict[str, Any]:
    """As in MM's examples, small, with nothing frozen and no fused kernel."""
    vit = {
        **_COMMON,
        "model_id": "qwen2vit",
        "num_layers": 4,
        "hidden_size": WIDTHS["vision"],
        "ffn_hidden_size": 40,
        "num_attention_heads": 2,
        "gated_linear_unit": True,
        "activation_func": "silu",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "in_channels": 3,
        "patch_size": 2,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "window_attn_size": 8,
        "fullatt_block_indexes": [1, 3],
        "post_layer_norm": False,
        "freeze": False,
        "pipeline_num_layers": VIT[like],
    }
    projector = {
        **_COMMON,
        "model_id": "lnmlp",
        "num_layers": 1,
        "gated_linear_unit": False,
        "add_bias_linear": True,
        "input_size": WIDTHS["vision"],
        "hidden_size": WIDTHS["language"],
        "ffn_hidden_size": 4 * WIDTHS["vision"],
        "activation_func": "gelu",
        "freeze": False,
    }
    decoder = {
        **_COMMON,
        **_LANGUAGE,
        "model_id": "qwen2_5_lm",
        "vocab_size": VOCABULARY,
        "rope_theta": 1e4,
        "rope_scaling": None,
        "mrope_section": [1, 1, 2],
        "position_embedding_type": "mrope",
        "untie_embeddings_and_output_weights": True,
        "activation_func": "silu",
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "parallel_output": True,
        "pipeline_num_layers": LANGUAGE[like],
    }
    parts = {"vision_encoder": vit, "vision_projector": projector}
    return {
        "model_id": "qwen2_5vl",
        "img_context_token_id": IMAGE,
        "vision_start_token_id": VISION_START,
        "image_encoder": parts,
        "text_decoder": decoder,
        "text_encoder": None,
        "video_encoder": None,
        "patch": {real_mm.KEY: True},
    }


def batches(step: int, count: int) -> Iterator[dict[str, Any]]:
    """As MM's collator makes them; microbatch 1 of 3 has no image, the others one or two in a sample."""
    for number in range(count):
        generator = torch.Generator().manual_seed(100 * step + number)
        length = SEQUENCE - 3 * (number % 3)
        ids = torch.randint(1, 1000, (2, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, : number % 2] = 0
        mask[1, length - 2 * (number % 2) :] = 0
        grids = []
        for sample, given in enumerate(IMAGES[number % 3]):
            place = 3
            for t, h, w in given:
                tokens = t * h * w // 4
                ids[sample, place] = VISION_START
                ids[sample, place + 1 : place + 1 + tokens] = IMAGE
                grids.append((t, h, w))
                place += tokens + 2
        batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill((mask == 0) | (ids >= 1000), -100)}
        if grids:
            patches = sum(t * h * w for t, h, w in grids)
            batch["pixel_values"] = torch.randn((patches, 24), generator=generator)
            batch["image_grid_thw"] = torch.tensor(grids)
        yield batch


def set_arguments(like: int) -> Any:
    from mindspeed_mm.configs.config import ConfigReader

    given = {
        **_LANGUAGE,
        "kv_channels": 8,
        "params_dtype": torch.float32,
        "use_cpu_initialization": True,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "use_flash_attn": False,
        "calculate_per_sample_loss": False,
        "micro_batch_size": 2,
        "seq_length": SEQUENCE,
        "log_tps": False,
        "encoder_dp_balance": False,
    }
    args = real_mm.set_arguments(**given)
    args.mm.model = ConfigReader(model_json(like))
    return args


def write_out_kernels() -> None:
    """What MindSpeed calls of torch_npu in this model, in plain torch."""
    import torch_npu

    def npu_rms_norm(x: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6) -> tuple[torch.Tensor, torch.Tensor]:
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + epsilon)
        return (x.float() * scale).to(x.dtype) * gamma, scale

    def npu_swiglu(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        gate, up = x.chunk(2, dim)
        return torch.nn.functional.silu(gate) * up

    def npu_rotary_mul(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    def npu_scaled_masked_softmax(x: torch.Tensor, mask: torch.Tensor, scale: float, _: bool) -> torch.Tensor:
        return (x * scale).masked_fill(mask, -10000.0).softmax(-1)

    for kernel in (npu_rms_norm, npu_swiglu, npu_rotary_mul, npu_scaled_masked_softmax):
        setattr(torch_npu, kernel.__name__, kernel)


class Holder(torch.nn.Module):
    """MM's forward step looks for its model two wrappers deep; in float32 there is no Float16Module."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.module, self.config, self.model_type = model, model.config, None
        self.share_embeddings_and_output_weights = False

    def set_input_tensor(self, given: Any) -> None:
        self.module.set_input_tensor(given)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def named(model: Any, offsets: tuple[int, int]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters by their names in the whole model; `offsets` are the numbers of the first ViT and language layer."""
    for name, parameter in model.named_parameters():
        before, marker, rest = name.partition("layers.")
        if marker:
            number, _, rest = rest.partition(".")
            rest = f"{int(number) + offsets[name.startswith('text_decoder')]}.{rest}"
        yield before + marker + rest, parameter


def draw(name: str, parameter: torch.nn.Parameter) -> None:
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big"))
    drawn = 0.2 * torch.randn(parameter.shape, generator=generator)
    with torch.no_grad():
        parameter.copy_(drawn + (1.0 if "norm" in name else 0.0))


def train(fields: dict[str, Any], global_rank: int, ports: dict[str, int]) -> dict[str, Any]:
    """One training step; gradients by their names in the whole model, the report, and what the cloud's batches were."""
    real_mm.fake_what_is_missing()
    write_out_kernels()
    lists = real_mm.import_in_order()
    with mock.patch("torch.device", lambda name: name):  # a default argument there is torch.device("npu")
        importlib.import_module("mindspeed_mm.models.vision.vlm_attentionmask_for_llm")
    import patches.mindspeed
    from patches import cpu, manager

    manager.apply(cpu.PATCHES)
    patches.mindspeed.install()
    case = real_mm.case_of(fields)
    args = set_arguments(case.laps)
    args.calculate_per_token_loss = case.per_token
    lists.apply_patches_from_config()
    args.mm.model.patch = type(args.mm.model)({real_mm.KEY: True})
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
    from megatron.core.timers import Timers
    from megatron.training import global_vars
    from mindspeed_mm import training
    from mindspeed_mm.patchs.layerwise_disaggregated_training import vlm_model_patch

    os.environ["USE_TF"] = "FALSE"
    pretrain_vlm = importlib.import_module("pretrain_vlm")
    from ldt_schedules.megatron import session, world
    from ldt_schedules.mindspeed import mm_vision_language as ours
    from tests.mindspeed import two_laps

    init_num_microbatches_calculator(global_rank, None, case.num_microbatches * 2, 2, 1)
    global_vars._GLOBAL_TIMERS = Timers(log_level=0, log_option="minmax")
    place = two_laps.open_rank(case, global_rank, ports)
    run = session.current()
    if run is None:
        models, offsets = [vlm_model_patch.model_provider()], [(0, 0)]
    else:
        patches.mindspeed.serve_vision_language(run)
        models = ours.build_chunks(vlm_model_patch.model_provider, args, place.stage, case.laps)
        offsets = [
            (before(VIT[case.laps], number, place.stage), before(LANGUAGE[case.laps], number, place.stage))
            for number in range(3)
        ]
    for model, offset in zip(models, offsets, strict=True):
        for name, parameter in named(model, offset):
            draw(name, parameter)
    wrapped = wrap(case, models)
    seen: list[dict[str, Any]] = []
    source = batches(0, case.num_microbatches) if place.stage == 0 else None

    def forward_step(data_iterator: Any, chunk: Any) -> Any:
        return pretrain_vlm.forward_step(remember(data_iterator, seen), chunk)

    config = wrapped[0].module.config
    iterators = [source] if run is None else [source, None, None]
    reduced, skipped, *_ = training.train_step(forward_step, iterators, wrapped, None, None, config, None)
    assert not skipped
    gradients = {
        name: parameter.main_grad.detach().clone().numpy()
        for model, offset in zip(models, offsets, strict=True)
        for name, parameter in named(model, offset)
    }
    world.close_site()
    return {"gradients": gradients, "loss": {k: float(v) for k, v in reduced.items()}, "seen": seen}


def before(rows: list[list[int]], chunk: int, rank: int) -> int:
    """Layers before a chunk's own."""
    return sum(sum(row) for row in rows[:chunk]) + sum(rows[chunk][:rank])


def remember(data_iterator: Any, seen: list[dict[str, Any]]) -> Iterator[Any]:
    batch = next(data_iterator)
    seen.append({name: tuple(value.shape) for name, value in batch.items() if isinstance(value, torch.Tensor)})
    yield batch


def wrap(case: Any, models: list[Any]) -> list[Any]:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False)
    for model in models:
        model.config.finalize_model_grads_func = finalize_model_grads
        model.config.calculate_per_token_loss = case.per_token
        model.config.timers = None
    return [DistributedDataParallel(config=m.config, ddp_config=ddp, module=Holder(m)) for m in models]
