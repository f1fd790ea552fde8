"""Builds one process's part of the model: head and tail at the edge, one middle chunk in the cloud.

    edge                                     cloud rank r
    EdgeChunks ─┬─ head  (embedding, layers)   chunk (layers)
                ├─ tail  (layers, norm, output)
                └─ encoders, if there are some (`modalities.py`)

Head and tail are one module under one DistributedDataParallel. So a tied output weight can simply *be* the embedding's
parameter: one gradient, one optimizer state, nothing to synchronise (Megatron's own way, two copies and an all-reduce
over an embedding group, needs the two ends in different processes of one world).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core.transformer.module import Float16Module, MegatronModule

from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron.layer_span import LayerSpan, config_with_span, span_of, spans
from ldt_schedules.megatron.modalities import (
    JoiningHead,
    Modality,
    ModalityRoot,
    UnsplitModel,
    check_modalities,
    ignore_modalities,
)
from ldt_schedules.planning.layout import EDGE_RANK, Layout
from ldt_schedules.topology import Place, Site

_EMBEDDING_WEIGHT = "embedding.word_embeddings.weight"
_OUTPUT_WEIGHT = "output_layer.weight"

ModelProvider = Callable[..., MegatronModule]
"""`(config, pre_process=, post_process=) -> model`: Megatron's model provider with the chunk's config put first."""


NamedPart = tuple[str, int, torch.nn.Module]
"""What comes before the part's parameter names in the whole model, the number of its first layer there, and the part."""


class StageChunks(MegatronModule):
    """All chunks of a process in one module, so that one DistributedDataParallel serves them."""

    @property
    def stage_modules(self) -> dict[int, torch.nn.Module]:
        """Stage -> its module, as the executor asks for it."""
        raise NotImplementedError

    def named_parts(self) -> Iterator[NamedPart]:
        """Everything that holds parameters, for `global_parameters`."""
        raise NotImplementedError

    def named_chunks(self) -> Iterator[tuple[str, Any]]:
        """`(name of a submodule, what saves itself)`, for checkpoints."""
        raise NotImplementedError

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """For megatron-core's checkpoints; keys inside are those of the whole model, a tied weight is there once."""
        found: dict[str, Any] = {}
        seen: set[int] = set()
        for name, chunk in self.named_chunks():
            for key, value in chunk.sharded_state_dict(prefix, sharded_offsets, metadata).items():
                weight = getattr(value, "data", None)
                if not isinstance(weight, torch.nn.Parameter) or id(weight) not in seen:
                    found[f"{name}.{key}"] = value
                seen.add(id(weight))
        return found

    @property
    def shares_parameters(self) -> bool:
        """Do two stages hold a parameter in common (tied embeddings)?"""
        seen: set[int] = set()
        for module in self.stage_modules.values():
            own = {id(parameter) for parameter in module.parameters()}
            if seen & own:
                return True
            seen |= own
        return False

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Never called: a schedule runs one of the stages."""
        raise AssertionError(f"{type(self).__name__} has no forward of its own; run a stage of stage_modules")


class EdgeChunks(StageChunks):
    """Head and tail of the model in one module, with its encoders."""

    def __init__(
        self,
        config: Any,
        head: torch.nn.Module,
        tail: torch.nn.Module,
        tail_stage: int,
        encoders: Mapping[str, torch.nn.Module] | None = None,
    ) -> None:
        super().__init__(config=config)
        self.head = head
        self.tail = tail
        self.encoders = torch.nn.ModuleDict(encoders)
        self._tail_stage = tail_stage
        self.model_type = unwrapped(head).model_type
        self.pg_collection = getattr(unwrapped(head), "pg_collection", None)  # training loops of 0.16 ask for it

    @property
    def stage_modules(self) -> dict[int, torch.nn.Module]:
        return {**dict(enumerate(self.encoders.values())), len(self.encoders): self.head, self._tail_stage: self.tail}

    def named_parts(self) -> Iterator[NamedPart]:
        yield from (_language_part(chunk) for chunk in (self.head, self.tail))
        yield from _encoder_parts(self.encoders)

    def state_dict(self, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> dict[str, Any]:
        """`head.…` and `tail.…`, each as the chunk itself names it."""
        found: dict[str, Any] = {} if destination is None else destination
        for name, chunk in self.named_chunks():
            chunk.state_dict(destination=found, prefix=f"{prefix}{name}.", keep_vars=keep_vars)
        return found

    def load_state_dict(self, state_dict: Any, strict: bool = True) -> None:
        """Takes what `state_dict` gives, and what is loaded by `sharded_state_dict`."""
        given = dict(state_dict)
        if self.shares_parameters and f"head.{_EMBEDDING_WEIGHT}" in given:
            given[f"tail.{_OUTPUT_WEIGHT}"] = given[f"head.{_EMBEDDING_WEIGHT}"]
        for name, chunk in self.named_chunks():
            start = f"{name}."
            own = {key.removeprefix(start): value for key, value in given.items() if key.startswith(start)}
            chunk.load_state_dict(own, strict=strict)

    def named_chunks(self) -> Iterator[tuple[str, Any]]:
        yield from (("head", self.head), ("tail", self.tail))
        yield from ((f"encoders.{name}", encoder) for name, encoder in self.encoders.items())


def build_chunks(
    config: Any,
    layers: tuple[int, ...],
    place: Place,
    provider: ModelProvider,
    tied: bool,
    narrowed: bool = True,
    modalities: Sequence[Modality] = (),
) -> MegatronModule:
    """The module of this process, not yet wrapped in DistributedDataParallel.

    Args:
        config: the whole model's TransformerConfig, as this site's world needs it.
        layers: layers of each stage, `len(layers) - 1` pipeline ranks.
        provider: makes a GPTModel (or the like) for a chunk.
        tied: the output layer uses the embedding's weight.
        narrowed: in 16 bits each chunk gets Megatron's Float16Module; without, the training loop puts one around.
        modalities: encoders, which the edge holds; the table must be of `modalities.layout_with`.

    Raises:
        ConfigError: the split does not sum to the model's layers, or asks for what a split model cannot do.
    """
    if sum(layers) != config.num_layers:
        raise ConfigError(f"the layer split {list(layers)} sums to {sum(layers)}, the model has {config.num_layers}")
    if getattr(config, "mtp_num_layers", None):
        raise ConfigError("multi-token prediction needs the embedding in the tail; set mtp_num_layers to 0")
    check_modalities(config, modalities)
    stage_spans = spans(layers)

    def in_bits(chunk_config: Any, module: MegatronModule, first: bool, last: bool) -> MegatronModule:
        return narrowed_stage(chunk_config, module, first, last) if narrowed else module

    def stage_module(span: LayerSpan, *, first: bool, last: bool) -> MegatronModule:
        chunk_config = config_with_span(config, span)
        module = provider(chunk_config, pre_process=first, post_process=last)
        if modalities and first:
            module = JoiningHead(chunk_config, module, modalities)
        return in_bits(chunk_config, module, first, last)

    def encoders() -> dict[str, MegatronModule]:
        return {one.name: in_bits(config, ModalityRoot(config, one), True, False) for one in modalities}

    if len(layers) == 1:
        whole = stage_module(stage_spans[0], first=True, last=True)
        return UnsplitModel(config, whole, encoders()) if modalities else whole
    if place.site is Site.CLOUD:
        return stage_module(stage_spans[place.stage], first=False, last=False)
    head = stage_module(stage_spans[0], first=True, last=False)
    tail = stage_module(stage_spans[-1], first=False, last=True)
    if tied:
        unwrapped(tail).output_layer.weight = unwrapped(head).embedding.word_embeddings.weight
    if modalities:
        ignore_modalities(unwrapped(tail))
    return EdgeChunks(config, head, tail, len(layers) - 1 + len(modalities), encoders())


def narrowed_stage(config: Any, module: MegatronModule, first: bool, last: bool) -> MegatronModule:
    """In 16 bits inside Megatron's Float16Module, which must know whether the stage is the model's first or last."""
    if not (config.fp16 or config.bf16):
        return module
    wrapped = Float16Module(config, module)
    if not (first and last):
        _count_as(wrapped, 0 if first else 2 if last else 1)
    return wrapped


def mark_as_middle(wrapped: Float16Module) -> None:
    """Tell a Float16Module that neither the model's input nor its loss is here."""
    _count_as(wrapped, 1)


def _count_as(wrapped: Float16Module, part: int) -> None:
    """Part 0, 1 or 2 of a model of three (head, middle, tail).

    Float16Module turns the output of "its world's last stage" to float32. Of a split model only the tail is last.
    """
    wrapped.vp_size, wrapped.vp_stage = 3, part


def unwrapped(module: torch.nn.Module) -> Any:
    """What a stage's wrappers hold."""
    inner: Any = module.module if isinstance(module, Float16Module) else module
    return inner.language_model if isinstance(inner, JoiningHead) else inner


def bare_module(model: torch.nn.Module) -> Any:
    """What its wrappers hold: the chunks of a process, a multimodal model in one process, or the one chunk."""
    inner: Any = model
    while not isinstance(inner, (StageChunks, UnsplitModel)) and hasattr(inner, "module"):
        inner = inner.module
    return inner


def _of_one_module(model: torch.nn.Module, layout: Layout, rank: int) -> dict[int, torch.nn.Module]:
    """Stage -> what to call for it, from the one (wrapped) module of a process.

    A single chunk is called through its wrappers, the stages of several inside them: DistributedDataParallel adds
    nothing to a forward pass but the call.

    Raises:
        ConfigError: the table has other stages on this rank.
    """
    inner, mine = bare_module(model), layout.stages_on(rank)
    found = inner.stage_modules if isinstance(inner, StageChunks) else dict.fromkeys(mine[:1], model)
    if set(found) != set(mine):
        raise ConfigError(
            f"the schedule has the stages {', '.join(layout.stages[s].name for s in mine)} on rank {rank}, the model has "
            f"{len(found)}; plan for the layout that the model was built for"
        )
    return found


def modules_on_rank(chunks: list[torch.nn.Module], layout: Layout, rank: int) -> dict[int, torch.nn.Module]:
    """Stage -> what to call for it, from the list of (wrapped) chunks a training loop passes.

    A plain U takes one module for each process. A model that goes round L times takes one too, if that is a `StageChunks`,
    or else L + 1, in the order of its stages; the edge has a stage for each, a cloud process one less, so the last of its
    list is an empty module that is never run:

        laps(P, 2)     edge  [stage 0, stage P, stage 2P]        cloud rank r  [stage r, stage P + r, (empty)]

    Raises:
        ConfigError: a list that does not fit the layout; two chunks with a parameter in common.
    """
    heads = sum(layout.is_head(stage) for stage in layout.stages_on(EDGE_RANK))
    laps = len(layout.stages_on(EDGE_RANK)) - 1 if heads == 1 else 1
    together = len(chunks) == 1 and isinstance(bare_module(chunks[0]), StageChunks)
    expected = 1 if laps == 1 or together else laps + 1
    if len(chunks) != expected:
        what = "a site of a U holds one wrapped module" if laps == 1 else f"a U of {laps} laps holds {expected} chunks"
        raise ConfigError(f"{what}, got a list of {len(chunks)} model chunks")
    if expected == 1:
        return _of_one_module(chunks[0], layout, rank)
    seen: set[int] = set()
    for number, chunk in enumerate(chunks):
        own = {id(parameter) for parameter in chunk.parameters()}
        if seen & own:
            raise ConfigError(
                f"model chunk {number} shares a parameter with an earlier one; each DistributedDataParallel would keep a "
                "gradient of its own for it. Untie the embeddings"
            )
        seen |= own
    return dict(zip(layout.stages_on(rank), chunks, strict=False))


def shares_parameters(model: torch.nn.Module) -> bool:
    """Does the model hold two stages with a parameter in common?"""
    inner = bare_module(model)
    return isinstance(inner, StageChunks) and inner.shares_parameters


def global_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """`(name in the whole model, parameter)`: the names one process would use, a tied weight once.

    `tail.decoder.layers.0.…` of a chunk that starts at layer 6 is `decoder.layers.6.…`.
    """
    seen: set[int] = set()
    for prefix, offset, part in _named_parts(bare_module(model)):
        for name, parameter in part.named_parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield prefix + _global_name(name, offset), parameter


def _named_parts(inner: Any) -> Iterator[NamedPart]:
    if hasattr(inner, "named_parts"):
        yield from inner.named_parts()
        return
    yield _language_part(getattr(inner, "head", inner))
    if isinstance(inner, UnsplitModel):
        yield from _encoder_parts(inner.encoders)


def _language_part(chunk: Any) -> NamedPart:
    span = span_of(chunk.config)
    return "", 0 if span is None else span.offset, unwrapped(chunk)


def _encoder_parts(encoders: torch.nn.ModuleDict) -> Iterator[NamedPart]:
    return ((f"encoders.{name}.", 0, unwrapped(one)) for name, one in encoders.items())


def _global_name(name: str, offset: int) -> str:
    prefix, marker, rest = name.partition("layers.")
    if not marker:
        return name
    number, _, tail = rest.partition(".")
    return f"{prefix}{marker}{int(number) + offset}.{tail}"
