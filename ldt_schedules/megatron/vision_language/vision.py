"""A chunk of the ViT: patch embedding where it begins, projector where it ends, layers.

    pixel_values ──► patch_embed ──► window order ──► layers ═══► layers ═══► layers ──► projector ──► features
    [patches, C*T*P*P]                                [patches, 1, h_vision]              [tokens, h], the images' own order

The rows are those of all images of a microbatch, none is a valid number. Every parameter gets its gradient then too,
zeros: a DistributedDataParallel waits for one of every parameter.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig

from ldt_schedules.errors import LdtError
from ldt_schedules.megatron.compatibility import call_with_known
from ldt_schedules.megatron.layer_span import LayerSpan, span_of
from ldt_schedules.megatron.vision_language.attention import FrameAttention, WindowAttention
from ldt_schedules.megatron.vision_language.images import ImageStructure, image_structure
from ldt_schedules.megatron.vision_language.layers import block_of

ROTARY_BASE = 10000.0

_OF_THE_RUN = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "sequence_parallel",
    "params_dtype",
    "pipeline_dtype",
    "fp16",
    "bf16",
    "calculate_per_token_loss",
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "distribute_saved_activations",
    "use_cpu_initialization",
    "perform_initialization",
    "gradient_accumulation_fusion",
    "deallocate_pipeline_outputs",
    "init_method_std",
    "deterministic_mode",
)
"""Fields of the language model's config that say how a run is done, not what the model is."""


@dataclass
class VisionConfig(TransformerConfig):
    """A TransformerConfig that also knows what comes before and after the layers.

    Attributes:
        full_attention_layers: numbers of the layers that attend inside whole frames, from 0; the others inside windows.
        patch_values: numbers in a flattened patch, channels x frames x height x width.
        merge_size: patches of a side that become one token.
        window_tokens: side of a window, in tokens.
        output_size: hidden size of the language model.
    """

    full_attention_layers: tuple[int, ...] = ()
    patch_values: int = 1176
    merge_size: int = 2
    window_tokens: int = 4
    output_size: int = 0


def vision_config(
    like: TransformerConfig,
    *,
    num_layers: int,
    hidden_size: int,
    ffn_hidden_size: int,
    num_attention_heads: int,
    full_attention_layers: tuple[int, ...] = (),
    patch_size: int = 14,
    temporal_patch_size: int = 2,
    channels: int = 3,
    merge_size: int = 2,
    window_size: int = 112,
    **more: Any,
) -> VisionConfig:
    """The config of the ViT in front of a language model.

    Args:
        like: the language model's: sizes of the parallel groups, dtype, recomputation.
        window_size: side of a window, in pixels.
        more: further fields of TransformerConfig.
    """
    ours: dict[str, Any] = dict(
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_hidden_size=ffn_hidden_size,
        num_attention_heads=num_attention_heads,
        normalization="RMSNorm",
        layernorm_epsilon=1e-6,
        activation_func=functional.silu,
        gated_linear_unit=True,
        add_bias_linear=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        full_attention_layers=tuple(full_attention_layers),
        patch_values=channels * temporal_patch_size * patch_size**2,
        merge_size=merge_size,
        window_tokens=window_size // merge_size // patch_size,
        output_size=like.hidden_size,
    )
    of_the_run = {name: getattr(like, name) for name in _OF_THE_RUN}
    return VisionConfig(**{**of_the_run, **ours, **more})


class Projector(MegatronModule):
    """merge_size^2 patches become one token of the language model: a norm, then two layers with an exact GELU."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config=config)
        self.width = config.hidden_size * config.merge_size**2
        self.norm = WrappedTorchNorm(config, config.hidden_size, config.layernorm_epsilon)
        mlp_config: Any = copy.copy(config)
        mlp_config.hidden_size, mlp_config.ffn_hidden_size = config.output_size, self.width
        mlp_config.gated_linear_unit, mlp_config.activation_func = False, functional.gelu
        self.mlp = call_with_known(
            MLP,
            mlp_config,
            MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            input_size=self.width,
            ffn_hidden_size=self.width,
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[patches, 1, h_vision]` -> `[tokens, h]`."""
        merged = self.norm(hidden).reshape(hidden.shape[0] // self.config.merge_size**2, 1, self.width)
        output, bias = self.mlp(merged)
        return (output + bias).squeeze(1)


class VisionChunk(MegatronModule):
    """Some layers of the ViT, with what comes before them (`pre_process`) and after (`post_process`).

    Args:
        config: with the chunk's span (`layer_span.config_with_span`); without one, of all layers.
    """

    def __init__(self, config: VisionConfig, *, pre_process: bool, post_process: bool) -> None:
        super().__init__(config=config)
        self.pre_process, self.post_process = pre_process, post_process
        if pre_process:
            # The same on all tensor-parallel processes, as norms are: its input and its output's gradient are the same.
            self.patch_embed = torch.nn.Linear(config.patch_values, config.hidden_size, bias=False)
        span = span_of(config) or LayerSpan(0, config.num_layers)
        whole = config.full_attention_layers
        numbers = range(span.offset, span.offset + span.count)
        self.decoder = TransformerBlock(
            config,
            block_of(
                [FrameAttention if number in whole else WindowAttention for number in numbers],
                causal=False,
                rotate_in_float32=True,
            ),
            pre_process=pre_process,
            post_process=False,
            post_layer_norm=False,
        )
        if post_process:
            self.projector = Projector(config)
        self.to(config.params_dtype)

    def set_input_tensor(self, input_tensor: torch.Tensor | None) -> None:
        """`[patches, 1, h_vision]` of the chunk before this one."""
        self.decoder.set_input_tensor(input_tensor)

    def forward(self, grids: torch.Tensor, pixel_values: torch.Tensor | None = None) -> torch.Tensor:
        """`[patches, 1, h_vision]` in window order; behind the projector `[tokens, h]` in the order of the images.

        Args:
            grids: `[images, 3]`, (t, h, w) in patches.
            pixel_values: `[patches, patch_values]` for the first chunk; None where there are no images.

        Raises:
            LdtError: pixels of other images than `grids`.
        """
        structure = image_structure(grids, self.config.merge_size, self.config.window_tokens)
        given = pixel_values if self.pre_process else self.decoder.input_tensor
        num_rows = 0 if given is None else given.shape[0]
        if num_rows != structure.num_patches:
            raise LdtError(f"{num_rows} patches for images of {structure.num_patches}: they are of another microbatch")
        if num_rows == 0:
            return self._no_rows(given)
        hidden = self.decoder(
            hidden_states=self._embedded(given, structure) if self.pre_process else None,
            attention_mask=structure.segments,
            rotary_pos_emb=rotary_angles(structure.positions.to(_device_of(self, given)), self.config.kv_channels),
        )
        if not self.post_process:
            return hidden
        return self.projector(hidden).index_select(0, structure.inverse.to(hidden.device))

    def _embedded(self, pixel_values: torch.Tensor, structure: ImageStructure) -> torch.Tensor:
        weight = self.patch_embed.weight
        patches = self.patch_embed(pixel_values.to(device=weight.device, dtype=weight.dtype))
        tokens = patches.unflatten(0, (len(structure.order), self.config.merge_size**2))
        return tokens.index_select(0, structure.order.to(weight.device)).flatten(0, 1).unsqueeze(1)

    def _no_rows(self, given: torch.Tensor | None) -> torch.Tensor:
        """`[0, …]`, hanging on the input and on every parameter: their backward leaves zeros.

        Not through the layers: Megatron's attention cannot reshape what has no rows.
        """
        config = self.config
        shape = (0, config.output_size) if self.post_process else (0, 1, config.hidden_size)
        behind = [parameter.reshape(-1)[:1].sum() for parameter in self.parameters() if parameter.requires_grad]
        if given is not None and not self.pre_process:
            behind.append(given.sum())
        rows = torch.zeros(shape, dtype=config.params_dtype, device=_device_of(self, given))
        return torch.stack(behind).sum() * rows if behind else rows


def rotary_angles(positions: torch.Tensor, width: int) -> torch.Tensor:
    """`[patches, 1, 1, width]` in float32: half of the frequencies turn with the row of a patch, half with its column.

    Args:
        positions: `[2, patches]`.
        width: of a head.
    """
    half = width // 2
    steps = torch.arange(0, half, 2, dtype=torch.float32, device=positions.device) / half
    frequencies = 1.0 / (ROTARY_BASE**steps)
    angles = positions.t()[..., None].float() * frequencies  # [patches, 2, width / 4]
    return angles.flatten(1).repeat(1, 2)[:, None, None, :]


def _device_of(module: torch.nn.Module, given: torch.Tensor | None) -> torch.device:
    """Where a chunk computes; one without parameters where its input is."""
    parameter = next(module.parameters(), given)
    return torch.device("cpu") if parameter is None else parameter.device
