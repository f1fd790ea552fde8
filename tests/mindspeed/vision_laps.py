"""Microbatches as MindSpeed-MM makes them, and a Qwen2.5-VL in megatron-core's layers that is called as MM's model is.

    microbatch m    another length of text, other images: one, several, none, a video; padding on either side
    lap 1           [patches, 1, 32]            lap 2    [s, b, 48]

`Stage` takes the keywords of MM's `VLMModel.forward` and, where no positions come, makes them from the tokens as MM does.
The forward step has two arguments and reads its batch itself, wherever it runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.module import MegatronModule

from ldt_schedules.megatron.vision_language.description import freeze
from ldt_schedules.megatron.vision_language.mrope import mrope_positions
from ldt_schedules.megatron.vision_language.stages import UnsplitVisionLanguageModel, build_stage
from ldt_schedules.mindspeed.mm_microbatches import MmMicrobatches
from ldt_schedules.planning.lap_layers import LapLayers, frozen_stages
from ldt_schedules.planning.layout import Layout
from ldt_schedules.runtime.microbatch_format import Told
from ldt_schedules.topology import Site
from tests.mindspeed import stand_in, two_laps
from tests.vision_language import tiny

VISION_WIDTH, LANGUAGE_WIDTH, MICRO_BATCH, IGNORED = 32, 48, 2, -100
IMAGES: tuple[tuple[tuple[tuple[int, int, int], ...], ...], ...] = (
    (((1, 4, 4),), ((1, 2, 6), (1, 4, 2))),
    ((), ()),
    ((), ((1, 6, 6), (1, 2, 2), (1, 2, 4))),
    (((2, 4, 2),), ()),
)
"""Grids of each sample of the microbatches 0, 1, 2, 3, 4 = 0, …; those of microbatch 3 are a video."""


@dataclass(frozen=True)
class VisionCase(two_laps.Case):
    """`vit[s]` ViT layers on stage s, `llm[s]` language layers on stage P + s; `frozen` are parts of the model.

    `from_zeros`: a mistake of upstream's, the cloud derives positions from its tokens, which are zeros.
    """

    vit: tuple[int, ...] = ()
    llm: tuple[int, ...] = ()
    frozen: tuple[str, ...] = ()
    from_zeros: bool = False

    @property
    def layout(self) -> Layout:
        return super().layout.freeze(frozen_stages(LapLayers(self.vit, self.llm), frozenset(self.frozen)))


def case_of(num_ranks: int, num_microbatches: int, **more: Any) -> VisionCase:
    """Windows, whole images and language layers in the cloud; on the edge none of the last."""
    vit = (1, 2, 1) if num_ranks == 2 else (1, 1, 1, 1)
    llm = (0, 3, 0) if num_ranks == 2 else (0, 2, 1, 0)
    return VisionCase(num_ranks, num_microbatches, vit=vit, llm=llm, **more)


class Stage(MegatronModule):
    """One stage, or the whole model, with MM's keywords. `stage` None is the empty chunk."""

    def __init__(self, config: Any, stage: Any, number: int | None, last: int) -> None:
        super().__init__(config)
        self.stage = stage
        self.model_type = stage.model_type if stage is not None else None
        self.pre_process, self.post_process = number == 0, number == last
        self.share_embeddings_and_output_weights = False

    def named_parts(self) -> Any:
        return [] if self.stage is None else self.stage.named_parts()

    def set_input_tensor(self, given: Any) -> None:
        self.stage.set_input_tensor(given)

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **others: Any,
    ) -> Any:
        assert self.stage is not None, "the empty chunk was run"
        assert attention_mask is not None
        grids = torch.zeros((0, 3), dtype=torch.int64) if image_grid_thw is None else image_grid_thw
        microbatch = {
            "input_ids": input_ids,
            "grids": grids,
            "segments": segments(attention_mask),
            "position_ids": positions_from_tokens(locals(), grids) if position_ids is None else position_ids,
            "pixel_values": torch.zeros((0, tiny.PATCH_VALUES)) if pixel_values is None else pixel_values,
        }
        if not self.post_process:
            return self.stage(microbatch)
        assert labels is not None
        shifted = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)
        losses = self.stage({**microbatch, "labels": shifted.clamp(min=0)})
        mask = (shifted != IGNORED).to(losses.dtype)
        return {"loss_dict": {"sum": (losses * mask).sum(), "token_nums": mask.sum()}}


@dataclass(frozen=True, kw_only=True)
class FromZeros(MmMicrobatches):
    """What upstream's cloud sees: the positions of a text of zeros, in which there is no image."""

    def in_the_cloud(self, told: Told) -> dict[str, Any]:
        batch = super().in_the_cloud(told)
        return {**batch, "position_ids": positions_from_tokens(batch, torch.zeros((0, 3), dtype=torch.int64))}


def segments(attention_mask: torch.Tensor) -> torch.Tensor:
    """Padding before, text, padding behind: 0, 1, 2."""
    seen = attention_mask.cumsum(1) > 0
    return seen.long() + (seen & (attention_mask == 0)).long()


def positions_from_tokens(batch: Mapping[str, Any], grids: torch.Tensor) -> torch.Tensor:
    """As MM derives them, from tokens and grids."""
    mask = batch["attention_mask"]
    return mrope_positions(
        batch["input_ids"],
        grids,
        segments(mask),
        mask == 0,
        image_token=tiny.IMAGE,
        video_token=tiny.VIDEO,
    )


def microbatches_of(case: VisionCase, **changes: Any) -> MmMicrobatches:
    kind = FromZeros if case.from_zeros else MmMicrobatches
    given: dict[str, Any] = dict(
        joining_stage=case.laps,
        vision_width=VISION_WIDTH,
        language_width=LANGUAGE_WIDTH,
        dtype=torch.float64 if case.double else torch.float32,
        device=torch.device("cpu"),
        positions=positions_from_tokens,
    )
    return kind(**{**given, **changes})


def batches(step: int, microbatches: range, double: bool) -> Iterator[dict[str, Any]]:
    """As MM's collator makes them: keys of images are there where images are; labels are not shifted."""
    for number in microbatches:
        generator = torch.Generator().manual_seed(1000 * step + number)
        kind = (number + step) % len(IMAGES)
        length = 22 + 3 * (number % 3)
        ids = torch.randint(1, tiny.VIDEO - 1, (MICRO_BATCH, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, : number % 3] = 0
        mask[1, length - number % 4 :] = 0
        name, token = ("video", tiny.VIDEO) if kind == 3 else ("image", tiny.IMAGE)
        for sample, grids in enumerate(IMAGES[kind]):
            place = 4
            for t, h, w in grids:
                tokens = t * h * w // tiny.MERGE**2
                ids[sample, place : place + tokens] = token
                place += tokens + 1
        learned = (torch.rand(ids.shape, generator=generator) < 0.6) & (mask == 1) & (ids < tiny.IMAGE)
        batch: dict[str, Any] = {
            "input_ids": ids.masked_fill(mask == 0, tiny.PAD),
            "labels": ids.masked_fill(~learned, IGNORED),
            "attention_mask": mask,
        }
        given = [grid for sample in IMAGES[kind] for grid in sample]
        if given:
            patches = sum(t * h * w for t, h, w in given)
            pixels = torch.randn((patches, tiny.PATCH_VALUES), generator=generator, dtype=torch.float64)
            batch["pixel_values_videos" if kind == 3 else "pixel_values"] = pixels if double else pixels.float()
            batch[f"{name}_grid_thw"] = torch.tensor(given)
        yield batch


def train_rank(case: VisionCase, global_rank: int, ports: dict[str, int]) -> dict[str, Any]:
    """Train one step, then evaluate one, with the stand-in's patch manager and train step; what this process saw."""
    from ldt_schedules.megatron import session, world

    two_laps.use_stand_in()
    place = two_laps.open_rank(case, global_rank, ports)
    run = session.current()
    if run is not None:
        run.microbatch_format = microbatches_of(case)
    model = build(case, place.stage)
    seen: list[dict[str, Any]] = []
    forward_step = forward_step_of(case, place.site is Site.CLOUD, seen)

    def step(number: int, forward_only: bool) -> Any:
        mine = range(place.data_rank, case.num_microbatches * case.replicas, case.replicas)
        source = batches(number, mine, case.double) if place.site is Site.EDGE else None
        args = SimpleNamespace(
            num_microbatches=case.num_microbatches,
            seq_length=7,  # what the trainer believes; every microbatch is another
            micro_batch_size=MICRO_BATCH,
            forward_only=forward_only,
        )
        iterators = [source] if case.num_ranks == 1 else [source, None, None]
        return stand_in.train_step(args, forward_step, iterators, model)

    reports = step(0, forward_only=False)
    gradients = {name: gradient for chunk in model for name, gradient in gradients_of(chunk).items()}
    with torch.no_grad():
        evaluation = step(7, forward_only=True)
    sent = [] if run is None else [str(action) for action in run.table(case.num_microbatches, False).ranks[place.stage]]
    world.close_site()
    return {"reports": reports, "gradients": gradients, "evaluation": evaluation, "seen": seen, "row": sent}


def build(case: VisionCase, rank: int) -> list[Any]:
    """Three wrapped chunks, or the whole model."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    from ldt_schedules.megatron.initialization import initialize_by_name

    description = tiny.model(
        torch.float64 if case.double else torch.float32,
        num_layers=sum(case.llm),
        hidden_size=LANGUAGE_WIDTH,
        num_attention_heads=6,
        calculate_per_token_loss=case.per_token,
    )
    config, layers = description.language, LapLayers(case.vit, case.llm)
    config.finalize_model_grads_func = finalize_model_grads
    if case.num_ranks == 1:
        stages = [Stage(config, UnsplitVisionLanguageModel(description), 0, 0)]
    else:
        numbers = (rank, case.laps + rank, None if rank else 2 * case.laps)
        built = [None if number is None else build_stage(description, layers, number) for number in numbers]
        stages = [Stage(config, one, n, 2 * case.laps) for n, one in zip(numbers, built, strict=True)]
    for stage in stages:
        if stage.stage is not None:
            initialize_by_name(stage, config, seed=3)
            freeze(stage.stage, case.frozen)
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=not case.double, overlap_grad_reduce=case.overlap)
    return [DistributedDataParallel(config=config, ddp_config=ddp, module=stage) for stage in stages]


def forward_step_of(case: VisionCase, in_the_cloud: bool, seen: list[dict[str, Any]]) -> Any:
    def get_batch(data_iterator: Any) -> dict[str, Any]:
        if data_iterator is None:
            raise ValueError("Data iterator is None. Unable to retrieve batch.")
        batch: dict[str, Any] = next(data_iterator)
        if "pixel_values_videos" in batch:
            batch["pixel_values"] = batch.pop("pixel_values_videos")
            batch["image_grid_thw"] = batch.pop("video_grid_thw")
        batch["tranfer"] = None
        if in_the_cloud:
            seen.append({name: tensor.numpy() for name, tensor in batch.items() if tensor is not None})
        return batch

    def forward_step(data_iterator: Any, model: Any) -> Any:
        return model(**get_batch(data_iterator)), two_laps._loss_per_token if case.per_token else two_laps._loss

    return forward_step


def gradients_of(chunk: Any) -> dict[str, np.ndarray]:
    from ldt_schedules.megatron.chunks import global_parameters

    return {
        name: parameter.main_grad.detach().clone().numpy()
        for name, parameter in global_parameters(chunk)
        if parameter.requires_grad
    }


def whole(case: VisionCase) -> VisionCase:
    return replace(case.whole(), from_zeros=False)  # type: ignore[return-value]
