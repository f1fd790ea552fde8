"""The executor alone: ranks are threads, stages are plain torch modules, the link is a loopback hub."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import pytest
import torch

from ldt_schedules.comm.loopback import LoopbackHub
from ldt_schedules.comm.transport import TensorSpec
from ldt_schedules.errors import LdtError
from ldt_schedules.planning.actions import Action
from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.layout import Layout
from ldt_schedules.planning.planners import plan
from ldt_schedules.planning.table import ScheduleTable
from ldt_schedules.runtime.buffers import Buffers
from ldt_schedules.runtime.executor import Executor, check_executable

WIDTH = 6


@dataclass
class LinearStages:
    """Stage s multiplies by a matrix; the tail's output is summed as the loss."""

    weights: dict[int, torch.Tensor]
    data: torch.Tensor
    tail: int
    losses: list[torch.Tensor] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    fail_at: str = ""

    def forward(self, stage, microbatches, inputs):
        (microbatch,), (inputs,) = microbatches, inputs
        self._log(f"F s{stage} m{microbatch}")
        inputs = [x.requires_grad_() for x in inputs]
        x = inputs[0] if inputs else self.data[microbatch]
        output = torch.tanh(x @ self.weights[stage])
        if stage == self.tail:
            output = output.sum()
            self.losses.append(output.detach())
        return [(output.detach(), (inputs, output))]

    def backward(self, stage, microbatches, saved, output_grads):
        (microbatch,), (saved,), (output_grads,) = microbatches, saved, output_grads
        self._log(f"B s{stage} m{microbatch}")
        inputs, output = saved
        output.backward(output_grads[0] if output_grads else None)
        return [[x.grad for x in inputs]]

    def _log(self, text):
        self.log.append(text)
        if text == self.fail_at:
            raise RuntimeError("planted")


def make_weights(num_stages):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(num_stages)
    ]


def run_ranks(table, fail_at="", timeout_s=20.0):
    """One thread a rank; returns stages by rank, errors by rank and the hub."""
    layout, hub = table.layout, LoopbackHub(timeout_s=timeout_s)
    data = torch.randn(
        table.num_microbatches, 3, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    weights = make_weights(len(layout.stages))
    stages = [
        LinearStages({s: weights[s] for s in layout.stages_on(rank)}, data, len(layout.stages) - 1, fail_at=fail_at)
        for rank in range(layout.num_ranks)
    ]
    errors: dict[int, Exception] = {}

    def work(rank):
        executor = Executor(
            table, rank, stages[rank], hub.transport(rank), lambda _: TensorSpec((3, WIDTH), torch.float64)
        )
        try:
            with torch.no_grad() if table.forward_only else torch.enable_grad():
                executor.run()
        except Exception as error:
            errors[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(layout.num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return stages, errors, hub, weights, data


@pytest.mark.parametrize("ranks", range(2, 7))
@pytest.mark.parametrize("planner", ["gpipe", "ldt_1f1b"])
def test_every_small_table_computes_what_one_process_does(ranks, planner):
    for num_microbatches in range(1, 11):
        table = plan(planner, Layout.u(ranks), num_microbatches)
        stages, errors, hub, weights, data = run_ranks(table)
        assert not errors, errors
        assert hub.undelivered() == 0
        alone = make_weights(ranks + 1)
        losses = []
        for x in data:
            for weight in alone:
                x = torch.tanh(x @ weight)
            losses.append(x.sum())
            losses[-1].backward()
        assert torch.equal(torch.stack(stages[0].losses), torch.stack(losses).detach())
        for mine, reference in zip(weights, alone, strict=True):
            assert torch.equal(mine.grad, reference.grad)


def test_the_executed_order_is_the_table():
    table = plan("ldt_1f1b", Layout.u(4), 6)
    stages, errors, *_ = run_ranks(table)
    assert not errors
    for rank, row in enumerate(table.compute_order()):
        assert stages[rank].log == [str(action) for action in row]


def test_evaluation_keeps_nothing():
    table = plan("ldt_1f1b", Layout.u(3), 5, forward_only=True)
    stages, errors, hub, *_ = run_ranks(table)
    assert not errors and hub.undelivered() == 0
    assert len(stages[0].losses) == 5
    assert all(not text.startswith("B") for text in stages[0].log)


def test_a_failing_action_is_named_with_rank_and_index():
    table = plan("gpipe", Layout.u(2), 3)
    _, errors, *_ = run_ranks(table, fail_at="F s1 m2", timeout_s=1.0)
    assert isinstance(errors[1], LdtError)
    index = [str(action) for action in table.ranks[1]].index("F s1 m2")
    assert str(errors[1]) == f"pipeline rank 1, action {index} (F s1 m2): planted"
    # The edge waits no longer than its deadline, and says for whom.
    assert "waited 1 s for rank 1" in str(errors[0])


def test_a_value_left_over_is_an_error():
    """A table whose backward was cut off: the validator refuses it, and the executor would not pass over it."""
    table = plan("gpipe", Layout.u(2), 1)
    cut = ScheduleTable(table.layout, 1, tuple(tuple(a for a in row if str(a) != "B s0 m0") for row in table.ranks))
    _, errors, *_ = run_ranks(cut, timeout_s=2.0)
    assert isinstance(errors[0], AssertionError)
    assert "left over after the step" in str(errors[0]) and "saved activations of s0 m0" in str(errors[0])


@pytest.mark.parametrize(
    ("text", "message"), [("I s1 m0", "write B instead"), ("F s1 m(0,1)", "one microbatch at a time")]
)
def test_what_the_runtime_cannot_run_is_refused_before_the_step(text, message):
    table = ScheduleTable.from_rows(Layout.u(2), 2, {1: [Action.parse(text)]})
    with pytest.raises(ScheduleError, match=message):
        check_executable(table)


def test_buffers_give_a_value_once():
    from ldt_schedules.planning.dependencies import Value, What

    buffers, value = Buffers(), Value(What.INPUT, 1, 0, 0)
    buffers.put(value, "x")
    with pytest.raises(AssertionError, match="made twice"):
        buffers.put(value, "y")
    assert buffers.take(value) == "x"
    with pytest.raises(AssertionError, match="taken before it was made"):
        buffers.take(value)
    buffers.assert_empty()
