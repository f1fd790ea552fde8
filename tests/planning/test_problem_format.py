"""Files of problems: what is written is read back, and every mistake is told with its place and the number needed."""

from __future__ import annotations

import json
import random

import pytest

from ldt_schedules.planning import Costs, Kind, Layout, ScheduleError, Stage
from ldt_schedules.planning.costs import Link
from ldt_schedules.planning.formats import problem_json
from ldt_schedules.planning.formats.problem_json import dumps, loads
from ldt_schedules.planning.problem import Problem
from tests.planning.random_problems import random_costs, random_layout, with_domain_of

KINDS = (Kind.F, Kind.B, Kind.I, Kind.W)


def facts(problem):
    """Everything a planner can ask a problem."""
    layout, costs, microbatches = problem.layout, problem.costs, problem.num_microbatches
    stages, ranks = range(len(layout.stages)), range(layout.num_ranks)
    return {
        "stages": [(s.name, s.ranks, set(s.inputs)) for s in layout.stages],
        "ranks": layout.num_ranks,
        "where": [[layout.rank_of(s, m) for m in range(microbatches)] for s in stages],
        "domains": [layout.domain(m) for m in range(microbatches)],
        "times": [
            [costs.time(kind, s, m) for m in range(microbatches)] if costs.can(kind, s) else None
            for kind in KINDS
            for s in stages
        ],
        "memory": [(costs.held(s), costs.held_after_input_grad(s)) for s in stages],
        "links": [costs.link(a, b) for a in ranks for b in ranks if a != b],
        "sizes": [
            (costs.size(source, s.index, True), costs.size(source, s.index, False))
            for s in layout.stages
            for source in sorted(s.inputs)
        ],
        "caps": [problem.cap(rank) for rank in ranks],
    }


@pytest.mark.parametrize("seed", range(200))
def test_a_problem_is_read_as_it_was_written(seed):
    rng = random.Random(seed)
    microbatches = rng.randint(1, 5)
    layout = rng.choice((with_domain_of(rng, random_layout(rng), microbatches), Layout.u(3, 2), Layout.laps(2, 2)))
    costs = random_costs(rng, layout, microbatches, wires=True)
    enough = [float(sum(costs.held(s) for s in layout.stages_on(rank))) for rank in range(layout.num_ranks)]
    caps = tuple(rng.choice((None, cap, cap + 1.5)) for cap in enough) if rng.random() < 0.7 else ()
    problem = Problem(layout, microbatches, costs, caps)
    if len(layout.stages) > 1 and not any(stage.inputs for stage in layout.stages):
        with pytest.raises(ScheduleError, match="not connected"):
            dumps(problem)
        return
    again = loads(dumps(problem))
    assert facts(again) == facts(problem)
    assert dumps(again) == dumps(problem)


def test_costs_that_are_one_number_for_all_stages_are_written_out():
    problem = Problem(Layout.u(2), 3, Costs(latency=4, bandwidth=2.5))
    assert facts(loads(dumps(problem))) == facts(problem)


def test_a_stage_that_can_only_split_its_backward_and_one_that_cannot():
    costs = Costs(backward=(None, 2.0, 2.0), input_grad=(1.0, None, 1.0), weight_grad=(1.5, None, 1.0))
    problem = Problem(Layout.u(2), 2, costs)
    again = loads(dumps(problem))
    assert facts(again) == facts(problem)
    assert not again.can_fuse and again.can_split


GOOD = {
    "format": "ldt-problem/1",
    "ranks": 2,
    "microbatches": 3,
    "stages": [
        {"rank": 0, "f": 1, "b": 2},
        {"rank": 1, "f": 2, "i": 2, "w": 2, "mem": 1},
        {"rank": 0, "f": 1, "b": 2},
    ],
    "links": [{"src": 0, "dst": 1, "latency": 3, "bandwidth": 10}],
}


def altered(stage=None, drop=None, **changes):
    """The good problem with other keys, and with other keys (or without some) in one of its stages."""
    content = json.loads(json.dumps(GOOD))
    for key in ("f", "b", "i", "w", "mem", "mem_w", "rank", "x"):
        if stage is not None and key in changes:
            content["stages"][stage][key] = changes.pop(key)
    for key in drop or ():
        (content if stage is None else content["stages"][stage]).pop(key)
    return json.dumps(content | changes)


def linked(**link):
    return altered(links=[{"src": 0, "dst": 1, **link}])


def test_the_documented_defaults():
    problem = loads(json.dumps(GOOD))
    assert [stage.inputs for stage in problem.layout.stages] == [(), (0,), (1,)]
    assert [problem.costs.held(s) for s in range(3)] == [1, 1, 1]
    assert problem.costs.held_after_input_grad(1) == 1
    assert problem.costs.link(1, 0) == Link() and problem.costs.link(0, 1) == Link(3, 10)
    assert problem.costs.size(0, 1, True) == 1
    assert problem.cap(0) == float("inf")
    assert not problem.costs.can(Kind.I, 0) and not problem.costs.can(Kind.B, 1)
    with_links = loads(altered(links=[], default_link={"latency": 2}, fwd_size=3, edges=[[0, 1, 5, 6], [1, 2]]))
    assert with_links.costs.link(1, 0) == Link(2)
    assert [with_links.costs.size(*e) for e in ((0, 1, True), (0, 1, False), (1, 2, True))] == [5, 6, 3]


def test_the_example_of_the_documentation_can_be_read():
    text = problem_json.__doc__.split("JSON.\n\n")[1].split("\n\n")[0]
    assert loads(text).cap(1) == 4


BAD = {
    "memory below one microbatch": (
        altered(mem_cap=[1.5, None]),
        ["rank 0 may hold 1.5", "needs 2 there", "stage 0 1", "stage 2 1", "at least 2"],
    ),
    "memory below one stage": (altered(stage=1, mem=6, mem_cap=[None, 4]), ["rank 1 may hold 4", "needs 6"]),
    "negative memory": (altered(mem_cap=[-1, None]), ["rank 0", "0 or more, got -1"]),
    "a cycle": (altered(edges=[[0, 1], [1, 2], [2, 1]]), ["stages [1, 2] wait for each other", "cycle"]),
    "a stage that feeds itself": (altered(edges=[[0, 1], [1, 1], [1, 2]]), ["stages [1, 2] wait"]),
    "no such rank": (altered(stage=1, rank=2), ["stage 1 stands on rank 2, which does not exist", "0..1"]),
    "a negative rank": (altered(stage=1, rank=-1), ["stage 1 stands on rank -1"]),
    "half a rank": (altered(stage=1, rank=0.5), ['stage 1: "rank" is 0.5']),
    "no rank": (altered(stage=1, drop=["rank"]), ['stage 1: "rank" is missing']),
    "negative forward": (altered(stage=2, f=-1), ['stage 2: "f" is -1', "0 or more"]),
    "negative backward": (altered(stage=0, b=-0.5), ['stage 0: "b" is -0.5']),
    "negative for one microbatch": (altered(stage=0, f=[1, -2, 1]), ['stage 0: "f" is -2']),
    "negative mem": (altered(stage=0, mem=-2), ['stage 0: "mem" is -2']),
    "more stays than is held": (altered(stage=1, mem=2, mem_w=3), ["stage 1 holds 2, so 3 cannot stay"]),
    "not a number": (altered(stage=1, f="fast"), ["stage 1: \"f\" is 'fast'", "expected a number"]),
    "more digits than a float has": (altered(stage=1, f=10**400), ['stage 1: "f" is 1000', "expected a number"]),
    "true is no number": (altered(stage=1, f=True), ['stage 1: "f" is True']),
    "not finite, with its stage": (altered().replace('"f": 2', '"f": Infinity'), ["stage 1"]),
    "no forward": (altered(stage=1, drop=["f"]), ['stage 1: "f" is missing']),
    "no backward": (altered(stage=2, drop=["b"]), ["stage 2 has no cost for its backward", "give b, or i and w"]),
    "i without w": (altered(stage=1, drop=["w"]), ["stage 1 has only one of i and w"]),
    "w without i, with b": (altered(stage=0, w=1), ["stage 0 has only one of i and w"]),
    "no bandwidth": (linked(bandwidth=0), ["link 0 -> 1", "bandwidth", "more than 0, got 0"]),
    "negative bandwidth": (linked(bandwidth=-3), ["link 0 -> 1", "more than 0, got -3"]),
    "negative latency": (linked(latency=-1), ["link 0 -> 1", "0 or more, got -1"]),
    "a link to nowhere": (altered(links=[{"src": 0, "dst": 5}]), ["rank 0 to rank 5", "0..1"]),
    "a link without an end": (altered(links=[{"src": 0}]), ["link 0 -> None", '"dst" is missing']),
    "a link that is none": (altered(links=[3]), ["a link is an object", "got 3"]),
    "links that are no list": (altered(links=3), ['"links"', "3"]),
    "a default link that is none": (altered(default_link=3), ['"default_link"', "3"]),
    "a resource that is no text": (linked(bandwidth=1, resource=["a"]), ["link 0 -> 1", '"resource"']),
    "an edge twice": (altered(edges=[[0, 1], [0, 1], [1, 2]]), ["stage 1", "stage 0", "twice"]),
    "a cap that is not finite": (altered(mem_cap=[1, None]).replace("[1,", "[NaN,"), ["rank 0", "nan"]),
    "an unknown key of a link": (linked(speed=3), ["'speed'", "src, dst, latency, bandwidth"]),
    "no bandwidth by default": (altered(default_link={"bandwidth": 0}), ["bandwidth", "got 0"]),
    "too many times": (altered(stage=0, f=[1, 1]), ['stage 0: "f" has 2 numbers for 3 microbatches']),
    "too few caps": (altered(mem_cap=[4]), ["mem_cap has 1 entries for 2 ranks"]),
    "a cap that is no number": (altered(mem_cap=["4", None]), ["mem_cap of rank 0 is '4'"]),
    "caps that are no list": (altered(mem_cap=4), ['"mem_cap" is 4', "a list"]),
    "too few domains": (altered(stage=1, rank=[0, 1], domains=2, domain_of=[1]), ["1 entries for 3 microbatches"]),
    "no such domain": (
        altered(stage=1, rank=[0, 1], domains=2, domain_of=[0, 1, 2]),
        ["microbatch 2 is of domain 2", "0..1"],
    ),
    "ranks for other domains": (altered(stage=1, rank=[0, 1], domains=3), ["stage 1 stands on 2 ranks", "3 domains"]),
    "domains that are no list": (altered(stage=1, rank=[0, 1], domain_of=1), ['"domain_of"', "a list"]),
    "domains that are no number": (altered(stage=1, rank=[0, 1], domains="two"), ['"domains"', "two"]),
    "no such stage": (altered(edges=[[0, 1], [1, 3]]), ["edge [1, 3]", "stages 0..2"]),
    "an edge of three": (altered(edges=[[0, 1, 5], [1, 2]]), ["edge [0, 1, 5]", "forward size, backward size"]),
    "a negative size": (altered(edges=[[0, 1, 5, -5], [1, 2]]), ["edge [0, 1]", "-5"]),
    "a negative size for all": (altered(fwd_size=-1), ["fwd_size is -1"]),
    "edges that are no list": (altered(edges=7), ['"edges"', "7"]),
    "an unknown key": (altered(latency=3), ["unknown key 'latency'"]),
    "an unknown key of a stage": (altered(stage=1, x=3), ["stage 1", "'x'"]),
    "a stage that is none": (altered(stages=[1]), ["stage 0", "got 1"]),
    "no stages": (altered(stages=[]), ["at least one stage"]),
    "stages that are no list": (altered(stages={}), ['"stages"', "a list"]),
    "no microbatches": (altered(drop=["microbatches"]), ['"microbatches" is missing']),
    "0 microbatches": (altered(microbatches=0), ['"microbatches" is 0', "at least 1"]),
    "0 ranks": (altered(ranks=0), ['"ranks" is 0', "at least 1"]),
    "another format": (altered(format="ldt-table/1"), ["this is no problem", "ldt-table/1", "ldt-problem/1"]),
    "not JSON": ("ranks: 2", ["line 1, column 1"]),
    "a list": ("[]", ["one JSON object"]),
    "empty": ("", ["line 1"]),
    "cut off": (altered()[:80], ["cut off"]),
    "a key that stands twice": ('{"ranks": 2, "ranks": 3}', ["'ranks' stands twice"]),
}


@pytest.mark.parametrize("what", BAD)
def test_a_mistake_is_told_with_its_place(what):
    text, said = BAD[what]
    with pytest.raises(ScheduleError) as caught:
        loads(text)
    for part in said:
        assert part in str(caught.value), part


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"costs": Costs(forward=(1.0, 1.0))}, "forward gives 2 numbers, but the layout has 3 stages"),
        ({"costs": Costs(forward=(1.0, None, 1.0))}, "stage 1 has no cost for its forward"),
        ({"costs": Costs(backward=None, input_grad=None, weight_grad=None)}, "stage 0 has no cost for its backward"),
        ({"costs": Costs(forward=((1.0,), 1.0, 1.0))}, "forward of stage 0 gives 1 numbers for 2 microbatches"),
        ({"memory_cap": (5.0,)}, "mem_cap has 1 entries for 2 ranks"),
        ({"memory_cap": (1.0, None)}, "give rank 0 at least 2"),
        ({"memory_cap": (float("nan"), None)}, "memory of rank 0 must be 0 or more, got nan"),
        ({"num_microbatches": 0}, "at least 1 microbatch, got 0"),
    ],
)
def test_what_does_not_fit_together_is_refused_without_a_file_too(arguments, said):
    with pytest.raises(ScheduleError) as caught:
        Problem(**{"layout": Layout.u(2), "num_microbatches": 2, **arguments})
    assert said in str(caught.value)


@pytest.mark.parametrize("make", [lambda: Costs(forward=-1.0), lambda: Costs(latency=float("inf")), lambda: Link(-1.0)])
def test_times_are_finite_and_not_negative(make):
    with pytest.raises(ScheduleError, match="of 0 or more"):
        make()


def stage(index, rank, *inputs):
    return Stage(index, f"s{index}", (rank,), inputs)


def test_the_least_memory_of_a_rank_is_what_a_single_microbatch_holds_at_its_peak():
    # A chain that comes back: the first is held while the second runs.
    assert least_cap(Layout.u(2), 0) == 2
    # The two last stages need not be held together.
    assert least_cap(Layout((stage(0, 0), stage(1, 1, 0), stage(2, 1, 0))), 1) == 1
    # What joins needs both at once, though it stands elsewhere itself.
    assert least_cap(Layout((stage(0, 0), stage(1, 0), stage(2, 1, 0, 1))), 0) == 2


def least_cap(layout, rank):
    for cap in range(5):
        try:
            Problem(layout, 2, memory_cap=tuple(cap if r == rank else None for r in range(layout.num_ranks)))
        except ScheduleError:
            continue
        return cap
    raise AssertionError


def test_a_rank_whose_domain_has_no_microbatch_needs_no_memory():
    problem = Problem(Layout.u(2, domains=2), 1, memory_cap=(2.0, 1.0, 0.0))
    assert problem.cap(2) == 0
