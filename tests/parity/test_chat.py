"""Packed conversations: the numbers of separate ones, and split those of one process, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ldt_schedules.topology import SiteSize
from tests.parity import chat
from tests.parity.case import Case
from tests.parity.compare import EXACT, REORDERED, assert_parity, relative_error, run_split, run_whole

MODELS = {
    "Qwen3's": {"activation": "swiglu", "num_query_groups": 2, "head_dim": 16, "qk_norm": True, "rope_theta": 1e6},
    "learned positions": {"normalization": "LayerNorm", "position_embedding": "learned_absolute"},
}
SEPARATE = Case((5,), chat.CONVERSATIONS // 2, steps=1, per_token=True, batches=chat.separate)


def packed(layers, model="Qwen3's", **more):
    given = {"per_token": True, "batches": chat.packed, "segmented": True, "model": tuple(MODELS[model].items())}
    return Case(layers, **{"num_microbatches": chat.MICROBATCHES, **given, **more})


def assert_same_step(mine, reference, tolerance):
    """Loss, learned tokens and every gradient; microbatches are others."""
    assert mine.reports[:, 1].sum() == reference.reports[:, 1].sum() > 20
    assert relative_error(mine.reports[:, 0].sum(), reference.reports[:, 0].sum()) <= tolerance
    assert mine.gradients.keys() == reference.gradients.keys()
    errors = {name: relative_error(mine.gradients[name], one) for name, one in reference.gradients.items()}
    assert max(errors.values()) <= tolerance, errors


@pytest.mark.parametrize("model", MODELS)
def test_packed_conversations_are_separate_ones(workers, model):
    """In one process and through a U of 2 and 3 ranks; padding before them changes nothing either."""
    one = packed((1, 3, 1), model, precision="fp64", steps=1)
    left = replace(one, batches=chat.packed_left)
    alone = replace(SEPARATE, precision="fp64", model=one.model)
    (whole,), (whole_left,), (separate,) = run_whole(workers, [one, left, alone])
    two, three = (run_split(workers, [replace(one, layers=layers)]) for layers in ((1, 3, 1), (1, 1, 2, 1)))
    for (mine,) in [[whole], [whole_left], *two, *three]:
        assert_same_step(mine, separate, 1e-12)


def test_packed_conversations_in_float32(workers):
    """Rounding apart, which is not the size of a neighbour that is seen; that a split is bit-identical is said below."""
    one = packed((1, 3, 1), steps=1)
    cases = [one, replace(SEPARATE, model=one.model), replace(one, batches=unsegmented)]
    (mine,), (separate,), (wrong,) = run_whole(workers, cases)
    assert_same_step(mine, separate, REORDERED)
    # A control: without segments the second conversation of a sample sees the first.
    assert not np.allclose(mine.reports[:, 0], wrong.reports[:, 0], rtol=1e-4)


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1)], ids=str)
def test_the_same_with_tensor_parallelism_of_either_site(workers, sizes):
    edge, cloud = (SiteSize(size) for size in sizes)
    one = packed((1, 3, 1), edge=edge, cloud=cloud, precision="fp64", steps=1)
    ((mine,),), ((separate,),) = (
        run_split(workers, [one]),
        run_whole(workers, [replace(SEPARATE, precision="fp64", model=one.model)]),
    )
    assert_same_step(mine, separate, 1e-12)


@pytest.mark.parametrize("layers", [(1, 1, 2, 1), (0, 2, 1, 2, 0)], ids=str)
def test_a_split_is_bit_identical_to_one_process(workers, layers):
    cases = [packed(layers, planner=planner, evaluate=True) for planner in ("ldt_1f1b", "gpipe", "auto")]
    cases += [packed(layers, num_microbatches=count) for count in (1, 6)] if len(layers) == 4 else []
    check(workers, cases, EXACT)


def check(workers, cases, tolerance):
    for case, mine, reference in zip(cases, run_split(workers, cases), run_whole(workers, cases), strict=True):
        for step in range(case.steps):
            assert_parity(case, mine[step], reference[step], tolerance, step=step)


def test_recomputed_in_half_precision(workers):
    kinds = (("recompute", "full"),), (("recompute", "selective"),)
    cases = [packed((1, 1, 2, 1), precision="bf16", train=kind) for kind in kinds]
    check(workers, [*cases, *(replace(case, batches=chat.packed_left) for case in cases)], EXACT)


def test_replicas_and_sequence_parallelism(workers):
    """The cloud has twice the replicas of the edge, and cuts the sequence over its tensor-parallel processes."""
    check(workers, [packed((1, 3, 1), cloud=SiteSize(1, data=2))], REORDERED)
    check(workers, [packed((1, 3, 1), cloud=SiteSize(2, sequence_parallel=True))], REORDERED)


def unsegmented(step, microbatches):
    for batch in chat.packed(step, microbatches):
        del batch["segments"]
        yield batch
