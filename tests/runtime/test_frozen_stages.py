"""Frozen stages on real gloo processes: what is not needed is neither computed nor sent, and the rest has the same bits."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from ldt_schedules.comm.ports import free_ports
from ldt_schedules.planning import Kind, Layout, Problem, plan, plan_problem, write_table
from ldt_schedules.planning.table import ScheduleTable
from ldt_schedules.runtime.module_stages import ModuleStages, PipelineStage
from tests.runtime import frozen_ranks, graphs

COUNT = 4
BYTES = {m: (graphs.ROWS + m) * graphs.WIDTH * 8 for m in range(COUNT)}
"""Of a message of microbatch m, forward or backward: `graphs.data` has one row more each time."""

ENCODERS = Layout.roots({"vision": 0, "text": 1}, {"join": 2, "middle": 1, "last": 0})
EDGE_ENCODER = Layout.roots({"vision": 0, "audio": 0}, {"head": 0, "cloud": 1, "tail": 0})
CASES = [
    (ENCODERS, (0,)),  # a frozen encoder beside a trained one
    (ENCODERS, (0, 1)),  # nothing is trained before the join
    (ENCODERS, (0, 3)),  # and a frozen stage that passes the gradient on
    (Layout.u(3), (0, 1)),
    (Layout.u(3), (2,)),
    (EDGE_ENCODER, (0,)),  # neighbours on one rank
    (Layout.laps(2, 2), (0, 1)),
]


def run(workers, layout, frozen, planner, absent=False):
    """By rank the outcomes of the same order frozen and not."""
    problem = Problem(layout, COUNT)
    tables = [plan_problem(planner, Problem(one, COUNT, problem.costs)) for one in (layout, layout.freeze(frozen))]
    (port,) = free_ports(1)
    texts = [write_table(table, "json") for table in tables]
    ranks = range(layout.num_ranks)
    results = workers.run(frozen_ranks.run_rank, [(rank, layout.num_ranks, port, texts, absent) for rank in ranks], 90)
    return tables, results


def sends(table: ScheduleTable, rank: int) -> Counter[int]:
    return Counter(action.peer for action in table.ranks[rank] if action.kind.is_send)


def sent_bytes(table: ScheduleTable, rank: int) -> Counter[int]:
    found: Counter[int] = Counter()
    for action in table.ranks[rank]:
        if action.kind.is_send:
            found[action.peer] += BYTES[action.microbatches[0]]
    return found


@pytest.mark.parametrize("planner", ["gpipe", "one_f_one_b"])
@pytest.mark.parametrize(("layout", "frozen"), CASES, ids=str)
def test_the_rest_has_the_gradients_of_the_unfrozen_run_to_the_bit(workers, layout, frozen, planner):
    tables, results = run(workers, layout, frozen, planner)
    trained = set(range(len(layout.stages))) - set(frozen)
    losses = [[loss for outcomes in results for loss in outcomes[which].losses] for which in (0, 1)]
    assert losses[0] == losses[1] and len(losses[0]) == COUNT
    for rank, (plain, froze) in enumerate(results):
        for stage, gradient in froze.gradients.items():
            if stage in trained:
                assert np.array_equal(gradient, plain.gradients[stage])
            else:
                assert gradient is None and plain.gradients[stage] is not None
        for table, outcome in zip(tables, (plain, froze), strict=True):
            assert outcome.messages == sends(table, rank)
            assert outcome.sent_bytes == sent_bytes(table, rank)
        for stage, without_autograd in froze.without_autograd.items():
            assert without_autograd != tables[1].layout.has_backward(stage)


def test_no_gradient_reaches_the_frozen_encoder(workers):
    """Counted by hand: the join sends 4 gradients to text and none to vision, which saves 4 messages and their bytes."""
    _, results = run(workers, ENCODERS, (0,), "gpipe")
    plain, froze = results[2]  # rank 2 has the join, whose output goes to rank 1
    assert plain.messages == {0: COUNT, 1: 2 * COUNT} and froze.messages == {1: 2 * COUNT}
    assert plain.sent_bytes[0] == sum(BYTES.values()) and froze.sent_bytes[0] == 0
    assert froze.sent_bytes[1] == plain.sent_bytes[1]


def test_a_microbatch_without_the_trained_input_needs_no_gradient_at_all(workers):
    """Stage 0 trains and is absent in microbatch 1; stage 1 is frozen, and so is the join: its output then has no graph."""
    layout = ENCODERS
    _, results = run(workers, layout, (1, 2), "gpipe", absent=True)
    for plain, froze in results:
        for stage, gradient in froze.gradients.items():
            if stage in (1, 2):
                assert gradient is None
            else:
                assert np.array_equal(gradient, plain.gradients[stage])


@pytest.mark.parametrize("frozen", [(0,), (2,)])
def test_a_frozen_stage_whose_module_trains_is_refused_before_anything_runs(workers, frozen):
    layout = Layout.u(3)
    text = write_table(plan("gpipe", layout.freeze(frozen), 2), "json")
    (port,) = free_ports(1)
    told = workers.run(frozen_ranks.told_by_rank, [(rank, 3, port, text) for rank in range(3)])
    name = layout.stages[frozen[0]].name
    wrong = f"stage {frozen[0]} ({name}) is frozen in the table, but its module trains weight"
    assert all(wrong in one for one in told), told
    assert told[frozen[0]].startswith("ConfigError") and "module.requires_grad_(False)" in told[frozen[0]]


@pytest.mark.parametrize("forward_only", [True, False])
def test_what_is_evaluated_may_train_elsewhere(workers, forward_only):
    """An evaluation gives nobody a gradient; and a stage that is not frozen need not train anything."""
    layout = Layout.u(2)
    table = plan("gpipe", layout.freeze({0}) if forward_only else layout, 2, forward_only=forward_only)
    (port,) = free_ports(1)
    told = workers.run(frozen_ranks.told_by_rank, [(r, 2, port, write_table(table, "json")) for r in range(2)])
    assert told == ["no mistake"] * 2


def test_nothing_is_kept_of_a_stage_without_a_backward():
    """Not the graph, and not the inputs that no gradient goes back to."""
    layout = ENCODERS.freeze({0})
    stages = {s: PipelineStage(frozen_ranks.SumOfPresent(s)) for s in range(5)}
    compute = ModuleStages(layout, stages, {0: graphs.data(0, 1), 1: graphs.data(1, 1)}, None, None, [1.0], True)
    ((vision, kept),) = compute.forward(0, (0,), [[]])
    assert kept is None and not vision.requires_grad
    ((text, _),) = compute.forward(1, (0,), [[]])
    ((joined, saved),) = compute.forward(2, (0,), [[vision, text]])
    assert len(saved.inputs) == 1 and torch.equal(saved.inputs[0], text)
    ((gradient,),) = compute.backward(2, (0,), [saved], [[torch.ones_like(joined)]])
    assert gradient.shape == text.shape
    assert [a.kind for a in plan("gpipe", layout, 1).ranks[2] if a.kind.is_send] == [Kind.SEND_F, Kind.SEND_B]
