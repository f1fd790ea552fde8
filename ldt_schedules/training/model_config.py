"""What can be wrong with a model's sizes, over several keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ldt_schedules.topology import nearest_multiples
from ldt_schedules.training.sections import ModelSection

if TYPE_CHECKING:
    from ldt_schedules.training.config import TrainConfig

_KEYS_OF_FIELDS = {
    "sequence_parallel": "sites.edge.sequence_parallel and sites.cloud.sequence_parallel",
    "kv_channels": "model.head_dim",
    "qk_layernorm": "model.qk_norm",
}
"""Fields of megatron-core's TransformerConfig that have a key here, on which other numbers depend."""


def model_problems(config: TrainConfig) -> Iterator[str]:
    """One sentence for each mistake."""
    model = config.model
    heads, groups = model.num_attention_heads, model.num_query_groups
    if model.head_dim is None:
        yield from must_divide("model.hidden_size", model.hidden_size, "model.num_attention_heads", heads)
    yield from must_divide("model.num_attention_heads", heads, "model.num_query_groups", groups)
    for field, keys in _KEYS_OF_FIELDS.items():
        if field in model.megatron:
            yield f"model.megatron.{field}: set {keys}"
    for name, site in config.sites_in_use():
        tensor = f"sites.{name}.tensor_parallel", site.tensor_parallel
        for key in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
            yield from must_divide(f"model.{key}", getattr(model, key), *tensor)
        if site.sequence_parallel:
            yield from must_divide("model.seq_length", model.seq_length, *tensor)
    yield from _rotary_problems(model)


def _rotary_problems(model: ModelSection) -> Iterator[str]:
    if model.position_embedding != "rope":
        if model.rope_scaling is not None:
            yield f"model.rope_scaling: model.position_embedding {model.position_embedding} has no angles; leave it out"
    elif model.head_dim is not None and model.head_dim % 2:
        yield f"model.position_embedding rope needs an even head width, but model.head_dim is {model.head_dim}; change it"
    elif model.hidden_size % model.num_attention_heads == 0 and model.head_width % 2:
        yield (
            f"model.position_embedding rope needs an even head width, but model.hidden_size {model.hidden_size} / "
            f"model.num_attention_heads {model.num_attention_heads} = {model.head_width}; change one of the two"
        )


def must_divide(name: str, value: int, divisor_name: str, divisor: int) -> Iterator[str]:
    if value % divisor:
        allowed = nearest_multiples(value, divisor)
        yield f"{name} {value} is not a multiple of {divisor_name} {divisor}; change one of them ({allowed} would do)"
