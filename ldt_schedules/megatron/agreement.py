"""Both sites say what they are about to run, and go on only when it is the same."""

from __future__ import annotations

import json
from typing import Any

from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron.session import Session
from ldt_schedules.planning.formats import table_hash
from ldt_schedules.planning.table import ScheduleTable
from ldt_schedules.topology import Site


def agree(run: Session, mine: dict[str, Any], what: str, mend: str) -> None:
    """Exchange `mine` with the other site and compare. A collective of both sites.

    Args:
        mine: key -> value of JSON types; of each site its first process's counts.
        what: the name of the thing, in the singular or plural as the message needs it (`"configs"`).
        mend: what the user should do about a difference.

    Raises:
        ConfigError: on both sites, with every key that differs and both values.
    """
    both = exchange(run, what, mine)
    lines = differing_keys(both[Site.EDGE], both[Site.CLOUD])
    if lines:
        raise ConfigError(f"the two sites have different {what}:\n  " + "\n  ".join(lines) + f"\n{mend}")


def exchange(run: Session, what: str, mine: dict[str, Any]) -> dict[Site, dict[str, Any]]:
    """What each site says: this one's is `mine`, of the other its first process's counts. A collective of both sites.

    Args:
        what: the name of the thing, in the singular or plural as a message needs it; once for each exchange of a run.
        mine: of JSON types.
    """
    if run.place.site_rank == 0:
        run.link.publish(f"{what}/{run.place.site}", mine)
    other = Site.CLOUD if run.place.site is Site.EDGE else Site.EDGE
    theirs = run.link.fetch(f"{what}/{other}", f"the {other}'s {what}")
    # Nobody leaves, and takes the store along, before everybody has read.
    run.link.wait_for_all()
    return {run.place.site: json.loads(json.dumps(mine)), other: theirs}


def differing_keys(edge: dict[str, Any], cloud: dict[str, Any]) -> list[str]:
    """One line for each key of two fingerprints that differs, the edge's value first.

    >>> differing_keys({"train.lr": 0.001}, {"train.lr": 0.002})
    ['train.lr: edge 0.001, cloud 0.002']
    """
    return [
        f"{key}: edge {_shown(edge, key)}, cloud {_shown(cloud, key)}"
        for key in sorted({*edge, *cloud})
        if key not in edge or key not in cloud or edge[key] != cloud[key]
    ]


def fingerprint(name: str, table: ScheduleTable) -> dict[str, str]:
    """An entry for `agree`: the table by its hash, whatever file or planner it came from."""
    return {f"{name} (hash of the table)": table_hash(table)[:16]}


def _shown(fingerprint: dict[str, Any], key: str) -> str:
    return str(fingerprint[key]) if key in fingerprint else "(key unknown)"
