"""MindSpeed-MM's vision-language model as a two-lap U: what its modules ask of the process, answered for a whole pipeline.

MM's model is written for one world of P pipeline ranks, and asks Megatron for its rank when its chunks are built and again
when a ViT layer decides whether it attends to windows or to the whole image. Each site is a world of its own here, in
which the cloud's first rank is 0. So while chunks are built, and while one of them runs, Megatron's numbers are those of
the whole pipeline. Only the numbers: groups stay the site's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state

from ldt_schedules import device
from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron import session
from ldt_schedules.megatron.session import Session
from ldt_schedules.mindspeed.mm_microbatches import MmMicrobatches, Positions
from ldt_schedules.topology import Topology
from patches import manager
from patches.manager import Patch

CHUNKS = 3
"""Of each process, in MM's contract."""
_VITS, _LANGUAGE_MODELS = ("qwen2vit", "qwen2_5_vit"), ("qwen2lm", "qwen2_5_lm")


def serve(run: Session, patches: tuple[Patch, ...]) -> None:
    """From here on `run` exchanges MM's vision-language microbatches. A second call changes nothing.

    Raises:
        ConfigError: a model, or an option, that cannot be split so.
        PatchError: MM's model is not the one that `patches` are declared for.
    """
    from megatron.training import get_args

    microbatches = microbatches_of(get_args(), run.topology)
    manager.apply(patches)
    run.microbatch_format = microbatches


def microbatches_of(args: Any, topology: Topology) -> MmMicrobatches:
    """The format of the model that MM's arguments describe.

    Raises:
        ConfigError: a model, or an option, that cannot be split so.
    """
    model = args.mm.model
    vit, decoder = model.image_encoder.vision_encoder, model.text_decoder
    for what, found, served in (
        ("image_encoder.vision_encoder", vit.model_id, _VITS),
        ("text_decoder", decoder.model_id, _LANGUAGE_MODELS),
    ):
        if found not in served:
            raise ConfigError(f"{what}.model_id is {found!r}; between two sites {' and '.join(served)} are served")
    wrong = [
        name for name in ("encoder_dp_balance", "hetero_parallel", "sequence_parallel") if getattr(args, name, False)
    ]
    wrong += ["context_parallel_size > 1"] if getattr(args, "context_parallel_size", 1) > 1 else []
    if wrong:
        raise ConfigError(f"{', '.join(wrong)}: not possible with a vision-language model on two sites; switch it off")
    return MmMicrobatches(
        joining_stage=topology.num_pipeline_ranks,
        vision_width=vit.hidden_size,
        language_width=decoder.hidden_size,
        dtype=args.params_dtype,
        device=device.current_device(),
        positions=mm_positions(decoder.model_id),
    )


def mm_positions(model_id: str) -> Positions:
    """MM's own rule for a text decoder. It is asked at the edge, which has the tokens."""
    from mindspeed_mm.models.vision import vlm_attentionmask_for_llm as rules

    rule = rules.attention_mask_list[model_id].keywords["pos_func"]

    def positions(batch: Any, grids: torch.Tensor) -> torch.Tensor:
        ids = batch["input_ids"]
        others = {"second_per_grid_ts": batch.get("second_per_grid_ts"), "attention_mask": batch.get("attention_mask")}
        # A video counts as an image by the time that MM asks: get_batch has renamed it.
        found: torch.Tensor = rule(None, ids, image_grid_thw=grids.to(ids.device), **others)[0]
        return found

    return positions


@contextmanager
def whole_pipeline(pipeline_rank: int, num_ranks: int, chunk: int) -> Iterator[None]:
    """While inside, Megatron says that this is chunk `chunk` of three on rank `pipeline_rank` of `num_ranks`."""
    numbers = {
        "_MPU_PIPELINE_MODEL_PARALLEL_WORLD_SIZE": num_ranks,
        "_MPU_PIPELINE_MODEL_PARALLEL_RANK": pipeline_rank,
        "_VIRTUAL_PIPELINE_MODEL_PARALLEL_WORLD_SIZE": CHUNKS,
        "_VIRTUAL_PIPELINE_MODEL_PARALLEL_RANK": chunk,
    }
    # Not Megatron's getters: where nothing is set they answer for the group, and that answer must not be written down.
    before = {name: getattr(parallel_state, name) for name in numbers}
    vars(parallel_state).update(numbers)
    try:
        yield
    finally:
        vars(parallel_state).update(before)


def build_chunks(
    provider: Callable[..., torch.nn.Module], args: Any, pipeline_rank: int, num_ranks: int
) -> list[torch.nn.Module]:
    """The three chunks of a process, not yet wrapped, from MM's own model provider.

    Args:
        provider: `(pre_process=, post_process=) -> VLMModel`, of `pretrain_vlm.py`, or of MM's own patch where the edge has
            no language layers.
        args: Megatron's; its two pipeline sizes are those of the whole pipeline meanwhile.
    """
    sizes = {"pipeline_model_parallel_size": num_ranks, "virtual_pipeline_model_parallel_size": CHUNKS}
    before = {name: getattr(args, name, None) for name in sizes}
    vars(args).update(sizes)
    try:
        chunks = []
        for number in range(CHUNKS):
            with whole_pipeline(pipeline_rank, num_ranks, number):
                first, last = number == 0, number == CHUNKS - 1
                edge = pipeline_rank == 0
                chunks.append(provider(pre_process=edge and first, post_process=edge and last))
        return chunks
    finally:
        vars(args).update(before)


def layers_counted(original: Callable[..., Any]) -> Callable[..., Any]:
    """For `Qwen2VLVisionTransformerBlock.forward`, which counts the layers before its own: some of a ViT's see whole images.

    MM counts those of earlier ranks in the chunks before, and forgets the later ranks': on the edge, behind a cloud with all
    but the last of 32 layers, it would count 3, and let the last one, which sees whole images, see windows. A ViT's layers
    are those of the first lap and stage P, so the layers before stage s are those of s ranks of the first row.
    """

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = session.current()
        if run is None or run.executing is None:
            return original(self, *args, **kwargs)
        with whole_pipeline(run.executing, run.topology.num_pipeline_ranks, chunk=0):
            return original(self, *args, **kwargs)

    return forward


def none_are_no_rows(original: Callable[..., Any]) -> Callable[..., Any]:
    """For `VLMModel.forward`: of a microbatch without images it would pass over the ViT and hand over None."""

    @functools.wraps(original)
    def forward(
        self: Any, input_ids: Any, pixel_values: Any = None, image_grid_thw: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        run = session.current()
        if run is not None and run.microbatch_format is not None and (pixel_values is None or image_grid_thw is None):
            pixel_values = torch.empty((0, 0), device=input_ids.device)
            image_grid_thw = input_ids.new_zeros((0, 3))
        return original(self, input_ids, pixel_values, image_grid_thw, *args, **kwargs)

    return forward


def nothing_seen(original: Callable[..., Any]) -> Callable[..., Any]:
    """For `VisionModel.forward`: of no images features without rows.

    MM's ViT cannot make its windows of none. The features hang on every weight and on the input, so that each gets a
    gradient, of zeros: a DistributedDataParallel waits for all of them, and a schedule goes backward everywhere.
    """

    @functools.wraps(original)
    def forward(self: Any, images: Any = None, image_grid_thw: Any = None, *args: Any, **kw: Any) -> Any:
        if image_grid_thw is None or len(image_grid_thw):
            return original(self, images, image_grid_thw, *args, **kw)
        encoder, projector = self.config.vision_encoder, self.config.vision_projector
        width = projector.hidden_size if self.add_projector else encoder.hidden_size
        empty = torch.zeros((0, 1, width), dtype=encoder.params_dtype, device=image_grid_thw.device)
        given = None if self.pre_process else self.encoder.blocks.input_tensor
        learning = [one for one in (given, *self.parameters()) if one is not None and one.requires_grad]
        # A sum over nothing of each: it reads no weight.
        return empty + sum((one.flatten()[:0].sum() for one in learning), empty.new_zeros(()))

    return forward
