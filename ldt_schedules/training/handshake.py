"""Both sites say what they are about to run, and go on only when it is the same."""

from __future__ import annotations

from typing import Any

from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron.session import Session
from ldt_schedules.planning.formats import table_hash
from ldt_schedules.topology import Site
from ldt_schedules.training.config import TrainConfig, differing_keys, shared_fingerprint


def agree(config: TrainConfig, run: Session) -> None:
    """Exchange the shared part of the config and the hash of the schedule.

    Raises:
        ConfigError: on both sites, with every key that differs and both values.
    """
    mine = fingerprint(config, run)
    if run.place.site_rank == 0:
        run.link.publish(f"config/{run.place.site}", mine)
    other = Site.CLOUD if run.place.site is Site.EDGE else Site.EDGE
    theirs = run.link.fetch(f"config/{other}", f"the {other}'s config")
    lines = differing_keys(mine, theirs, run.place.site)
    # Nobody leaves, and takes the store along, before everybody has read.
    run.link.wait_for_all()
    if lines:
        raise ConfigError(
            "the two sites were started with different configs:\n  "
            + "\n  ".join(lines)
            + "\ngive both sites the same file and overrides"
        )


def fingerprint(config: TrainConfig, run: Session) -> dict[str, Any]:
    """What must be equal: the config's shared keys, and the schedule whatever file it came from."""
    table = run.table_for(config.num_microbatches, False)
    return {**shared_fingerprint(config), "schedule (hash of the table)": table_hash(table)[:16]}
