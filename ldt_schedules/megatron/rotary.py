"""Rotary angles that are scaled for longer texts than a model began with.

    linear    every frequency divided by `factor`                                  "position interpolation", arXiv:2306.15595
    llama3    slow frequencies divided, fast ones kept, a ramp between             Llama 3.1; arXiv:2407.21783, section 3.4.2
    yarn      the same with the ramp over dimensions, and sharper attention        arXiv:2309.00071, sections 3.2 and 3.4

megatron-core scales in one of these ways, by constants, and not in all of its versions. So a chunk is built unscaled, and its
frequencies are replaced. They are float32 whatever the model's dtype is, and every product is rounded where transformers
(`modeling_rope_utils.py`) rounds it: a checkpoint was trained with those numbers, and at position 100,000 the last bit of a
frequency is a visible angle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

Scaling = Mapping[str, Any]
"""`type` and what the type needs, as the config's `model.rope_scaling` has it."""


def inverse_frequencies(width: int, theta: float, scaling: Scaling | None = None) -> torch.Tensor:
    """`[width / 2]` float32, fastest first: the angle that each pair of a head's numbers turns by from token to token.

    Args:
        width: of a head; all of it turns.
        theta: the base of the geometric row from 1 down to (nearly) 1 / theta.
    """
    periods = theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    if scaling is None:
        return 1.0 / periods
    given = {key: value for key, value in scaling.items() if key not in ("type", "attention_factor")}
    if scaling["type"] == "yarn":
        return _yarn(periods, theta, **given)
    return {"linear": _linear, "llama3": _llama3}[scaling["type"]](1.0 / periods, **given)


def softmax_scale(width: int, scaling: Scaling | None) -> float | None:
    """What scores are multiplied by before the softmax; None: megatron-core's own, `1 / sqrt(width)`.

    YaRN lengthens the rotated queries and keys, both by its attention factor; where a whole head turns, that is one factor of
    their product.
    """
    if scaling is None or scaling["type"] != "yarn":
        return None
    given = scaling.get("attention_factor")
    factor = 0.1 * math.log(scaling["factor"]) + 1.0 if given is None else float(given)
    return factor**2 / math.sqrt(width)


def set_frequencies(gpt: torch.nn.Module, frequencies: torch.Tensor) -> None:
    """Give a GPTModel with rotary positions these, before its first forward (megatron-core keeps what it computed)."""
    rotary: Any = gpt.rotary_pos_emb
    assert rotary.inv_freq.shape == frequencies.shape, (rotary.inv_freq.shape, frequencies.shape)
    rotary.inv_freq = frequencies.to(rotary.inv_freq)


def _linear(frequencies: torch.Tensor, *, factor: float) -> torch.Tensor:
    return frequencies / factor


def _llama3(
    frequencies: torch.Tensor,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> torch.Tensor:
    """By how often an angle went round in the original length: at most `low` times, at least `high` times, between."""
    wavelengths = 2 * math.pi / frequencies
    kept = (original_max_position_embeddings / wavelengths - low_freq_factor) / (high_freq_factor - low_freq_factor)
    between = (1 - kept) * frequencies / factor + kept * frequencies
    slow = wavelengths > original_max_position_embeddings / low_freq_factor
    fast = wavelengths < original_max_position_embeddings / high_freq_factor
    return torch.where(slow, frequencies / factor, torch.where(fast, frequencies, between))


def _yarn(
    periods: torch.Tensor,
    theta: float,
    *,
    factor: float,
    original_max_position_embeddings: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> torch.Tensor:
    """Pairs that turn more than `beta_fast` times in the original length are kept, fewer than `beta_slow` times divided."""
    pairs = len(periods)

    def pair_that_turns(times: float) -> float:
        return pairs * math.log(original_max_position_embeddings / (times * 2 * math.pi)) / math.log(theta)

    first = max(math.floor(pair_that_turns(beta_fast)), 0)
    last: float = min(math.ceil(pair_that_turns(beta_slow)), 2 * pairs - 1)
    if first == last:
        last += 0.001  # a step, not a division by zero
    ramp = torch.clamp((torch.arange(pairs, dtype=torch.float32) - first) / (last - first), 0, 1)
    kept = 1 - ramp
    divided: torch.Tensor = 1.0 / (factor * periods) * (1 - kept) + 1.0 / periods * kept
    return divided
