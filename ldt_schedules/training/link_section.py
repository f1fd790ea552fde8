"""The config's keys of the link between the sites."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from ldt_schedules.training.section import Section


class LinkSection(Section):
    """What joins the sites. The cloud listens, so that the edge needs no open port."""

    address: str = Field(
        "127.0.0.1:0", description="HOST:PORT where the cloud listens; port 0: choose one (one machine)"
    )
    timeout_s: float = Field(300.0, gt=0.0, description="seconds that one site waits for the other")
    boundary: Literal["slices", "lead"] = Field(
        "slices", description="tensors cross cut over the tensor-parallel processes, or whole from the first one"
    )
    backend: Literal["auto", "gloo", "nccl", "hccl"] = Field("auto", description="transport of activations")
    silence_s: float = Field(
        15.0,
        ge=0.0,
        description="seconds without a sign of life, 2 or more, after which a process is taken for lost and all stop (before "
        "the first step timeout_s); 0: never",
    )
    quiet_s: float = Field(
        30.0, ge=0.0, description="seconds of waiting after which a process says what it waits for; 0: never"
    )

    @field_validator("silence_s")
    @classmethod
    def _hears_beats(cls, silence_s: float) -> float:
        if 0 < silence_s < 2:
            raise ValueError("Value should be 2 or more (signs of life come every 0.5 s), or 0 for never")
        return silence_s

    @field_validator("address")
    @classmethod
    def _is_host_and_port(cls, address: str) -> str:
        host, colon, port = address.rpartition(":")
        if not colon or not host or not re.fullmatch(r"\d{1,5}", port) or int(port) > 65535:
            raise ValueError("Value should be HOST:PORT with a port of 0 to 65535, for instance 10.0.0.7:29500")
        return address

    @property
    def host(self) -> str:
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])
