"""What every section of a config is made of."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Frozen, and strict: no unknown key, no `"5"` for 5, no `yes` for 1."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
