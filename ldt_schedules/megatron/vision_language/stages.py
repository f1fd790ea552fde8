"""The stages of a vision-language model, each called with a microbatch.

    VisionStage     stages 0..P-1    grids, and at stage 0 pixel_values       [patches, 1, h_vision]
    JoiningStage    stage P          grids, input_ids, position_ids, segments [s, b, h]
    LanguageStage   stages P+1..2P   position_ids, segments, at 2P labels     [s, b, h], losses [b, s]

A stage reads of the microbatch what it needs, so an edge stage may be called with all of it and a cloud stage with what
the step header tells. Parameters are named as in the whole model, but for the numbers of layers (`named_parts`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule

from ldt_schedules.megatron.layer_span import LayerSpan, config_with_span, span_of, spans
from ldt_schedules.megatron.modalities import in_their_places
from ldt_schedules.megatron.vision_language.description import VisionLanguageModel
from ldt_schedules.megatron.vision_language.language import language_chunk
from ldt_schedules.megatron.vision_language.vision import VisionChunk
from ldt_schedules.planning.lap_layers import LapLayers

Microbatch = Mapping[str, torch.Tensor]


class _Stage(MegatronModule):
    """A part of the ViT, `vision`, a part of the language model, `language`, or both."""

    vision: VisionChunk
    language: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.model_type = ModelType.encoder_or_decoder

    def named_parts(self) -> list[tuple[str, int, torch.nn.Module]]:
        """`(prefix in the whole model, number of the part's first layer, module whose parameters follow the prefix)`."""
        return [(f"{name}.", _offset(module.config), module) for name, module in self.named_children()]

    @property
    def pg_collection(self) -> Any:
        """Training loops of megatron-core 0.16 ask for it."""
        return getattr(getattr(self, "language", None), "pg_collection", None)


class VisionStage(_Stage):
    """ViT layers; the first stage has the patch embedding too."""

    def __init__(self, model: VisionLanguageModel, span: LayerSpan, *, first: bool) -> None:
        config = config_with_span(model.vision, span)
        super().__init__(config)
        self.vision = VisionChunk(config, pre_process=first, post_process=False)

    def set_input_tensor(self, input_tensor: Any) -> None:
        """`[patches, 1, h_vision]`, or a list of it; None for the first stage."""
        self.vision.set_input_tensor(_single(input_tensor))

    def forward(self, microbatch: Microbatch) -> torch.Tensor:
        """`[patches, 1, h_vision]`."""
        output: torch.Tensor = self.vision(microbatch["grids"], microbatch.get("pixel_values"))
        return output


class JoiningStage(_Stage):
    """The last ViT layers and the projector; the text embedding, features in their places, the first language layers."""

    def __init__(
        self,
        model: VisionLanguageModel,
        vision: LayerSpan,
        language: LayerSpan,
        *,
        first: bool = False,
        last: bool = False,
    ) -> None:
        language_config = config_with_span(model.language, language)
        super().__init__(language_config)
        self.image_token, self.video_token = model.image_token, model.video_token
        self.vision = VisionChunk(config_with_span(model.vision, vision), pre_process=first, post_process=True)
        self.language = _language(model, language_config, first=True, last=last)

    def set_input_tensor(self, input_tensor: Any) -> None:
        """`[patches, 1, h_vision]`, or a list of it."""
        self.vision.set_input_tensor(_single(input_tensor))

    def forward(self, microbatch: Microbatch) -> torch.Tensor:
        """`[s, b, h]`; of a whole model losses `[b, s]`, or logits `[b, s, vocabulary]` without labels.

        Raises:
            LdtError: more or fewer placeholders in the text than tokens of images and videos.
        """
        features = self.vision(microbatch["grids"], microbatch.get("pixel_values"))
        input_ids = microbatch["input_ids"].to(features.device)
        embedded = self.language.embedding(input_ids=input_ids, position_ids=None)
        # Images and videos come in the order of the text, so their placeholders are one kind.
        places = input_ids.masked_fill(input_ids == self.video_token, self.image_token)
        joined = in_their_places(embedded, places, {"images": features}, {"images": self.image_token})
        return _through(self.language, microbatch, input_ids=input_ids, decoder_input=joined)


class LanguageStage(_Stage):
    """Language layers; the last stage has the final norm, the output layer and the loss too."""

    def __init__(self, model: VisionLanguageModel, span: LayerSpan, *, last: bool) -> None:
        config = config_with_span(model.language, span)
        super().__init__(config)
        self.language = _language(model, config, first=False, last=last)

    def set_input_tensor(self, input_tensor: Any) -> None:
        """`[s, b, h]`, or a list of it."""
        self.language.set_input_tensor(_single(input_tensor))

    def forward(self, microbatch: Microbatch) -> torch.Tensor:
        """`[s, b, h]`; of the last stage losses `[b, s]`, or logits `[b, s, vocabulary]` without labels."""
        return _through(self.language, microbatch, input_ids=None)


class UnsplitVisionLanguageModel(JoiningStage):
    """All of it in one process: an edge alone, and what a split model is compared with."""

    def __init__(self, model: VisionLanguageModel) -> None:
        vision, language = LayerSpan(0, model.vision.num_layers), LayerSpan(0, model.language.num_layers)
        super().__init__(model, vision, language, first=True, last=True)

    def set_input_tensor(self, input_tensor: Any) -> None:
        """The model is whole: it has no input but the microbatch."""


def build_stage(model: VisionLanguageModel, layers: LapLayers, stage: int) -> _Stage:
    """Stage `stage` of `2 P + 1`, or all of an edge that is alone; in the dtype of the model, not yet wrapped."""
    joining = layers.joining_stage
    vision, language = spans(layers.vit), spans(layers.llm)
    if layers.num_stages == 1:
        return UnsplitVisionLanguageModel(model)
    if stage < joining:
        return VisionStage(model, vision[stage], first=stage == 0)
    if stage > joining:
        return LanguageStage(model, language[stage - joining], last=stage == layers.num_stages - 1)
    return JoiningStage(model, vision[-1], language[0])


def _language(model: VisionLanguageModel, config: Any, *, first: bool, last: bool) -> Any:
    return language_chunk(
        config,
        vocab_size=model.vocab_size,
        max_sequence_length=model.max_sequence_length,
        rope_theta=model.rope_theta,
        tied=model.tied,
        pre_process=first,
        post_process=last,
    )


def _through(language: Any, microbatch: Microbatch, *, input_ids: Any, decoder_input: Any = None) -> torch.Tensor:
    """A GPTModel's forward with what concerns it of the microbatch."""
    labels = microbatch.get("labels") if language.post_process else None
    segments = microbatch.get("segments")
    output: torch.Tensor = language(
        input_ids,
        microbatch["position_ids"],
        None if segments is None else segments.cpu(),  # here once, not in each layer: see attention.py
        decoder_input=decoder_input,
        labels=None if labels is None else labels.to(next(language.parameters()).device),
    )
    return output


def _single(input_tensor: Any) -> Any:
    """What Megatron's schedules hand over: a tensor, None, or a list of one of them."""
    if isinstance(input_tensor, (list, tuple)):
        (input_tensor,) = input_tensor
    return input_tensor


def _offset(config: Any) -> int:
    span = span_of(config)
    return 0 if span is None else span.offset
