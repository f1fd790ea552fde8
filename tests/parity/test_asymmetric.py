"""Sites of different sizes: the numbers of one process, whatever the tensor and data parallel sizes are.

In float32 sums are taken in another order, so 5e-6 of each parameter's norm is allowed; float64 tells that from a
mistake, which would still be one: 1e-12. That replicas hold bit-identical weights is checked wherever ranks are joined.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from ldt_schedules.topology import SiteSize
from tests.parity.case import Case
from tests.parity.compare import assert_close, run_split, run_whole

SPLITS = {2: (1, 2, 1), 3: (1, 1, 1, 1), 4: (1, 1, 0, 1, 1)}
GRADIENTS = {"fp32": 5e-6, "fp64": 1e-12}
LR = (("lr", 1e-5),)  # usual for fine-tuning; with Adam a rounding of a gradient near 0 is a visible part of a step


def check(workers, cases, precisions=tuple(GRADIENTS)):
    """In one world, all of one layout; each in both precisions, three steps."""
    cases = [replace(case, precision=precision, steps=3) for case in cases for precision in precisions]
    split, whole = run_split(workers, cases), run_whole(workers, cases)
    for case, mine, reference in zip(cases, split, whole, strict=True):
        for step in range(case.steps):
            assert_close(case, mine[step], reference[step], GRADIENTS[case.precision], step)


def usual(edge, cloud, ranks=2, num_microbatches=2, **more):
    """SGD with tied embeddings, and Adam with per-token loss; the loss masks are uneven in both."""
    base = Case(SPLITS[ranks], num_microbatches, edge=edge, cloud=cloud, **more)
    return [replace(base, optimizer="sgd", tied=True), replace(base, optimizer="adam", per_token=True, train=LR)]


WHOLE, SPLIT = False, True
TENSOR_SITES = [
    ((1, WHOLE), (2, WHOLE)),
    ((1, WHOLE), (2, SPLIT)),
    ((2, WHOLE), (1, WHOLE)),
    ((2, SPLIT), (1, WHOLE)),
    ((2, WHOLE), (4, SPLIT)),
    ((2, SPLIT), (4, WHOLE)),
    ((4, WHOLE), (2, WHOLE)),
    ((4, SPLIT), (2, SPLIT)),
    ((1, WHOLE), (4, SPLIT)),
]
"""(size, sequence parallel) of either site. All pairs of sizes and kinds, without a model: `tests/comm/test_boundary.py`."""


@pytest.mark.parametrize(("edge", "cloud"), TENSOR_SITES)
def test_tensor_parallel_sizes(workers, edge, cloud):
    """D5: upstream sends the first process's tensor only, and under sequence parallelism that is one shard of it."""
    check(workers, usual(*(SiteSize(size, sequence_parallel=split) for size, split in (edge, cloud))))


def test_the_first_process_sends_for_all(workers):
    """Mode lead."""
    check(workers, usual(SiteSize(2, sequence_parallel=True), SiteSize(4, sequence_parallel=True), lead=True))


def test_tensor_parallel_sizes_of_which_none_divides_the_other(workers):
    model = {"num_attention_heads": 6, "num_query_groups": 6, "hidden_size": 48, "ffn_hidden_size": 96}
    check(workers, usual(SiteSize(2), SiteSize(3, sequence_parallel=True), model=tuple(model.items())))


@pytest.mark.parametrize(
    ("ranks", "edge", "cloud", "num_microbatches"),
    [(2, 1, 2, 4), (2, 1, 3, 3), (2, 2, 4, 2), (3, 1, 2, 2), (3, 1, 3, 6), (4, 1, 2, 6)],
)
def test_data_parallel_sizes(workers, ranks, edge, cloud, num_microbatches):
    """D1, D2: upstream's edge gradients come out D times too large, and the cloud's replicas are not reduced."""
    check(workers, usual(SiteSize(data=edge), SiteSize(data=cloud), ranks, num_microbatches))


@pytest.mark.parametrize(
    ("edge", "cloud"),
    [
        (SiteSize(1, context=2), SiteSize(2, context=2, sequence_parallel=True)),
        (SiteSize(2, context=2), SiteSize(1, context=2, data=2)),
    ],
)
def test_context_parallelism(workers, edge, cloud):
    """Each context-parallel process has its part of the sequence on both sites; without per-token loss the mean of
    their means is taken, which is Megatron's, too, so only the other is compared."""
    check(workers, usual(edge, cloud, num_microbatches=2 * cloud.data)[1:])


def test_other_planners_with_domains(workers):
    cases = [usual(SiteSize(), SiteSize(data=2), 3, 6, planner=planner)[0] for planner in ("gpipe", "auto")]
    check(workers, cases)


@pytest.mark.parametrize(
    ("ranks", "edge", "cloud"),
    [
        (3, SiteSize(1, data=1), SiteSize(2, data=2, sequence_parallel=True)),
        (2, SiteSize(2, data=1, sequence_parallel=True), SiteSize(1, data=3)),
        (2, SiteSize(2, data=2), SiteSize(1, data=4)),
    ],
)
def test_tensor_and_data_parallel_sizes_together(workers, ranks, edge, cloud):
    check(workers, usual(edge, cloud, ranks, 2 * cloud.data // edge.data))


@pytest.mark.parametrize(("edge", "cloud"), [(SiteSize(), SiteSize(data=2)), (SiteSize(2, data=2), SiteSize(data=4))])
def test_distributed_optimizer(workers, edge, cloud):
    """Megatron has it for Adam, and not for float64. Gradients are reduced while others are still computed."""
    ddp = (("use_distributed_optimizer", True), ("overlap_grad_reduce", True), ("bucket_size", 3000))
    check(workers, [replace(case, optimizer="adam", train=LR) for case in usual(edge, cloud, 2, 4, ddp=ddp)], ["fp32"])
