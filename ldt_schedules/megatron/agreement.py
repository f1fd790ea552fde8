"""Both sites say what they are about to run, and go on only when it is the same."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from ldt_schedules import __version__
from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron.session import Session
from ldt_schedules.planning.formats import table_hash
from ldt_schedules.planning.table import ScheduleTable
from ldt_schedules.topology import Site


def agree(run: Session, mine: dict[str, Any], what: str, mend: str) -> None:
    """Exchange `mine` with the other site and compare. A collective of both sites.

    What was agreed on goes into every step's header, as a hash.

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
    said = json.dumps([run.agreed, what, mine], sort_keys=True)
    run.agreed = hashlib.sha256(said.encode()).hexdigest()[:16]


def exchange(run: Session, what: str, mine: dict[str, Any]) -> dict[Site, dict[str, Any]]:
    """What each site says: this one's is `mine`, of the other its first process's counts. A collective of both sites.

    Args:
        what: the name of the thing, in the singular or plural as a message needs it.
        mine: of JSON types.
    """
    run.exchanges += 1
    if run.place.site_rank == 0:
        run.link.publish(f"{what}/{run.exchanges}/{run.place.site}", mine)
    other = Site.CLOUD if run.place.site is Site.EDGE else Site.EDGE
    theirs = run.link.fetch(f"{what}/{run.exchanges}/{other}", f"the {other}'s {what}")
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


def declared(run: Session) -> dict[str, Any]:
    """Entries for `agree`: what speaks to the other site, and which processes it takes the run to have."""
    size = {str(site): run.topology.world_size(site) for site in Site}
    return {
        "version of ldt-schedules": __version__,
        **{f"processes of the {site}": count for site, count in size.items()},
    }


def _shown(fingerprint: dict[str, Any], key: str) -> str:
    return str(fingerprint[key]) if key in fingerprint else "(key unknown)"
