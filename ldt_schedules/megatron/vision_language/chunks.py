"""One process's part of a vision-language model: every stage that stands on its pipeline rank, in one module.

edge          stages 0, P, 2P         cloud rank r    stages r, P + r
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule

from ldt_schedules.megatron.chunks import NamedPart, StageChunks, narrowed_stage, unwrapped
from ldt_schedules.megatron.vision_language.description import VisionLanguageModel, freeze
from ldt_schedules.megatron.vision_language.stages import JoiningStage, build_stage
from ldt_schedules.planning.lap_layers import LapLayers


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

    def named_chunks(self) -> Iterator[tuple[str, Any]]:
        return ((f"stages.{number}", stage) for number, stage in self.stages.items())

    def named_parts(self) -> Iterator[NamedPart]:
        for stage in self.stages.values():
            yield from unwrapped(stage).named_parts()


def build_vision_language(
    model: VisionLanguageModel, layers: LapLayers, stages: Sequence[int], frozen: Sequence[str] = ()
) -> MegatronModule:
    """The module of this process, not yet wrapped in DistributedDataParallel.

    Args:
        stages: those that stand on this process's pipeline rank, as the layout has it.
        frozen: parts that are not trained, see `description.freeze`.

    Raises:
        ConfigError: an unknown part.
    """
    config, joining, last = model.language, layers.joining_stage, layers.num_stages - 1
    built = {stage: build_stage(model, layers, stage) for stage in stages}
    if model.tied and joining in built and last != joining:
        built[last].language.output_layer.weight = built[joining].language.embedding.word_embeddings.weight
    for stage in built.values():
        freeze(stage, frozen)
    narrow = {n: narrowed_stage(config, one, first=n == 0, last=n == last) for n, one in built.items()}
    return VisionLanguageChunks(config, narrow) if last else narrow[last]
