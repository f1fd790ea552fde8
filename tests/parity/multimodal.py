"""A small multimodal model on megatron-core layers, and its data: sounds and images of many sizes, some microbatches without.

sounds [n, 5] ──► 1 transformer layer ──► n tokens       images [4 n, 7] ──► 4 patches make a token, 2 layers ──► n tokens
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock

from ldt_schedules.megatron.layer_span import LayerSpan, config_with_span
from ldt_schedules.megatron.modalities import Modality
from ldt_schedules.training.forward_step import loss_of_tokens
from tests.parity.case import VOCABULARY, batches

AUDIO, VISION = 5, 7
TOKENS = {"audio": VOCABULARY - 1, "vision": VOCABULARY - 2}


class Encoder(MegatronModule):
    """`rows` rows `[rows * n, width]` make one token; transformer layers without a mask."""

    def __init__(self, config: Any, width: int, rows: int, layers: int) -> None:
        super().__init__(config=config_with_span(config, LayerSpan(0, layers)))
        self.rows = rows
        self.project = torch.nn.Linear(width * rows, config.hidden_size)
        torch.nn.init.zeros_(self.project.bias)  # matrices are drawn by their names, the rest must be constant
        spec = get_gpt_layer_local_spec()
        self.block = TransformerBlock(self.config, spec, post_layer_norm=False, pre_process=True, post_process=False)
        self.to(config.params_dtype)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        hidden = self.project(values.reshape(-1, self.project.in_features)).unsqueeze(1)
        nothing_hidden = torch.zeros((1, 1, len(hidden), len(hidden)), dtype=torch.bool)
        return self.block(hidden, attention_mask=nothing_hidden).squeeze(1)


MODALITIES = (
    Modality("audio", TOKENS["audio"], partial(Encoder, width=AUDIO, rows=1, layers=1)),
    Modality("vision", TOKENS["vision"], partial(Encoder, width=VISION, rows=4, layers=2)),
)


def multimodal_batches(step: int, microbatches: range) -> Iterator[dict[str, Any]]:
    """Placeholders in the tokens, and the inputs they stand for; microbatch 1 of 4 has no sound, microbatch 2 no image."""
    for microbatch, batch in zip(microbatches, batches(step, microbatches), strict=True):
        generator = torch.Generator().manual_seed(7000 * step + microbatch)
        batch["tokens"] = batch["tokens"] % min(TOKENS.values())
        sound, image = 1 + (microbatch + step) % 4, 1 + (3 * microbatch) % 3
        inputs: dict[str, Any] = {}
        if microbatch % 4 != 1:
            batch["tokens"][0, 1 : 1 + sound] = TOKENS["audio"]
            inputs["audio"] = {"values": torch.randn((sound, AUDIO), generator=generator, dtype=torch.float64)}
        if microbatch % 4 != 2:
            for sample in range(2):
                batch["tokens"][sample, 6 : 6 + image] = TOKENS["vision"]
            values = torch.randn((2 * image * 4, VISION), generator=generator, dtype=torch.float64)
            inputs["vision"] = {"values": values}
        else:
            inputs["vision"] = None
        yield {**batch, "modality_inputs": inputs}


def multimodal_step(iterator: Iterator[dict[str, Any]] | None, model: torch.nn.Module) -> tuple[Any, Any]:
    """As a user writes it: every chunk is called with the batch, the cloud's with nothing."""
    if iterator is None:
        return model(None, None, None), None
    batch = next(iterator)
    output = model(
        batch["tokens"], batch["position_ids"], None, labels=batch["labels"], modality_inputs=batch["modality_inputs"]
    )
    return output, partial(loss_of_tokens, batch["loss_mask"])
