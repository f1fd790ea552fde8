"""Which layers of the whole model a chunk holds, where megatron-core asks for it.

megatron-core derives a chunk's layers from the pipeline size of its one world. In a U each site is a world of its own,
so the answer is written on the chunk's config instead: `config.ldt_layer_span`. A config without it (a plain Megatron
model in the same process) gets Megatron's own answer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

_ATTRIBUTE = "ldt_layer_span"


@dataclass(frozen=True, slots=True)
class LayerSpan:
    """`count` layers, the first of them number `offset` of the whole model (counted from 0)."""

    offset: int
    count: int


def spans(layers: tuple[int, ...]) -> tuple[LayerSpan, ...]:
    """`(1, 3, 3, 1)` layers a stage -> the span of each stage."""
    return tuple(LayerSpan(sum(layers[:stage]), count) for stage, count in enumerate(layers))


def config_with_span(config: Any, span: LayerSpan) -> Any:
    """A copy of a TransformerConfig for one chunk."""
    chunk_config = copy.copy(config)
    setattr(chunk_config, _ATTRIBUTE, span)
    return chunk_config


def span_of(config: Any) -> LayerSpan | None:
    """Of the chunk that the config belongs to; None for a plain Megatron model."""
    return getattr(config, _ATTRIBUTE, None) if _building is None else _building


_building: LayerSpan | None = None


@contextmanager
def building(span: LayerSpan) -> Iterator[None]:
    """While inside, every config is taken for that of a chunk with this span.

    For a user's own model provider, which makes its config itself. `pin_span` then keeps the span with the chunk.
    """
    global _building
    before, _building = _building, span
    try:
        yield
    finally:
        _building = before


def pin_span(chunk: torch.nn.Module, span: LayerSpan) -> None:
    """Write the span on the config of every part of the chunk; a config that other chunks share is copied first."""
    copies: dict[int, tuple[Any, Any]] = {}  # the original is held, so that its id stays its own
    for part in chunk.modules():
        config = getattr(part, "config", None)
        if hasattr(config, "num_layers"):
            if id(config) not in copies:
                copies[id(config)] = (config, config_with_span(config, span))
            part.config = copies[id(config)][1]


def num_layers_of_span(original: Callable[..., int]) -> Callable[..., int]:
    """For `get_num_layers_to_build`."""

    def get_num_layers_to_build(config: Any, *args: Any, **kwargs: Any) -> int:
        span = span_of(config)
        return original(config, *args, **kwargs) if span is None else span.count

    return get_num_layers_to_build


def offset_of_span(original: Callable[..., int]) -> Callable[..., int]:
    """For `get_transformer_layer_offset`."""

    def get_transformer_layer_offset(config: Any, *args: Any, **kwargs: Any) -> int:
        span = span_of(config)
        return original(config, *args, **kwargs) if span is None else span.offset

    return get_transformer_layer_offset
