"""Scaled rotary angles: the very numbers of transformers, and what each formula is for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ldt_schedules.megatron.rotary import inverse_frequencies, softmax_scale

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"type": "linear", "factor": 2.5},
    "llama3, 3.1": {"type": "llama3", **LLAMA3},
    "llama3, 3.2": {"type": "llama3", **LLAMA3, "factor": 32.0},
    "llama3, short": {"type": "llama3", **LLAMA3, "original_max_position_embeddings": 32},
    "yarn": {"type": "yarn", **YARN},
    "yarn, betas": {"type": "yarn", **YARN, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.25},
    "yarn, short": {"type": "yarn", "factor": 3.0, "original_max_position_embeddings": 16},
    "yarn, one": {"type": "yarn", "factor": 1.0, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("width", [8, 64, 128])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0, 1_234_567.5])
@pytest.mark.parametrize("name", SCALINGS)
def test_every_bit_is_that_of_transformers(name: str, theta: float, width: int) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    given = dict(SCALINGS[name])
    kind = given.pop("type")
    config = LlamaConfig(
        hidden_size=2 * width, num_attention_heads=2, rope_parameters={"rope_type": kind, "rope_theta": theta, **given}
    )
    expected, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    assert torch.equal(inverse_frequencies(width, theta, SCALINGS[name]), expected)
    if kind == "yarn":
        assert softmax_scale(width, SCALINGS[name]) == pytest.approx(factor**2 / math.sqrt(width), rel=1e-12)
    else:
        assert factor == 1.0 and softmax_scale(width, SCALINGS[name]) is None


@pytest.mark.parametrize("theta", [10_000.0, 1e6])
def test_unscaled_is_megatron_core(theta: float) -> None:
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    theirs = RotaryEmbedding(32, 1.0, rotary_base=theta, use_cpu_initialization=True)  # type: ignore[arg-type]
    assert torch.equal(inverse_frequencies(32, theta), theirs.inv_freq)
    assert softmax_scale(32, None) is None


@pytest.mark.parametrize("name", ["llama3, 3.1", "yarn"])
def test_fast_angles_are_kept_and_slow_ones_divided(name: str) -> None:
    plain, scaled = inverse_frequencies(128, 5e5), inverse_frequencies(128, 5e5, SCALINGS[name])
    quotient = plain / scaled
    factor = SCALINGS[name]["factor"]
    assert quotient[0] == 1.0 and quotient[-1] == pytest.approx(factor, rel=1e-6)
    assert bool((quotient[1:] >= quotient[:-1] - 1e-5).all()), "from fast to slow more and more is divided"
    turns = SCALINGS[name]["original_max_position_embeddings"] * plain / (2 * math.pi)
    assert bool((quotient[turns > 33] == 1.0).all()) and quotient[turns < 0.9].tolist() == pytest.approx(
        [factor] * int((turns < 0.9).sum()), rel=1e-6
    )
