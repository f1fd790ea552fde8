"""Logits of a split model, through the U of two sites in real processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from ldt_schedules.topology import Place, Site
from tests.parity.case import Case


def logits_through_the_u(
    case: Case,
    place: Place,
    model: torch.nn.Module,
    batches: Iterable[dict[str, torch.Tensor]],
    step: Callable[..., Any],
) -> list[np.ndarray]:
    """`[b, s, vocabulary]` of each batch, at the edge; nothing in the cloud.

    Args:
        batches: `[b, s]` and more; they may be of different sizes, so each is a step of its own.
        step: a forward step whose loss function reports `logits`, of this process's part of the vocabulary.
    """
    from megatron.core import tensor_parallel
    from megatron.core.pipeline_parallel import schedules

    from ldt_schedules.training.tensor_parallel_batches import over_tensor_parallel

    model.eval()
    found = []
    for batch in batches:
        size, length = batch["labels"].shape
        count = case.topology.domains if place.site is Site.EDGE else 1
        source = over_tensor_parallel(iter([batch] * count) if place.tensor_rank == 0 else None)
        with torch.no_grad():
            reports = schedules.get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=source if place.site is Site.EDGE else None,
                model=[model],
                num_microbatches=count,
                seq_length=length,
                micro_batch_size=size,
                decoder_seq_length=length,
                forward_only=True,
            )
        for report in reports[:1]:
            logits = tensor_parallel.gather_from_tensor_model_parallel_region(report["logits"])
            found.append(logits.double().numpy())
    return found


def reporting_logits(output: torch.Tensor) -> tuple[torch.Tensor, Callable[..., Any]]:
    """What such a step returns."""

    def collected(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        return output.sum(), torch.ones((), dtype=torch.int), {"logits": output.detach()}

    return output, collected
