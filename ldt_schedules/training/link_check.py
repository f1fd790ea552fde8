"""Both sites meet over one connection, compare what they would run, and measure the way between them.

    report = check_link(config, Site.EDGE, options)         at each site, at once
    report = check_here(config, options)                    both ends on this machine, to see what it does

The edge leads and tells the cloud what came of it, so both have one report.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ldt_schedules.comm.probe.figures import LinkFigures, answer, broken_off, conclude, measure
from ldt_schedules.comm.probe.meeting import FORMAT, connect, listen, open_port
from ldt_schedules.comm.probe.wire import Garbage, Wire
from ldt_schedules.errors import ConfigError, LdtError
from ldt_schedules.megatron import agreement
from ldt_schedules.megatron.session import TableSource
from ldt_schedules.topology import Site
from ldt_schedules.training.config import TrainConfig, shared_fingerprint
from ldt_schedules.training.installation import installed_versions
from ldt_schedules.training.link_forecast import Forecast, forecast_link
from ldt_schedules.training.schedule import table_source

_HERE = "127.0.0.1"


@dataclass(frozen=True)
class CheckOptions:
    """How long to wait for the other site, how long to transfer each way, and whom to tell what is awaited."""

    wait_s: float
    seconds: float
    tell: Callable[[str], None]


class SiteFacts(BaseModel):
    """What a site says of itself."""

    model_config = ConfigDict(strict=True, frozen=True)

    site: Site
    host: str
    versions: dict[str, str]
    config: dict[str, Any]
    """What must be equal on both sites: the config's shared keys and the schedule's hash."""


class LinkReport(BaseModel):
    """What both sites print; the edge makes it and sends it to the cloud.

    Attributes:
        here: both ends are on this machine.
        hosts, versions: of each site.
        differing_config, differing_versions: one line for each difference.
        forecast: None where the configs differ, so that there is no one plan.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    address: str
    here: bool
    hosts: dict[str, str]
    versions: dict[str, dict[str, str]]
    differing_config: list[str]
    differing_versions: list[str]
    link: LinkFigures
    forecast: Forecast | None

    def figures(self) -> dict[str, Any]:
        """Of JSON types."""
        return self.model_dump(mode="json")


def check_link(config: TrainConfig, site: Site, options: CheckOptions) -> LinkReport:
    """Be one site.

    Raises:
        ConfigError: there is no link, or no port to meet at; nobody knows the name.
        LdtError: the other site was not met, or went away.
    """
    table_for = _plan(config)
    if config.link.port == 0:
        raise ConfigError(
            f"link.address is {config.link.address}: with --site the sites meet at a port that both know; give both the "
            "same link.address=HOST:PORT, HOST being a name or address of the cloud's first machine"
        )
    if site is Site.CLOUD:
        with open_port(config.link.host, config.link.port) as server:
            return _be_cloud(config, table_for, server, options)
    return _be_edge(config, table_for, config.link.host, config.link.port, options)


def check_here(config: TrainConfig, options: CheckOptions) -> LinkReport:
    """Both ends in this process, over the loopback. Raises as `check_link`."""
    table_for = _plan(config)
    failed: list[BaseException] = []
    with open_port(_HERE, 0) as server:

        def cloud() -> None:
            try:
                _be_cloud(config, table_for, server, CheckOptions(options.wait_s, options.seconds, lambda text: None))
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=cloud, name="cloud", daemon=True)
        thread.start()
        report = _be_edge(config, table_for, _HERE, server.getsockname()[1], options, here=True)
        thread.join(options.wait_s)
    if failed:
        raise failed[0]
    return report


def _plan(config: TrainConfig) -> TableSource:
    if config.num_pipeline_ranks == 1:
        raise ConfigError(
            "sites.cloud.pipeline_ranks is 0: the edge is alone, and there is no link; set it to 1 or more"
        )
    return lru_cache(maxsize=4)(table_source(config))


def _be_cloud(config: TrainConfig, table_for: TableSource, server: socket.socket, options: CheckOptions) -> LinkReport:
    wire, theirs = listen(server, _hello(config, table_for, Site.CLOUD), options.wait_s, options.tell)
    with wire:
        _facts(theirs, wire)
        options.tell(f"measuring with the edge at {wire.peer}")
        told = answer(wire)
    try:
        return LinkReport.model_validate_json(json.dumps(told))
    except ValidationError as error:
        raise broken_off("edge", Garbage(f"its report is not as it should be ({error.error_count()} places)")) from None


def _be_edge(
    config: TrainConfig, table_for: TableSource, host: str, port: int, options: CheckOptions, here: bool = False
) -> LinkReport:
    mine = _hello(config, table_for, Site.EDGE)
    wire, answered = connect(host, port, mine, options.wait_s, options.tell)
    with wire:
        edge, cloud = SiteFacts.model_validate_json(json.dumps(mine)), _facts(answered, wire)
        figures = measure(wire, options.seconds, options.tell)
        different = agreement.differing_keys(edge.config, cloud.config)
        options.tell("simulating a step")
        report = LinkReport(
            address=f"{host}:{port}",
            here=here,
            hosts={"edge": edge.host, "cloud": cloud.host},
            versions={"edge": edge.versions, "cloud": cloud.versions},
            differing_config=different,
            differing_versions=agreement.differing_keys(edge.versions, cloud.versions),
            link=figures,
            forecast=None if different else forecast_link(config, table_for, figures),
        )
        conclude(wire, report.figures())
    return report


def _hello(config: TrainConfig, table_for: TableSource, site: Site) -> dict[str, Any]:
    table = table_for(config.num_microbatches, False)
    return {
        "format": FORMAT,
        "site": str(site),
        "host": socket.gethostname(),
        "versions": installed_versions(),
        "config": {**shared_fingerprint(config), **agreement.fingerprint("schedule", table)},
    }


def _facts(hello: dict[str, Any], wire: Wire) -> SiteFacts:
    try:
        return SiteFacts.model_validate_json(json.dumps(hello))
    except ValidationError as error:
        raise LdtError(
            f"what {wire.peer} says of itself is not as it should be ({error.error_count()} places); install the same "
            "ldt-schedules on both sites"
        ) from None
