"""`model.rope_scaling`: a section that is there or not, whose keys depend on its type."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ldt_schedules.megatron.rope_types import SCALING_KEYS
from ldt_schedules.training.section import Section


class RopeScalingSection(Section):
    """How the rotary angles of a model are stretched over texts longer than its first training saw."""

    type: Literal["linear", "llama3", "yarn"] = Field(description="formula")
    factor: float | None = Field(None, ge=1.0, description="times the original length")
    low_freq_factor: float | None = Field(None, gt=0.0, description="turns in the original length: fewer are divided")
    high_freq_factor: float | None = Field(None, gt=0.0, description="turns in the original length: more are kept")
    original_max_position_embeddings: int | None = Field(None, ge=1, description="the original length, tokens")
    beta_fast: float | None = Field(None, gt=0.0, description="turns in the original length: more are kept; default 32")
    beta_slow: float | None = Field(None, gt=0.0, description="turns: fewer are divided by the factor; default 1")
    attention_factor: float | None = Field(None, gt=0.0, description="default 1 + ln(factor) / 10")

    @model_validator(mode="after")
    def _has_the_keys_of_its_type(self) -> RopeScalingSection:
        needed, allowed = SCALING_KEYS[self.type]
        given = set(self.model_dump(exclude={"type"}, exclude_none=True))
        wrong = [f"needs {key}" for key in sorted(needed - given)]
        wrong += [f"has no {key}" for key in sorted(given - needed - allowed)]
        if not wrong and self.type == "llama3" and self.low_freq_factor == self.high_freq_factor:
            wrong = ["needs a high_freq_factor other than low_freq_factor"]
        if wrong:
            raise ValueError(f"model.rope_scaling of type {self.type} {', '.join(wrong)}")
        return self
