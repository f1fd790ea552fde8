"""Both sites say what they are about to run, and go on only when it is the same."""

from __future__ import annotations

from typing import Any

from ldt_schedules.megatron import agreement
from ldt_schedules.megatron.session import Session
from ldt_schedules.training.config import TrainConfig, shared_fingerprint


def agree(config: TrainConfig, run: Session) -> None:
    """Exchange the shared part of the config and the hash of the schedule.

    Raises:
        ConfigError: on both sites, with every key that differs and both values.
    """
    agreement.agree(run, fingerprint(config, run), "configs", "give both sites the same file and overrides")


def fingerprint(config: TrainConfig, run: Session) -> dict[str, Any]:
    """What must be equal: the config's shared keys, and the schedule whatever file it came from."""
    table = run.table_for(config.num_microbatches, False)
    return {**agreement.declared(run), **shared_fingerprint(config), **agreement.fingerprint("schedule", table)}
