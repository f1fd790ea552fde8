"""A multimodal model over two sites: encoders are roots of the pipeline on the edge, its language model is the U.

    edge    audio encoder ──┐
            vision encoder ─┼─► head ═══► cloud 1 ═══► ... ═══► tail, loss (edge)
            (text embedding is in the head)

An encoder is a stage of its own, so a planner may run it when the edge has nothing better to do, and its output stays on
the edge: images and sounds do not leave it, not even encoded. The head puts the features in the places of their
placeholder tokens, as megatron-core's `models.mimo` does. Encoders on ranks of their own: `runtime.PipelineRunner`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule

from ldt_schedules.errors import ConfigError, LdtError
from ldt_schedules.planning.layout import EDGE_RANK, Layout

Inputs = Mapping[str, Mapping[str, Any] | None]
"""Modality -> keywords for its encoder; None, or no entry: it is absent from the microbatch."""


@dataclass(frozen=True)
class Modality:
    """One encoder.

    Attributes:
        name: its key in `modality_inputs`.
        placeholder: the token id in whose places its features go.
        encoder: makes the module from the model's TransformerConfig; called with the keywords of `modality_inputs[name]`,
            it returns the features of the microbatch, `[tokens, h]`, sample after sample.
    """

    name: str
    placeholder: int
    encoder: Callable[[Any], torch.nn.Module]


def layout_with(modalities: Sequence[Modality], num_ranks: int) -> Layout:
    """The U over `num_ranks` pipeline ranks with a root on the edge for each modality."""
    chain = {"head": EDGE_RANK, **{f"cloud{rank}": rank for rank in range(1, num_ranks)}, "tail": EDGE_RANK}
    return Layout.roots({modality.name: EDGE_RANK for modality in modalities}, chain)


class ModalityRoot(MegatronModule):
    """A stage that encodes one modality; called with the whole batch, as every chunk is."""

    def __init__(self, config: Any, modality: Modality) -> None:
        super().__init__(config=config)
        self.name = modality.name
        self.model_type = ModelType.encoder_or_decoder
        self.encoder = modality.encoder(config)

    def set_input_tensor(self, input_tensor: object) -> None:
        """A root has no input."""

    def forward(self, *_: Any, modality_inputs: Inputs | None = None, **__: Any) -> torch.Tensor:
        """Features `[tokens, h]`; of an absent modality `[0, h]`, whose backward leaves zeros.

        Zeros, and not nothing: a DistributedDataParallel waits for a gradient of every parameter.
        """
        inputs = (modality_inputs or {}).get(self.name)
        if inputs is None:
            rows = torch.stack([parameter.reshape(-1)[:1].sum() for parameter in self.encoder.parameters()]).sum()
            return rows * torch.zeros((0, self.config.hidden_size), dtype=rows.dtype, device=rows.device)
        dtype = next(self.encoder.parameters()).dtype
        features = self.encoder(
            **{
                name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
                for name, value in inputs.items()
            }
        )
        # Megatron frees outputs, and refuses to free what is a view.
        return features if features._base is None else features.clone()


class JoiningHead(MegatronModule):
    """The head: text embedding, features in their places, then the first layers of the language model."""

    def __init__(self, config: Any, language_model: Any, modalities: Sequence[Modality]) -> None:
        super().__init__(config=config)
        self.language_model = language_model
        self.placeholders = {modality.name: modality.placeholder for modality in modalities}
        self.model_type = language_model.model_type
        self._features: Sequence[torch.Tensor] = ()

    def set_input_tensor(self, input_tensor: Sequence[torch.Tensor]) -> None:
        """The features of each modality `[tokens, h]`, in their order."""
        self._features = input_tensor

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        modality_inputs: Inputs | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """`[s, b, h]`, from `input_ids` `[b, s]` with a placeholder for each token of features, which have come already."""
        embedded = self.language_model.embedding(input_ids=input_ids, position_ids=position_ids)
        features = dict(zip(self.placeholders, self._features, strict=True))
        self._features = ()
        joined = in_their_places(embedded, input_ids, features, self.placeholders)
        return self.language_model(input_ids, position_ids, attention_mask, decoder_input=joined, **kwargs)


class UnsplitModel(MegatronModule):
    """Encoders and language model in one process: an edge alone, and what a split model is compared with."""

    def __init__(self, config: Any, head: MegatronModule, encoders: Mapping[str, MegatronModule]) -> None:
        super().__init__(config=config)
        self.head = head
        self.encoders = torch.nn.ModuleDict(encoders)
        self.model_type = ModelType.encoder_or_decoder

    def set_input_tensor(self, input_tensor: object) -> None:
        """The model is whole: it has no input but the batch."""

    def forward(self, *args: Any, modality_inputs: Inputs | None = None, **kwargs: Any) -> torch.Tensor:
        """What the language model gives: losses `[b, s]` with `labels`, else logits."""
        self.head.set_input_tensor([root(modality_inputs=modality_inputs) for root in self.encoders.values()])
        return self.head(*args, **kwargs)


def in_their_places(
    embedded: torch.Tensor,
    input_ids: torch.Tensor,
    features: Mapping[str, torch.Tensor],
    placeholders: Mapping[str, int],
) -> torch.Tensor:
    """`embedded` `[s, b, h]` with the features `[tokens, h]` of each modality where `input_ids` `[b, s]` has its placeholder.

    Raises:
        LdtError: more or fewer features than placeholders: some would be lost, or those of another microbatch taken.
    """
    by_sample = embedded.transpose(0, 1)
    for name, given in features.items():
        places = input_ids == placeholders[name]
        if int(places.sum()) != given.shape[0]:
            raise LdtError(
                f"{name}: {given.shape[0]} tokens of features for {int(places.sum())} placeholders (token id "
                f"{placeholders[name]}) in the text"
            )
        by_sample = by_sample.masked_scatter(places.unsqueeze(-1), given.to(embedded.dtype))
    return by_sample.transpose(0, 1).contiguous()


def check_modalities(config: Any, modalities: Sequence[Modality]) -> None:
    """Raises ConfigError for what the head cannot do with modalities."""
    names = [modality.name for modality in modalities]
    if len(set(names)) != len(names):
        raise ConfigError(f"modalities need different names, got {names}")
    if modalities and config.sequence_parallel:
        raise ConfigError(
            "sequence parallelism at the edge splits the sequence before the features are in it; turn it off for the edge "
            "(the cloud may have it)"
        )


def ignore_modalities(tail: torch.nn.Module) -> None:
    """Let the tail be called with the whole batch, as every chunk is: it has no use for the modalities' part of it."""

    def without(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {name: value for name, value in kwargs.items() if name != "modality_inputs"}

    tail.register_forward_pre_hook(without, with_kwargs=True)
