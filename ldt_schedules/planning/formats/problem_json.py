"""The file format of a scheduling problem, `ldt-problem/1`: JSON.

{"format": "ldt-problem/1", "ranks": 2, "microbatches": 8,
 "stages": [{"rank": 0, "f": 1, "b": 2}, {"rank": 1, "f": 2, "i": 2, "w": 2, "mem": 1}, {"rank": 0, "f": 1, "b": 2}],
 "links": [{"src": 0, "dst": 1, "latency": 3, "bandwidth": 10}], "mem_cap": [null, 4]}

ranks, microbatches   how many
stages                one object each, the stage's number is its position: `rank` (or one for each domain), `f`, and
                      `b` or `i` and `w` or all three (a number, or one for each microbatch), `mem` (held from the
                      start of F, default 1), `mem_w` (what stays between I and W, default `mem`), `name`, `frozen`
                      (true: no parameter of it is trained; where nothing that feeds it is trained either, it has no
                      backward, needs no `b`, `i`, `w` and holds nothing)
edges                 [u, v] or [u, v, forward size, backward size]; without any the chain 0, 1, 2, …
domains, domain_of    microbatch k is of domain `domain_of[k]`, by default k mod `domains`
links                 `src`, `dst`, `latency`, `bandwidth` (null: no limit), `resource` (links that share one wire)
default_link          `latency`, `bandwidth` of all other links; default: free
fwd_size, bwd_size    of the messages; default 1
mem_cap               for each rank a number or null; default: no limit
"""

from __future__ import annotations

import json
import math
from typing import Any

from ldt_schedules.planning.costs import Costs, Link, PerMicrobatch
from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.formats.json_object import expect_keys, get, number_of, parse_object, yes_or_no
from ldt_schedules.planning.layout import Layout, Stage
from ldt_schedules.planning.problem import Problem

FORMAT = "ldt-problem/1"
_KEYS = (
    "format", "name", "ranks", "microbatches", "stages", "edges", "domains", "domain_of", "links", "default_link",
    "fwd_size", "bwd_size", "mem_cap",
)  # fmt: skip
_STAGE_KEYS = ("rank", "f", "b", "i", "w", "mem", "mem_w", "name", "frozen")
_LINK_KEYS = ("src", "dst", "latency", "bandwidth", "resource")


def loads(text: str) -> Problem:
    """Read a problem.

    Raises:
        ScheduleError: not JSON, a missing or unknown key, a wrong type, or a problem that cannot be met.
    """
    content = parse_object(text)
    expect_keys(content, _KEYS, "a problem")
    if content.get("format", FORMAT) != FORMAT:
        raise ScheduleError(f'this is no problem: "format" is {content["format"]!r}, expected "{FORMAT}"')
    ranks, microbatches = _count(content, "ranks"), _count(content, "microbatches")
    stages = get(content, "stages", list)
    for number, stage in enumerate(stages):
        if not isinstance(stage, dict):
            raise ScheduleError(f"stage {number}: expected an object, got {stage!r}")
        expect_keys(stage, _STAGE_KEYS, f"stage {number}")
        for key in ("rank", "f"):
            if key not in stage:
                raise ScheduleError(f'stage {number}: "{key}" is missing')
    edges = _edges(content, len(stages))
    if "domains" in content:
        _count(content, "domains")
    layout = Layout(_stages(stages, edges, content.get("domains")), ranks, _domain_of(content))
    caps = _list(content, "mem_cap", [])
    memory_cap = tuple(None if cap is None else number_of(cap, f"mem_cap of rank {r}") for r, cap in enumerate(caps))
    return Problem(layout, microbatches, _costs(content, stages, edges, microbatches), memory_cap)


def dumps(problem: Problem) -> str:
    """The problem as text; `loads(dumps(problem))` has the same stages, costs and caps.

    Raises:
        ScheduleError: several stages and no edge at all, which the format takes for a chain.
    """
    costs, layout = problem.costs, problem.layout
    if len(layout.stages) > 1 and not any(stage.inputs for stage in layout.stages):
        raise ScheduleError(f"the {len(layout.stages)} stages are not connected; a problem's file has no way to say so")
    content: dict[str, Any] = {"format": FORMAT, "ranks": layout.num_ranks, "microbatches": problem.num_microbatches}
    if layout.num_domains > 1:
        content["domains"] = layout.num_domains
        content["domain_of"] = [layout.domain(m) for m in range(problem.num_microbatches)]
    content["stages"] = [_stage_content(costs, stage) for stage in layout.stages]
    content["edges"] = [
        [source, stage.index, costs.size(source, stage.index, True), costs.size(source, stage.index, False)]
        for stage in layout.stages
        for source in stage.inputs
    ]
    content["links"] = [
        {"src": a, "dst": b, **_link_content(costs.link(a, b))}
        for a in range(layout.num_ranks)
        for b in range(layout.num_ranks)
        if a != b and costs.link(a, b) != Link()
    ]
    if problem.memory_cap:
        content["mem_cap"] = list(problem.memory_cap)
    return json.dumps(content, indent=1) + "\n"


def _stage_content(costs: Costs, stage: Stage) -> dict[str, Any]:
    keys = {"f": costs.forward, "b": costs.backward, "i": costs.input_grad, "w": costs.weight_grad}
    content: dict[str, Any] = {"rank": stage.ranks[0] if len(stage.ranks) == 1 else list(stage.ranks)}
    for key, value in keys.items():
        time = value[stage.index] if isinstance(value, tuple) else value
        if time is not None:
            content[key] = list(time) if isinstance(time, tuple) else time
    content["mem"] = costs.held(stage.index)
    content["mem_w"] = costs.held_after_input_grad(stage.index)
    content["name"] = stage.name
    if stage.frozen:
        content["frozen"] = True
    return content


def _link_content(link: Link) -> dict[str, Any]:
    shared = {"resource": link.resource} if link.resource else {}
    return {"latency": link.latency, "bandwidth": link.bandwidth, **shared}


def _count(content: dict[str, Any], key: str) -> int:
    value: int = get(content, key, int)
    if value < 1:
        raise ScheduleError(f'"{key}" is {value}; there must be at least 1')
    return value


def _numbers(entry: dict[str, Any], key: str, stage: int, microbatches: int) -> PerMicrobatch:
    value = entry.get(key)
    if isinstance(value, list):
        if len(value) != microbatches:
            raise ScheduleError(f'stage {stage}: "{key}" has {len(value)} numbers for {microbatches} microbatches')
        return tuple(_time(x, f'stage {stage}: "{key}"') for x in value)
    return None if value is None else _time(value, f'stage {stage}: "{key}"')


def _time(value: object, what: str) -> float:
    number = number_of(value, what)
    if number < 0 or not math.isfinite(number):
        raise ScheduleError(f"{what} is {number:g}; it must be a finite number of 0 or more")
    return number


def _costs(content: dict[str, Any], stages: list[dict[str, Any]], edges: list[list[Any]], microbatches: int) -> Costs:
    def times(key: str) -> tuple[PerMicrobatch, ...]:
        return tuple(_numbers(stage, key, s, microbatches) for s, stage in enumerate(stages))

    def memory(key: str, default: float | None) -> tuple[float | None, ...]:
        return tuple(
            default if stage.get(key) is None else _time(stage[key], f'stage {s}: "{key}"')
            for s, stage in enumerate(stages)
        )

    default = content.get("default_link") or {}
    if not isinstance(default, dict):
        raise ScheduleError(f'"default_link" is {default!r}; expected an object')
    return Costs(
        forward=times("f"),
        backward=times("b"),
        input_grad=times("i"),
        weight_grad=times("w"),
        memory=memory("mem", 1.0),
        memory_w=memory("mem_w", None),
        links=tuple(_link(link) for link in _list(content, "links", [])),
        default_link=_link({"src": 0, "dst": 0, **default})[2],
        forward_size=_time(content.get("fwd_size", 1), "fwd_size"),
        backward_size=_time(content.get("bwd_size", 1), "bwd_size"),
        sizes=tuple((u, v, sizes[0], sizes[1]) for u, v, *sizes in edges if sizes),
    )


def _link(entry: object) -> tuple[int, int, Link]:
    if not isinstance(entry, dict):
        raise ScheduleError(f"a link is an object with src, dst, latency, bandwidth; got {entry!r}")
    expect_keys(entry, _LINK_KEYS, "a link")
    where = f"the link {entry.get('src')} -> {entry.get('dst')}"
    bandwidth = entry.get("bandwidth")
    try:
        link = Link(
            latency=number_of(entry.get("latency") or 0, "latency"),
            bandwidth=None if bandwidth is None else number_of(bandwidth, "bandwidth"),
            resource=entry.get("resource"),
        )
        if link.resource is not None and not isinstance(link.resource, str):
            raise ScheduleError(f'"resource" is {link.resource!r}; expected a name')
        return get(entry, "src", int), get(entry, "dst", int), link
    except ScheduleError as error:
        raise ScheduleError(f"{where}: {error}") from None


def _edges(content: dict[str, Any], num_stages: int) -> list[list[Any]]:
    edges = _list(content, "edges", []) or [[s, s + 1] for s in range(num_stages - 1)]
    for edge in edges:
        if not isinstance(edge, list) or len(edge) not in (2, 4) or not all(_is_stage(s, num_stages) for s in edge[:2]):
            raise ScheduleError(
                f"edge {edge!r}: expected [u, v] or [u, v, forward size, backward size] with stages 0..{num_stages - 1}"
            )
        for size in edge[2:]:
            _time(size, f"the size of edge {edge[:2]}")
    twice = [edge[:2] for n, edge in enumerate(edges) if edge[:2] in [other[:2] for other in edges[:n]]]
    if twice:
        raise ScheduleError(f"the edge from stage {twice[0][0]} to stage {twice[0][1]} stands twice")
    return edges


def _list(content: dict[str, Any], key: str, default: list[Any]) -> list[Any]:
    """The list under a key; null is as good as nothing."""
    value = content.get(key)
    if value is None:
        return default
    if not isinstance(value, list):
        raise ScheduleError(f'"{key}" is {value!r}; expected a list')
    return value


def _is_stage(value: object, num_stages: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < num_stages


def _stages(stages: list[dict[str, Any]], edges: list[list[Any]], domains: object) -> tuple[Stage, ...]:
    made = []
    for number, stage in enumerate(stages):
        rank = stage["rank"]
        ranks = tuple(rank) if isinstance(rank, list) else (rank,)
        if any(isinstance(r, bool) or not isinstance(r, int) for r in ranks):
            raise ScheduleError(f'stage {number}: "rank" is {rank!r}; expected whole numbers from 0')
        if isinstance(domains, int) and len(ranks) not in (1, domains):
            raise ScheduleError(f"stage {number} stands on {len(ranks)} ranks, but there are {domains} domains")
        inputs = tuple(u for u, v, *_ in edges if v == number)
        name, frozen = str(stage.get("name", f"stage{number}")), yes_or_no(stage, "frozen", f"stage {number}: ")
        made.append(Stage(number, name, ranks, inputs, frozen=frozen))
    return tuple(made)


def _domain_of(content: dict[str, Any]) -> tuple[int, ...]:
    given = _list(content, "domain_of", [])
    if any(isinstance(d, bool) or not isinstance(d, int) for d in given):
        raise ScheduleError('"domain_of" must be a list with a whole number for each microbatch')
    domains = content.get("domains") or 1
    usual = all(domain == m % domains for m, domain in enumerate(given))
    matters = any(isinstance(stage["rank"], list) for stage in content["stages"])
    return tuple(given) if matters and not usual else ()
