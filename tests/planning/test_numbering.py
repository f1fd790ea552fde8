"""Numbers say the same as the rule they stand for."""

from __future__ import annotations

import random

import pytest

from ldt_schedules.planning import Action
from ldt_schedules.planning.dependencies import Dataflow
from ldt_schedules.planning.lowering import lower
from ldt_schedules.planning.numbering import Numbering
from tests.planning.random_problems import random_layout, random_order, with_domain_of


@pytest.mark.parametrize("seed", range(40))
def test_families_take_and_make_what_the_rule_says(seed):
    """Each action of a random table, alone and packed with others of its domain."""
    rng = random.Random(seed)
    microbatches = rng.randint(1, 6)
    layout = with_domain_of(rng, random_layout(rng), microbatches)
    numbers = Numbering(Dataflow(layout), microbatches)
    table = lower(layout, microbatches, random_order(rng, layout, microbatches))
    for action in (action for row in table.ranks for action in row):
        mates = [m for m in range(microbatches) if layout.domain(m) == layout.domain(action.microbatches[0])]
        chosen = tuple(rng.sample(mates, rng.randint(1, len(mates))))
        packed = Action(action.kind, action.stage, chosen, action.peer, action.other)
        for one in (action, packed):
            family, first = numbers.family(one), one.microbatches[0]
            assert numbers.families([one]) == [family]
            assert [numbers.value(base + first) for base in family.takes] == numbers.flow.takes(one)
            assert [numbers.value(base + first) for base in family.makes] == numbers.flow.makes(one)
