"""A small vision-language model split as a two-lap U, and its data: images of many sizes, samples without, padding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from ldt_schedules.planning.layout import Layout
from ldt_schedules.topology import SiteSize
from ldt_schedules.training.forward_step import vision_language_step
from ldt_schedules.training.vocabulary import Vocabulary
from tests.parity.case import VOCABULARY, Case

IMAGE, VIDEO = VOCABULARY - 1, VOCABULARY - 2
PATCH = 2
SEQUENCE = 20
GRIDS = ((1, 4, 4), (1, 2, 6), (2, 2, 4), (1, 6, 2))


@dataclass(frozen=True)
class VisionCase(Case):
    """`vit[s]` layers of the ViT on stage s, `llm[s]` language layers on stage P + s. `layers` is not used."""

    vit: tuple[int, ...] = ()
    llm: tuple[int, ...] = ()
    frozen: tuple[str, ...] = ()

    @property
    def num_ranks(self) -> int:
        return max(1, len(self.vit) - 1)

    @property
    def has_vision(self) -> bool:
        return True

    def vocabulary(self) -> Vocabulary:
        return Vocabulary(VOCABULARY, IMAGE, VIDEO)

    def layout(self) -> Layout:
        return self.config().layout

    def whole(self) -> VisionCase:
        return replace(super().whole(), vit=(sum(self.vit),), llm=(sum(self.llm),), planner="ldt_2lap_1f1b")

    def content(self) -> dict[str, Any]:
        given = super().content()
        given["model"] |= {
            "num_layers": sum(self.llm),
            "num_query_groups": 2,
            "seq_length": SEQUENCE,
            "activation": "swiglu",
            "qkv_bias": True,
        }
        given["vision"] = {
            "num_layers": sum(self.vit),
            "hidden_size": 16,
            "ffn_hidden_size": 24,
            "num_attention_heads": 2,
            "patch_size": PATCH,
            "window_size": 4 * PATCH,
            "full_attention_layers": [1],
            "frozen": list(self.frozen),
        }
        given["layers"] = {"vit": list(self.vit), "llm": list(self.llm)}
        return given


def case(vit: tuple[int, ...], llm: tuple[int, ...], num_microbatches: int, planner: str, **more: object) -> VisionCase:
    given: dict[str, object] = {
        "layers": llm,
        "batches": vision_batches,
        "forward_step": vision_language_step,
        "model": (),
        **more,
    }
    return VisionCase(num_microbatches=num_microbatches, planner=planner, vit=vit, llm=llm, **given)  # type: ignore[arg-type]


def vision_batches(step: int, microbatches: range) -> Iterator[dict[str, torch.Tensor]]:
    """Two samples each: microbatch 1 of 4 has no image, the second sample two; one is padded left, the other right."""
    for microbatch in microbatches:
        generator = torch.Generator().manual_seed(1000 * step + microbatch)
        ids = torch.randint(0, VIDEO, (2, SEQUENCE), generator=generator)
        segments = torch.zeros((2, SEQUENCE), dtype=torch.int64)
        left, right = (microbatch + step) % 3, microbatch % 4
        segments[0, left:] = 1
        segments[1, SEQUENCE - right :] = 1
        grids: list[tuple[int, int, int]] = []
        for sample in range(2):
            position = 3
            for number in range(0 if microbatch % 4 == 1 else 1 + sample):
                grid = GRIDS[(microbatch + 2 * sample + number + step) % len(GRIDS)]
                tokens = grid[0] * grid[1] * grid[2] // 4
                ids[sample, position : position + tokens] = VIDEO if grid[0] > 1 else IMAGE
                grids.append(grid)
                position += tokens + 1
        mask = ((torch.rand((2, SEQUENCE), generator=generator) < 0.6) & (ids < VIDEO)).float()
        mask[0, :left] = 0.0
        mask[1, SEQUENCE - right :] = 0.0
        patches = sum(t * h * w for t, h, w in grids)
        yield {
            "input_ids": ids,
            "labels": torch.randint(0, VIDEO, (2, SEQUENCE), generator=generator),
            "loss_mask": mask,
            "segments": segments,
            "position_ids": torch.randint(0, 2 * SEQUENCE, (3, 2, SEQUENCE), generator=generator),
            "pixel_values": torch.randn((patches, 3 * 2 * PATCH * PATCH), generator=generator),
            "grids": torch.tensor(grids, dtype=torch.int64).reshape(-1, 3),
        }


ONE = SiteSize()
