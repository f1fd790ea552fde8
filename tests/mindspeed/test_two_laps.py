"""Three chunks on each rank, called as MindSpeed-MM's trainer calls them, give the gradients of one process."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from ldt_schedules.topology import Site
from tests.helpers.workers import site_ports
from tests.mindspeed.two_laps import Case, misfit, train_rank
from tests.parity.compare import relative_error

FLOAT32, FLOAT64 = 5e-6, 1e-12


def run(workers: Any, case: Case) -> list[dict[str, Any]]:
    ports = site_ports()
    return workers.run(train_rank, [(case, place.global_rank, ports) for place in case.topology.places()], bare=True)


_one_process: dict[Case, dict[str, Any]] = {}


def one_process(workers: Any, whole: Case) -> dict[str, Any]:
    """Run once and remembered."""
    if whole not in _one_process:
        (_one_process[whole],) = run(workers, whole)
    return _one_process[whole]


def check(workers: Any, case: Case) -> list[dict[str, Any]]:
    """Every gradient, every report and every evaluation of the split model against one process."""
    ranks, whole = run(workers, case), one_process(workers, case.whole())
    tolerance = FLOAT64 if case.double else FLOAT32
    names: set[str] = set()
    for place, rank in zip(case.topology.places(), ranks, strict=True):
        names |= set(rank["gradients"])
        for name, gradient in rank["gradients"].items():
            assert np.abs(gradient).max() > 0, f"{place}: {name} has no gradient"
            error = relative_error(gradient, whole["gradients"][name])
            assert error <= tolerance, f"{place}: the gradient of {name} differs by {error:.2e}"
    assert names == set(whole["gradients"])
    edges = [rank for place, rank in zip(case.topology.places(), ranks, strict=True) if place.site is Site.EDGE]
    for kind in ("reports", "evaluation"):
        assert all(rank[kind] == [] for rank in ranks[len(edges) :]), "a cloud process reported a loss"
        # Replica d of D holds microbatches d, d + D, …
        mine = list(itertools.chain(*zip(*(edge[kind]["loss"] for edge in edges), strict=True)))
        assert len(mine) == case.num_microbatches * case.replicas
        np.testing.assert_allclose(mine, whole[kind]["loss"], rtol=tolerance)
    return ranks


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize(("num_microbatches", "per_token"), [(1, False), (5, True)])
def test_gradients_equal_one_process(workers, num_ranks, num_microbatches, per_token):
    check(workers, Case(num_ranks, num_microbatches, per_token=per_token))


def test_what_differs_in_float32_is_rounding(workers):
    check(workers, Case(3, 4, double=True))


@pytest.mark.parametrize("functions", [("no_sync_func",), ("no_sync_func", "grad_sync_func")])
def test_two_replicas_reduce_each_chunk_once(workers, functions):
    """Lists of one function for each chunk; with `grad_sync_func` the cloud reduces after its last backward."""
    check(workers, Case(2, 3, replicas=2, overlap=True, functions=functions))


def test_param_sync_and_virtual_ranks(workers):
    """The virtual rank is that of the chunk that runs, all chunks are finalized together, the empty one never runs."""
    ranks = check(workers, Case(3, 2))
    for rank in ranks:
        assert rank["finalized"] == [[True, True, True]], "all chunks, in their order, once a training step"
        assert rank["virtual"] and all(virtual == chunk for virtual, chunk in rank["virtual"])
    assert {chunk for _, chunk in ranks[0]["virtual"]} == {0, 1, 2}
    assert {chunk for _, chunk in ranks[1]["virtual"]} == {0, 1}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("two chunks", "a U of 2 laps holds 3 chunks, got a list of 2 model chunks"),
        ("one lap", "a site of a U holds one wrapped module, got a list of 3 model chunks"),
        ("shared weight", "model chunk 2 shares a parameter with an earlier one"),
        ("short list", "no_sync_func is a list of 1 functions for 3 model chunks"),
    ],
)
def test_what_does_not_fit_the_layout_is_refused(workers, what, message):
    case, ports = Case(2, 1), site_ports()
    assert [
        m for m in workers.run(misfit, [(case, rank, ports, what) for rank in range(2)], bare=True) if message not in m
    ] == []


def test_a_forgotten_finalisation_of_the_second_lap_would_be_seen(workers):
    """Upstream gives the cloud's first chunk alone to finalize_model_grads; with two replicas that must not pass."""
    with pytest.raises(AssertionError, match=r"cloud.*the gradient of block.layers.3"):
        check(workers, Case(2, 2, replicas=2, only_first_chunk=True))
