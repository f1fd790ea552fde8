"""One process's part of a vision-language model: every stage that stands on its pipeline rank, in one module.

edge          stages 0, P, 2P         cloud rank r    stages r, P + r
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule

from ldt_schedules.megatron.chunks import NamedPart, StageChunks, narrowed_stage, unwrapped
from ldt_schedules.megatron.vision_language.description import Split, VisionLanguageModel, freeze
from ldt_schedules.megatron.vision_language.stages import JoiningStage, UnsplitVisionLanguageModel, build_stage
from ldt_schedules.topology import Place, Site


class VisionLanguageChunks(StageChunks):
    """The stages of one pipeline rank."""

    def __init__(self, config: Any, stages: Mapping[int, torch.nn.Module]) -> None:
        super().__init__(config=config)
        self.stages = torch.nn.ModuleDict({str(number): stage for number, stage in stages.items()})
        self.model_type = unwrapped(next(iter(stages.values()))).model_type
        joining = [stage for stage in map(unwrapped, stages.values()) if isinstance(stage, JoiningStage)]
        # Megatron asks a pipeline's first and last rank for embeddings to sum. Here both ends are one process's, or none.
        self.pre_process = self.post_process = self.share_embeddings_and_output_weights = False
        self.pg_collection = joining[0].pg_collection if joining else None  # training loops of 0.16 ask for it

    @property
    def stage_modules(self) -> dict[int, torch.nn.Module]:
        return {int(number): stage for number, stage in self.stages.items()}

    def named_parts(self) -> Iterator[NamedPart]:
        for stage in self.stages.values():
            yield from unwrapped(stage).named_parts()


def build_vision_language(
    model: VisionLanguageModel, split: Split | None, place: Place, frozen: Sequence[str] = ()
) -> MegatronModule:
    """The module of this process, not yet wrapped in DistributedDataParallel.

    Args:
        split: layers of each stage; None: the edge is alone and holds the whole model.
        frozen: parts that are not trained, see `description.freeze`.

    Raises:
        ConfigError: an unknown part.
    """
    config = model.language
    if split is None:
        whole = UnsplitVisionLanguageModel(model)
        freeze(whole, frozen)
        return narrowed_stage(config, whole, first=True, last=True)
    mine = range(place.stage, split.num_stages, split.num_ranks)
    stages = {stage: build_stage(model, split, stage) for stage in mine}
    if model.tied and place.site is Site.EDGE:
        embedding = stages[split.num_ranks].language.embedding.word_embeddings
        stages[split.num_stages - 1].language.output_layer.weight = embedding.weight
    for stage in stages.values():
        freeze(stage, frozen)
    last = split.num_stages - 1
    narrow = {n: narrowed_stage(config, one, first=n == 0, last=n == last) for n, one in stages.items()}
    return VisionLanguageChunks(config, narrow)
