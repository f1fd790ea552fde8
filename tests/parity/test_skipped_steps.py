"""Both sites take the optimizer step or neither does."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from tests.parity.case import Case
from tests.parity.compare import EXACT, assert_parity, run_split, run_whole

U3 = (1, 1, 1, 1)


KINDS = list(itertools.product((0, 1, 2), ("fp32", "bf16", "fp16"), (0.0, 1.0)))


@pytest.fixture(scope="module")
def skipped(workers):
    """Every kind of run, all in one world; step 1 has an inf."""
    cases = [
        Case(U3, 2, optimizer="adam", precision=precision, clip=clip, steps=3, inf_at=(1, pipeline_rank))
        for pipeline_rank, precision, clip in KINDS
    ]
    return dict(zip(KINDS, run_split(workers, cases), strict=True))


@pytest.mark.parametrize(("pipeline_rank", "precision", "clip"), KINDS)
def test_an_inf_on_one_site_makes_both_skip(skipped, pipeline_rank, precision, clip):
    """D14: upstream's sites can disagree whether a step was taken, and drift apart."""
    steps = skipped[pipeline_rank, precision, clip]
    assert steps[0].stepped == [True] * 3
    assert steps[1].stepped == [False] * 3
    assert steps[2].stepped == [True] * 3
    for name, weight in steps[0].weights.items():
        assert np.array_equal(steps[1].weights[name], weight), f"{name} changed in a skipped step"
        assert np.isfinite(steps[2].weights[name]).all()
    for step in steps:
        assert len(set(step.loss_scales)) == 1, "the sites' loss scales have come apart"


def test_a_skipped_step_in_half_precision_is_megatrons_own(workers):
    """fp16: Megatron in one process skips it, too; afterwards the numbers are still its numbers, bit for bit."""
    case = Case(U3, 2, optimizer="adam", precision="fp16", steps=4, inf_at=(1, 0))
    (mine,), (reference,) = run_split(workers, [case]), run_whole(workers, [case])
    assert reference[1].stepped == [False] and mine[1].stepped == [False] * 3
    for step in (0, 2, 3):
        assert_parity(case, mine[step], reference[step], EXACT, step=step)
        assert mine[step].loss_scales[0] == reference[step].loss_scales[0]


def test_without_an_inf_nothing_is_skipped(workers):
    (steps,) = run_split(workers, [replace(Case(U3, 2), steps=2)])
    assert all(all(step.stepped) for step in steps)
