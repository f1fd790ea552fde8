"""Builds one process's part of the model: head and tail at the edge, one middle chunk in the cloud.

    edge                                     cloud rank r
    EdgeChunks ─┬─ head  (embedding, layers)   chunk (layers)
                └─ tail  (layers, norm, output)

Head and tail are one module under one DistributedDataParallel. So a tied output weight can simply *be* the embedding's
parameter: one gradient, one optimizer state, nothing to synchronise (Megatron's own way, two copies and an all-reduce
over an embedding group, needs the two ends in different processes of one world).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.transformer.module import Float16Module, MegatronModule

from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron import session
from ldt_schedules.megatron.layer_span import LayerSpan, config_with_span, span_of, spans
from ldt_schedules.topology import Place, Site

ModelProvider = Callable[..., MegatronModule]
"""`(config, pre_process=, post_process=) -> model`: Megatron's model provider with the chunk's config put first."""


class EdgeChunks(MegatronModule):
    """Head and tail of the model in one module.

    Attributes:
        stage_modules: stage -> its module, as the executor asks for it.
    """

    def __init__(self, config: Any, head: torch.nn.Module, tail: torch.nn.Module, tail_stage: int) -> None:
        super().__init__(config=config)
        self.head = head
        self.tail = tail
        self._tail_stage = tail_stage
        self.model_type = _unwrapped(head).model_type

    @property
    def stage_modules(self) -> dict[int, torch.nn.Module]:
        return {0: self.head, self._tail_stage: self.tail}

    @property
    def shares_parameters(self) -> bool:
        """Do head and tail hold a parameter in common (tied embeddings)?"""
        return bool({id(p) for p in self.head.parameters()} & {id(p) for p in self.tail.parameters()})

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Never called: a schedule runs the head or the tail."""
        raise AssertionError("EdgeChunks has no forward of its own; run a stage of stage_modules")


def build_chunks(
    config: Any, layers: tuple[int, ...], place: Place, provider: ModelProvider, tied: bool
) -> MegatronModule:
    """The module of this process, not yet wrapped in DistributedDataParallel.

    Args:
        config: the whole model's TransformerConfig, as this site's world needs it.
        layers: layers of each stage, `len(layers) - 1` pipeline ranks.
        provider: makes a GPTModel (or the like) for a chunk.
        tied: the output layer uses the embedding's weight.

    Raises:
        ConfigError: the split does not sum to the model's layers, or asks for what a split model cannot do.
    """
    if sum(layers) != config.num_layers:
        raise ConfigError(f"the layer split {list(layers)} sums to {sum(layers)}, the model has {config.num_layers}")
    if getattr(config, "mtp_num_layers", None):
        raise ConfigError("multi-token prediction needs the embedding in the tail; set mtp_num_layers to 0")
    stage_spans = spans(layers)
    if len(layers) == 1:
        return _stage_module(config, stage_spans[0], provider, first=True, last=True)
    if place.site is Site.CLOUD:
        return _stage_module(config, stage_spans[place.stage], provider, first=False, last=False)
    head = _stage_module(config, stage_spans[0], provider, first=True, last=False)
    tail = _stage_module(config, stage_spans[-1], provider, first=False, last=True)
    if tied:
        _unwrapped(tail).output_layer.weight = _unwrapped(head).embedding.word_embeddings.weight
    return EdgeChunks(config, head, tail, len(layers) - 1)


def _stage_module(config: Any, span: LayerSpan, provider: ModelProvider, *, first: bool, last: bool) -> MegatronModule:
    chunk_config = config_with_span(config, span)
    module = provider(chunk_config, pre_process=first, post_process=last)
    if not (config.fp16 or config.bf16):
        return module
    wrapped = Float16Module(chunk_config, module)
    if not (first and last):
        # Float16Module turns the output of "its world's last stage" to float32. Of a split model only the tail is last.
        wrapped.vp_size, wrapped.vp_stage = 3, 0 if first else 2 if last else 1
    return wrapped


def _unwrapped(module: torch.nn.Module) -> Any:
    return module.module if isinstance(module, Float16Module) else module


def _innermost(model: torch.nn.Module) -> Any:
    """What the wrappers hold: EdgeChunks, or the one chunk."""
    inner: Any = model
    while not isinstance(inner, EdgeChunks) and hasattr(inner, "module"):
        inner = inner.module
    return inner


def stage_modules(model: torch.nn.Module) -> dict[int, torch.nn.Module]:
    """Stage -> what to call for it, from the (wrapped) model a training loop passes.

    The cloud's chunk is called through its wrappers, the edge's head and tail inside them:
    DistributedDataParallel adds nothing to a forward pass but the call.
    """
    inner = _innermost(model)
    if isinstance(inner, EdgeChunks):
        return inner.stage_modules
    run = session.current()
    return {run.place.stage if run is not None else 0: model}


def shares_parameters(model: torch.nn.Module) -> bool:
    """Does the model hold a head and a tail with a parameter in common?"""
    inner = _innermost(model)
    return isinstance(inner, EdgeChunks) and inner.shares_parameters


def global_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """`(name in the whole model, parameter)`: the names one process would use, a tied weight once.

    `tail.decoder.layers.0.…` of a chunk that starts at layer 6 is `decoder.layers.6.…`.
    """
    seen: set[int] = set()
    inner = _innermost(model)
    for chunk in (inner.head, inner.tail) if isinstance(inner, EdgeChunks) else (inner,):
        span = span_of(chunk.config) or LayerSpan(0, 0)
        for name, parameter in _unwrapped(chunk).named_parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield _global_name(name, span.offset), parameter


def _global_name(name: str, offset: int) -> str:
    prefix, marker, rest = name.partition("layers.")
    if not marker:
        return name
    number, _, tail = rest.partition(".")
    return f"{prefix}{marker}{int(number) + offset}.{tail}"
