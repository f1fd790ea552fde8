"""PipelineRunner on real gloo processes: the published table as it is written, packed, reordered, and when things go wrong."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from ldt_schedules.comm.ports import free_ports
from ldt_schedules.planning import Layout, plan
from ldt_schedules.planning.formats import grid
from ldt_schedules.planning.progress import Semantics
from ldt_schedules.planning.validator import validate
from tests.helpers.workers import WorkerFailure
from tests.runtime import graphs, toy_roots

OMNI = (Path(__file__).parents[2] / "examples" / "omni" / "omni_table.txt").read_text()
RANKS = 6


def run(workers, text, timeout_s=90, **options):
    """Losses, and gradients by name, of all ranks together."""
    (port,) = free_ports(1)
    arguments = [(rank, RANKS, port, text, options) for rank in range(RANKS)]
    results = workers.run(toy_roots.run_rank, arguments, timeout_s)
    losses, gradients = [], {}
    for of_rank, found in results:
        losses += of_rank
        assert not gradients.keys() & found.keys()
        gradients.update(found)
    return losses, gradients


def one_process(iterations=1, weights=None, num_microbatches=4, dtype=torch.float64):
    weights = weights or [1 / num_microbatches] * num_microbatches
    return toy_roots.one_process(num_microbatches, dtype, iterations, weights)


def worst(found, wanted):
    """The greatest absolute difference of a gradient; every parameter must have one on both sides."""
    assert found.keys() == wanted.keys() and len(wanted) == 12
    return max(float(np.abs(found[name] - wanted[name]).max()) for name in wanted)


def edited(text, rank, change):
    """The table with one column's cells replaced by `change(cells)`."""
    table = grid.loads(text)
    columns = [[grid.cell(table, r, i) for i in range(len(row))] for r, row in enumerate(table.ranks)]
    columns[rank] = change(columns[rank])
    lines = [" ".join(f"Rank {r}" for r in range(len(columns)))]
    for step in range(max(map(len, columns))):
        lines.append(f"Step {step:02d}: " + " ".join(column[step] for column in columns if step < len(column)))
    return "\n".join(lines)


def moved(cell, before):
    def change(cells):
        kept = [one for one in cells if one != cell]
        kept.insert(kept.index(before), cell)
        return kept

    return change


@pytest.mark.parametrize("blocking", [False, True])
def test_the_published_table_gives_the_gradients_of_one_process(workers, blocking):
    """Audio absent in microbatch 1, an image in microbatch 2, other row counts everywhere, two steps: not one bit differs."""
    losses, gradients = run(workers, OMNI, blocking=blocking, iterations=2)
    wanted_losses, wanted = one_process(iterations=2)
    assert losses == wanted_losses
    assert worst(gradients, wanted) == 0.0


def test_float32_and_weights_of_each_microbatch(workers):
    weights = [0.1, 0.2, 0.3, 0.4]
    losses, gradients = run(workers, OMNI, dtype=torch.float32, weights=weights)
    wanted_losses, wanted = one_process(weights=weights, dtype=torch.float32)
    assert losses == wanted_losses
    assert worst(gradients, wanted) == 0.0


def pack_heads(cells):
    """Microbatches (0,1) and (2,3) in one pass; one message each, all the same; backwards one by one or packed."""
    of = cells[0].rpartition(",F,")[0]
    return [
        f"{of},F,(0,1),", f"{of},SEND_F,(0,1),3", f"{of},F,(2,3),", f"{of},SEND_F,(2,),3", f"{of},SEND_F,(3,),3",
        f"{of},RECV_B,(0,),3", f"{of},B,0,", f"{of},RECV_B,(1,2),3", f"{of},B,(1,2),", f"{of},RECV_B,(3,),3", f"{of},B,3,",
    ]  # fmt: skip


def pack_middle(cells):
    """A stage that is no root: forward of (1,2,3) together, backward of (0,1,2) together."""
    kept = [cell for cell in cells if ",F,0," in cell or "F,(0,)" in cell]
    packed = [
        "2,4,RECV_F,(1,2,3),3",
        "2,4,F,(1,2,3),",
        "2,4,SEND_F,(1,2,3),5",
        "2,4,RECV_B,(0,1,2),5",
        "2,4,B,(0,1,2),",
    ]
    return [*kept, *packed, "2,4,SEND_B,(0,1,2),3", "2,4,RECV_B,(3,),5", "2,4,B,3,", "2,4,SEND_B,(3,),3"]


@pytest.mark.parametrize("packed", [(0, 1, 2), (4,), (0, 1, 2, 4)], ids=["heads", "a middle stage", "both"])
@pytest.mark.parametrize("blocking", [False, True])
def test_packed_microbatches(workers, packed, blocking):
    """F, SEND and RECV of several microbatches, backwards grouped otherwise than forwards; rounding alone differs."""
    text = OMNI
    for rank in packed:
        text = edited(text, rank, pack_middle if rank == 4 else pack_heads)
    losses, gradients = run(workers, text, blocking=blocking)
    wanted_losses, wanted = one_process()
    assert np.allclose(losses, wanted_losses, rtol=1e-14, atol=0)
    assert worst(gradients, wanted) <= 1e-15


def test_another_legal_order(workers):
    """The planners' own tables for these roots, 1F1B and as planned for costs."""
    layout = Layout.roots({"audio": 0, "vision": 1, "text": 2}, {"join": 3, "middle": 4, "last": 5})
    for planner in ("one_f_one_b", "auto"):
        losses, gradients = run(workers, grid.dumps(plan(planner, layout, 4)))
        wanted_losses, wanted = one_process()
        assert losses == wanted_losses
        assert worst(gradients, wanted) == 0.0


@pytest.mark.parametrize("num_ranks", graphs.LAYOUTS)
def test_any_graph_of_stages(workers, num_ranks):
    """U, laps, roots, outputs with several readers, several stages on a rank; trained and evaluated, several planners."""
    (port,), cases = free_ports(1), graphs.cases(num_ranks)
    by_rank = workers.run(graphs.run_rank, [(rank, num_ranks, port, cases) for rank in range(num_ranks)])
    assert len(cases) >= 15
    for number, case in enumerate(cases):
        wanted_losses, wanted = graphs.one_process(case)
        found: dict[int, object] = {}
        for outcomes in by_rank:
            losses, gradients = outcomes[number]
            found.update(gradients)
            assert losses in ([], wanted_losses)
        assert found.keys() == wanted.keys() and any(outcomes[number][0] for outcomes in by_rank)
        for stage, reference in wanted.items():
            if reference is None:
                assert found[stage] is None, "an evaluation leaves no gradient"
            else:
                np.testing.assert_allclose(found[stage], reference, rtol=1e-13, atol=1e-15)


def told_of(text, semantics):
    return "\n".join(violation.render() for violation in validate(grid.loads(text), semantics))


def test_a_receive_too_early_stands_still_when_blocking(workers):
    """Rank 4 asks for a gradient before the last activation. Blocking ranks wait in a circle, which is told, with what would
    run; gloo matches messages by tag, so that the same table runs there if receives are posted early."""
    text = edited(OMNI, 4, moved("2,4,RECV_B,(0,),5", before="2,4,RECV_F,(3,),3"))
    told = told_of(text, Semantics.BLOCKING)
    assert "deadlock" in told and "the circle: rank 4 at F s4 m3 waits for rank 5 at F s5 m3 waits for rank 4" in told
    assert "it runs under buffered messages, not under rendezvous" in told
    assert told_of(text, Semantics.BUFFERED) == ""
    losses, gradients = run(workers, text)
    wanted_losses, wanted = one_process()
    assert losses == wanted_losses and worst(gradients, wanted) == 0.0
    (port,) = free_ports(1)
    refused = workers.run(toy_roots.told_by_rank, [(r, RANKS, port, text, {"blocking": True}) for r in range(RANKS)])
    assert all("it runs under buffered messages" in message for message, _ in refused), refused


def test_one_that_only_blocking_ranks_cannot_run(workers):
    """Rank 3 asks for a gradient before it has sent the activation that leads to it: fine if receives are posted early."""
    text = edited(OMNI, 3, moved("1,3,RECV_B,(0,),4", before="1,3,SEND_F,(3,),4"))
    assert "it runs under buffered and rendezvous messages, not under blocking" in told_of(text, Semantics.BLOCKING)
    losses, gradients = run(workers, text)
    wanted_losses, wanted = one_process()
    assert losses == wanted_losses and worst(gradients, wanted) == 0.0


@pytest.mark.parametrize(
    ("rank", "blocking"), [*((rank, False) for rank in range(RANKS)), (0, True), (3, True), (5, True)]
)
def test_a_failure_on_any_rank_stops_all_and_is_told_by_all(workers, rank, blocking):
    """Each of the other five ends within 2 seconds and says because of which rank, step and action, the cell marked."""
    (port,) = free_ports(1)
    options = {"fail": (rank, "planted mistake"), "blocking": blocking}
    results = workers.run(toy_roots.told_by_rank, [(r, RANKS, port, OMNI, options) for r in range(RANKS)])
    table = grid.loads(OMNI)
    index = next(i for i, action in enumerate(table.ranks[rank]) if action.kind.is_compute)
    cell = grid.cell(table, rank, index)
    first = min(failed_at for _, failed_at in results)
    for other, (message, failed_at) in enumerate(results):
        because = (
            f"rank {other} stopped because rank {rank}, step {index}, action `{cell}`: ValueError: planted mistake\n"
        )
        assert message.startswith(because)
        assert f">{cell}<" in message and "Rank 0" in message
        assert failed_at - first < 2.0, f"rank {other} took {failed_at - first:.1f} s"


def test_runners_may_be_made_one_after_the_other_without_a_step(workers):
    """The second one's table was compared with what rank 0 had said of the first."""
    (port,) = free_ports(1)
    cases = graphs.cases(2)
    outcomes = workers.run(graphs.make_runners_only, [(rank, 2, port, cases[:4]) for rank in range(2)])
    assert outcomes == [4, 4]


def test_a_rank_with_another_table_is_told_before_anything_runs(workers):
    (port,) = free_ports(1)
    other = edited(OMNI, 0, moved("0,0,SEND_F,(0,),3", before="0,0,SEND_F,(1,),3"))
    texts = [other if rank == 2 else OMNI for rank in range(RANKS)]
    results = workers.run(toy_roots.told_by_rank, [(r, RANKS, port, texts[r], {}) for r in range(RANKS)])
    for message, _ in results:
        assert "rank 2 has another table than rank 0; give every rank the same" in message


def test_a_gradient_of_another_shape_is_an_error_with_both_shapes(workers):
    """And not the end of the process, as over bare gloo (op.preamble.length <= op.nbytes)."""
    (port,) = free_ports(1)
    options = {"wrong_gradient": 3}
    results = workers.run(toy_roots.told_by_rank, [(r, RANKS, port, OMNI, options) for r in range(RANKS)])
    told = [message for message, _ in results if message != "went well"]  # rank 5 is through before anybody sees it
    assert len(told) >= 4
    for message in told:
        found = re.search(r"expected \[(\d+), 6\] float64, got \[(\d+), 6\] float64", message)
        assert found and int(found[2]) == int(found[1]) + 1, message


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("no loss", "rank 5 has the last stage: give it `loss`"),
        ("other stages", "rank 0 runs the stages [0] and got modules for [3]"),
        ("no inputs", "rank 0 has the root stages [0] and got inputs for none"),
        ("few inputs", "stage 0 got 3 inputs for 4 microbatches"),
        ("few targets", "there are 3 targets for 4 microbatches"),
        ("loss of many", "the loss of a microbatch is a scalar tensor, got [2, 2]"),
        ("a number handed over", "a stage hands over a tensor, a tuple of tensors, or None; got float"),
    ],
)
def test_mistakes_are_told_by_every_rank(workers, what, told):
    (port,) = free_ports(1)
    results = workers.run(toy_roots.told_by_rank, [(r, RANKS, port, OMNI, {"mistake": what}) for r in range(RANKS)])
    assert all(told in message for message, _ in results), [message for message, _ in results]


def test_a_packed_output_that_cannot_be_split_says_what_to_give(workers):
    text = OMNI
    for rank in (0, 1, 2):
        text = edited(text, rank, pack_heads)
    (port,) = free_ports(1)
    options = {"mistake": "rows that do not add up"}
    results = workers.run(toy_roots.told_by_rank, [(r, RANKS, port, text, options) for r in range(RANKS)])
    assert all("has 1 rows and the microbatches have [3, 6]" in message for message, _ in results), results[0][0]
    assert "packing=Rows(count)" in results[1][0]


def test_without_a_launcher_and_addresses_the_mistake_is_named(monkeypatch):
    from ldt_schedules.errors import ConfigError
    from ldt_schedules.runtime import connect_ranks

    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        ConfigError, match="RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set: start the ranks with torchrun"
    ):
        connect_ranks()


def test_a_rank_that_is_killed_stops_the_others(workers):
    """It cannot say a word; that its connection was closed without one is the cause."""
    (port,) = free_ports(1)
    options = {"kill": 3, "silence_s": 2.5}
    with pytest.raises(WorkerFailure) as failure:
        workers.run(toy_roots.run_rank, [(r, RANKS, port, OMNI, options) for r in range(RANKS)], timeout_s=60)
    told = str(failure.value)
    assert "did not answer" not in told, told
    assert told.count("rank 3 has gone without a word") >= 5, told
