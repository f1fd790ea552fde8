"""The keys of the section `train` that say what is saved, and from where a run goes on."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from ldt_schedules.training.section import Section


class CheckpointKeys(Section):
    """Both sites save and load at the same steps, each its own part in a directory of its own."""

    save_interval: int = Field(
        0, ge=0, description="steps between checkpoints; one more after the last step. 0 saves none"
    )
    resume: Literal["never", "auto"] | int = Field(
        "never",
        description="auto: go on from the newest step that both sites hold; a number: from that step; never: start",
    )
    checkpoint_dir: str | None = Field(
        None, description="directory in which `edge` and `cloud` keep their steps; default output_dir/checkpoints"
    )
    keep_checkpoints: int = Field(2, ge=0, description="newest steps that are kept, 2 or more; 0 keeps all")
    async_save: bool = Field(False, description="write checkpoints while training goes on, from a copy in memory")
    load: str | None = Field(
        None, description="Megatron checkpoint to start from: a whole model's, or this site's part of one"
    )
    finetune: bool = Field(False, description="of train.load take the weights alone, and count steps from 0")

    @field_validator("keep_checkpoints")
    @classmethod
    def _one_is_not_enough(cls, keep: int) -> int:
        if keep == 1:
            raise ValueError(
                "Value should be 0 or at least 2: when a site fails while it saves, the other may be one step ahead"
            )
        return keep

    @field_validator("resume", mode="before")
    @classmethod
    def _is_a_step(cls, resume: object) -> object:
        if resume in ("never", "auto") or (type(resume) is int and resume > 0):
            return resume
        raise ValueError("Value should be auto, never or a step from 1 on")
