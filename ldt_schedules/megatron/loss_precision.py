"""A loss in float64 where the model is in float64.

megatron-core's cross entropy starts by rounding logits to float32, which is what one wants for 16 bits. It is also the
only place of a float64 model that would be in float32, and hides what a float64 run is made to show: whether two layouts
differ by rounding or by a mistake.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def logits_max_in_their_precision(original: Callable[..., Any]) -> Callable[..., Any]:
    """For `VocabParallelCrossEntropy.calculate_logits_max`: `[s, b, v]` logits -> (logits, maximum over v)."""

    def calculate_logits_max(vocab_parallel_logits: torch.Tensor) -> Any:
        if vocab_parallel_logits.dtype != torch.float64:
            return original(vocab_parallel_logits)
        return vocab_parallel_logits, torch.max(vocab_parallel_logits, dim=-1)[0]

    return calculate_logits_max
