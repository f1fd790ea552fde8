"""`megatron.training.get_model` for a split model: the user's own provider is asked for chunks instead of a whole model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.module import Float16Module

from ldt_schedules.megatron import session
from ldt_schedules.megatron.chunks import build_chunks, mark_as_middle
from ldt_schedules.megatron.layer_span import building, pin_span, span_of
from ldt_schedules.megatron_lm.joining import joined_sites
from ldt_schedules.topology import Site

Provider = Callable[..., Any]


def get_model_of_site(original: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """For `get_model`: Megatron wraps what it gets in Float16Module and DistributedDataParallel as always."""

    def get_model(model_provider_func: Provider, *args: Any, **kwargs: Any) -> list[Any]:
        run = session.current()
        if run is None:
            return original(model_provider_func, *args, **kwargs)
        chunks = original(_split(model_provider_func), *args, **kwargs)
        if run.place.site is Site.CLOUD:
            _mark_wrappers(chunks[0])
        return chunks

    return get_model


def _split(provider: Provider) -> Provider:
    """A provider of this process's part of the model: head and tail, or the middle layers."""
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args

    def part(pre_process: bool = True, post_process: bool = True, **kwargs: Any) -> Any:
        def chunk(config: Any, *, pre_process: bool, post_process: bool) -> Any:
            span = span_of(config)
            assert span is not None, "build_chunks gives every chunk its span"
            with building(span):
                module = provider(pre_process=pre_process, post_process=post_process, **kwargs)
            pin_span(module, span)
            return module

        sites = joined_sites()
        return build_chunks(
            core_transformer_config_from_args(get_args()),
            sites.flags.layers,
            sites.place,
            chunk,
            tied=sites.flags.tied,
            # At the edge Megatron wraps head and tail together; each needs a Float16Module of its own besides.
            narrowed=sites.place.site is Site.EDGE,
        )

    return part


def _mark_wrappers(model: torch.nn.Module) -> None:
    inner: Any = model
    while not isinstance(inner, Float16Module) and hasattr(inner, "module"):
        inner = inner.module
    if isinstance(inner, Float16Module):
        mark_as_middle(inner)
