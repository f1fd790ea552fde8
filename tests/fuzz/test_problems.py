"""Problems of `ldt plan`, with the costs in them: a named error, or a problem that can be written and read again."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldt_schedules.cli import problem_input
from ldt_schedules.planning.formats import problem_json
from tests.fuzz.mutations import as_text, broken_bytes, broken_text, broken_value, everything_once
from tests.fuzz.reading import inputs, read, seeds, show

EXAMPLE = {
    "format": "ldt-problem/1", "name": "example", "ranks": 3, "microbatches": 3, "domains": 2, "domain_of": [0, 1, 1],
    "stages": [
        {"rank": 0, "f": 1, "b": 2, "frozen": True, "name": "head"},
        {"rank": [1, 2], "f": [2, 3, 1], "i": 2, "w": 2, "mem": 1, "mem_w": 0.5},
        {"rank": 0, "f": 1, "b": 2, "i": 1, "w": 1},
    ],
    "edges": [[0, 1, 2, 1], [1, 2]],
    "links": [{"src": 0, "dst": 1, "latency": 3, "bandwidth": 10, "resource": "wan"}, {"src": 1, "dst": 0, "bandwidth": None}],
    "default_link": {"latency": 0, "bandwidth": 5},
    "fwd_size": 1, "bwd_size": 0.5, "mem_cap": [None, 4, 8],
}  # fmt: skip


@cache
def text() -> str:
    return as_text(EXAMPLE)


def judge(given_text: str) -> None:
    show(given_text)
    problem = read(problem_json.loads, given_text)
    if problem is None:
        return
    written = read(problem_json.dumps, problem)
    if written is None:
        return
    again = problem_json.loads(written)
    assert problem_json.dumps(again) == written
    assert again.layout.same_work(problem.layout) and again.num_microbatches == problem.num_microbatches
    assert [again.cap(r) for r in range(again.layout.num_ranks)] == [
        problem.cap(r) for r in range(problem.layout.num_ranks)
    ]


def test_the_good_one_is_accepted() -> None:
    judge(text())
    assert problem_json.loads(text()).num_microbatches == 3


def test_every_type_at_every_place() -> None:
    for value in everything_once(EXAMPLE):
        judge(as_text(value))


@inputs(900)
@given(seeds)
def test_problems_with_slips(seed: int) -> None:
    rng = random.Random(seed)
    judge(as_text(broken_value(EXAMPLE, rng)) if rng.random() < 0.6 else broken_text(text(), rng))


@inputs(200)
@given(st.text(max_size=60))
def test_any_text(given_text: str) -> None:
    judge(given_text)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("problems") / "problem.json"


@inputs(300)
@given(seed=seeds)
def test_files_with_bad_bytes(file: Path, seed: int) -> None:
    rng = random.Random(seed)
    file.write_bytes(rng.randbytes(50) if rng.random() < 0.2 else broken_bytes(json.dumps(EXAMPLE).encode(), rng))
    read(problem_input.from_file, file)


@inputs(200)
@given(
    st.one_of(st.none(), st.integers(-2, 4), st.just(10**9)), st.one_of(st.none(), st.integers(-2, 4), st.just(10**12)),
    st.one_of(st.integers(-1, 3), st.just(10**9)), st.one_of(st.integers(-1, 3), st.just(10**9)),
    st.floats(), st.one_of(st.none(), st.floats()), st.floats(), st.floats(), st.one_of(st.none(), st.text(max_size=5)),
)  # fmt: skip
def test_numbers_of_the_command_line(
    ranks: int | None, microbatches: int | None, domains: int, laps: int, latency: float, bandwidth: float | None,
    backward: float, cloud: float, freeze: str | None,
) -> None:  # fmt: skip
    read(problem_input.from_numbers, ranks, microbatches, domains, laps, latency, bandwidth, backward, cloud, freeze)
