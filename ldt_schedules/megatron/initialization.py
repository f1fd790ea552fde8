"""Initial weights that depend on a parameter's name and the seed, not on how the model is split.

Megatron draws weights one after the other on each rank, so another layout gives another model. Here each random
parameter is drawn whole, from a generator seeded by the run's seed and the parameter's name in the whole model, and each
tensor-parallel rank keeps its slice: a U, one process and any TP size start from the same weights.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import _initialize_affine_weight_cpu

from ldt_schedules.megatron.chunks import global_parameters

_OUTPUT_LAYERS = ("linear_proj.weight", "linear_fc2.weight")
_GATED_LAYER = re.compile(r"^(?!encoders\.).*decoder\.layers\.\d+\.mlp\.linear_fc1\.(weight|bias)$")


def initialize_by_name(model: torch.nn.Module, config: Any, seed: int) -> None:
    """Draw every weight matrix of `model` anew, in place; biases and norm weights keep their constants.

    Args:
        config: of the whole model; `init_method` for most matrices, `output_layer_init_method` for those that
            write to the residual stream (as megatron-core's own layers choose them).
    """
    for name, parameter in global_parameters(model):
        if parameter.dim() < 2:
            continue
        method = config.output_layer_init_method if name.endswith(_OUTPUT_LAYERS) else config.init_method
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(_seed(seed, name))
            _draw(parameter, method, config, name)


def blocks_of(name: str, parameter: torch.nn.Parameter, config: Any) -> int:
    """Of how many parts, cut separately over the tensor-parallel processes, a matrix is made: gate and up are two.

    Megatron marks that by `partition_stride`, but not in every version (in 0.12 it is 1 everywhere).
    """
    gated = config.gated_linear_unit and _GATED_LAYER.search(name) is not None
    return 2 if gated else int(parameter.partition_stride)


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")


def _draw(parameter: torch.nn.Parameter, method: Any, config: Any, name: str) -> None:
    dtype: torch.dtype = config.params_dtype
    size = parallel_state.get_tensor_model_parallel_world_size()
    if not getattr(parameter, "tensor_model_parallel", False) or size == 1:
        whole = torch.empty(parameter.shape, dtype=torch.float32)
        method(whole)
        parameter.data.copy_(whole.to(dtype))
        return
    dim = parameter.partition_dim
    shape = list(parameter.shape)
    shape[dim] *= size
    mine = torch.nn.Parameter(torch.empty(parameter.shape, dtype=dtype))
    _initialize_affine_weight_cpu(
        mine,
        shape[0],
        shape[1],
        parameter.shape[dim],
        dim,
        method,
        stride=blocks_of(name, parameter, config),
        params_dtype=dtype,
        rank=parallel_state.get_tensor_model_parallel_rank(),
        world_size=size,
    )
    parameter.data.copy_(mine.data)
