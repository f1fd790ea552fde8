"""Dealing samples so that image work is balanced, against every possible deal of small batches."""

from __future__ import annotations

import itertools
import random
from functools import lru_cache

import pytest

from ldt_schedules.training.image_text.dealing import Deal, cost, encoder_dp_balance, given_order

STATED_FACTOR = 1.25
"""How far from the optimum a deal of several samples a slot may be; of one it is the optimum."""


def optimum(loads: tuple[int, ...], replicas: int, microbatches: int) -> int:
    """The least cost of all deals, by trying each set of samples for each microbatch and slot."""
    size = len(loads) // (replicas * microbatches)

    @lru_cache(None)
    def slots(places: tuple[int, ...]) -> int:
        if not places:
            return 0
        first, others = places[0], places[1:]
        chosen = (
            (loads[first] + sum(loads[i] for i in more), more) for more in itertools.combinations(others, size - 1)
        )
        return min(max(load, slots(tuple(i for i in others if i not in more))) for load, more in chosen)

    @lru_cache(None)
    def rest(places: tuple[int, ...]) -> int:
        if not places:
            return 0
        first, others = places[0], places[1:]
        sets = itertools.combinations(others, replicas * size - 1)
        return min(slots((first, *more)) + rest(tuple(i for i in others if i not in more)) for more in sets)

    return rest(tuple(range(len(loads))))


def check_deal(deal: Deal, loads: tuple[int, ...], replicas: int, microbatches: int) -> None:
    size = len(loads) // (replicas * microbatches)
    assert len(deal) == microbatches
    assert all(len(microbatch) == replicas for microbatch in deal)
    assert all(len(slot) == size for microbatch in deal for slot in microbatch)
    assert sorted(place for microbatch in deal for slot in microbatch for place in slot) == list(range(len(loads)))
    assert cost(deal, loads) <= cost(given_order(len(loads), replicas, microbatches), loads)
    assert deal == encoder_dp_balance(loads, replicas, microbatches)


SHAPES = [(1, 2, 2), (2, 1, 1), (2, 2, 1), (3, 2, 1), (2, 3, 1), (2, 1, 2), (2, 2, 2), (3, 1, 2), (2, 1, 3), (4, 1, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_multiset_of_loads_against_the_optimum(shape: tuple[int, int, int]) -> None:
    replicas, microbatches, size = shape
    count = replicas * microbatches * size
    for sorted_loads in itertools.combinations_with_replacement(
        (0, 1, 2, 3, 5, 8) if count <= 6 else (0, 1, 3, 7), count
    ):
        loads = sorted_loads[1::2] + sorted_loads[::2]
        deal = encoder_dp_balance(loads, replicas, microbatches)
        check_deal(deal, loads, replicas, microbatches)
        best = optimum(loads, replicas, microbatches)
        factor = 1 if size == 1 or microbatches == 1 else STATED_FACTOR
        assert best <= cost(deal, loads) <= factor * best, loads


@pytest.mark.parametrize("seed", range(20))
def test_large_batches_come_close_to_the_mean(seed: int) -> None:
    random_loads = random.Random(seed)
    replicas, microbatches, size = random_loads.choice([(2, 8, 4), (4, 8, 2), (8, 4, 4), (3, 5, 3)])
    loads = tuple(
        random_loads.choice([0, random_loads.randint(50, 4000)]) for _ in range(replicas * microbatches * size)
    )
    deal = encoder_dp_balance(loads, replicas, microbatches)
    check_deal(deal, loads, replicas, microbatches)
    assert cost(deal, loads) <= 1.1 * sum(loads) / replicas + 1


def test_equal_loads_stay_in_the_order_given() -> None:
    for load in (0, 7):
        assert encoder_dp_balance([load] * 12, 2, 3) == given_order(12, 2, 3)
    assert given_order(12, 2, 3) == (((0, 1), (2, 3)), ((4, 5), (6, 7)), ((8, 9), (10, 11)))


def test_one_replica_keeps_its_order() -> None:
    assert encoder_dp_balance([5, 0, 9, 1], 1, 2) == given_order(4, 1, 2)
