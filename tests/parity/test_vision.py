"""A vision-language model on a two-lap U: losses, every gradient and every weight are those of one process."""

from __future__ import annotations

import numpy as np
import pytest

from ldt_schedules.topology import SiteSize
from tests.parity.compare import EXACT, REORDERED, assert_parity, norm_error, run_split, run_whole
from tests.parity.vision import SEQUENCE, case, vision_batches

PLANNER = "ldt_2lap_1f1b"
FLOAT64 = 1e-11
ADAM = 1e-4
"""Where sums are taken in another order: Adam divides by a gradient's own size, so a rounding error near 0 moves a weight."""
ROUNDED = 2e-2
"""The same in 16 bits; bfloat16 has 8 bits of mantissa."""
EVERY_PLANNER = ((1, 1, 1), (1, 1, 1, 1), (1, 1, 0, 1, 0))
"""Splits of the ViT, one for each number of ranks, that are not run in the usual order alone."""
SHARED = (("use_distributed_optimizer", True), ("overlap_grad_reduce", True))
REPLICAS = {"edge": SiteSize(data=2), "cloud": SiteSize(data=2)}


def both(workers, cases):
    return zip(cases, run_split(workers, cases), run_whole(workers, cases), strict=True)


def check_exact(workers, cases):
    for one, split, whole in both(workers, cases):
        for step, (mine, reference) in enumerate(zip(split, whole, strict=True)):
            assert mine.gradients.keys() == reference.gradients.keys()
            assert_parity(one, mine, reference, EXACT, step=step)


@pytest.mark.parametrize(
    ("vit", "llm"),
    [
        ((1, 1, 1), (0, 2, 1)),
        ((0, 2, 0), (0, 2, 0)),
        ((2, 0, 1), (1, 0, 1)),
        ((1, 1, 1, 1), (1, 1, 0, 1)),
        ((0, 1, 1, 0), (0, 1, 1, 0)),
        ((1, 1, 0, 1, 0), (0, 1, 1, 1, 0)),
    ],
    ids=str,
)
def test_every_gradient_and_weight_is_that_of_one_process(workers, vit, llm):
    """Two steps of SGD, P = 2, 3, 4, more and fewer microbatches than ranks, four planners: bit for bit, in float32."""
    others = ("gpipe", "one_f_one_b", "auto") if vit in EVERY_PLANNER else ()
    cases = [case(vit, llm, 5, planner) for planner in (PLANNER, *others)]
    cases += [case(vit, llm, count, PLANNER) for count in (1, 3)]
    check_exact(workers, cases)


def test_images_in_some_microbatches_only(workers):
    """Every tensor of an image is empty in a microbatch without one, also where a whole step has none."""
    counts = [sum(len(batch["grids"]) == 0 for batch in vision_batches(0, range(n))) for n in (1, 2, 6)]
    assert counts == [0, 1, 2]
    check_exact(workers, [case((1, 1, 1), (0, 1, 1), 6, PLANNER, batches=batches_without_images, steps=3)])


def batches_without_images(step, microbatches):
    """Step 1 has no image at all."""
    for batch in vision_batches(step, microbatches):
        if step == 1:
            ids = batch["input_ids"]
            batch |= {"input_ids": ids % 50, "grids": batch["grids"][:0], "pixel_values": batch["pixel_values"][:0]}
        yield batch


OPTIONS = [
    ({"per_token": True}, EXACT),
    ({"evaluate": True}, EXACT),
    ({"optimizer": "adam"}, EXACT),
    # The sums over both ends of the tie, and over both sites, are taken in another order.
    ({"tied": True}, REORDERED),
    ({"clip": 1.0}, REORDERED),
]


@pytest.mark.parametrize(("vit", "llm"), [((1, 1, 1), (0, 1, 1)), ((1, 1, 1, 0), (0, 1, 0, 1))], ids=str)
def test_options_of_the_loop(workers, vit, llm):
    compared = both(workers, [case(vit, llm, 4, PLANNER, **options) for options, _ in OPTIONS])
    for (one, split, whole), (_, tolerance) in zip(compared, OPTIONS, strict=True):
        for step, (mine, reference) in enumerate(zip(split, whole, strict=True)):
            assert_parity(one, mine, reference, tolerance, step=step)


def test_other_precisions_and_what_is_recomputed(workers):
    options = [{"precision": precision} for precision in ("bf16", "fp16", "fp64")]
    options += [{"train": (("recompute", kind),)} for kind in ("full", "selective")]
    check_exact(workers, [case((1, 1, 1), (0, 1, 1), 4, PLANNER, **one) for one in options])


@pytest.mark.parametrize(
    "sizes",
    [
        {"cloud": SiteSize(tensor=2)},
        {"edge": SiteSize(tensor=2)},
        {"cloud": SiteSize(data=2)},
        {"edge": SiteSize(data=2), "cloud": SiteSize(data=2)},
        {"cloud": SiteSize(tensor=2, data=2)},
        {"edge": SiteSize(tensor=2), "cloud": SiteSize(data=2)},
    ],
    ids=["TP 1 and 2", "TP 2 and 1", "DP 1 and 2", "DP 2 and 2", "TP 1 and 2, DP 1 and 2", "TP 2 and 1, DP 1 and 2"],
)
def test_other_sizes_differ_by_rounding_alone(workers, sizes):
    tolerances = {"fp32": REORDERED, "fp64": FLOAT64}
    cases = [case((1, 1, 1), (0, 2, 1), 4, PLANNER, precision=precision, **sizes) for precision in tolerances]
    for (one, split, whole), tolerance in zip(both(workers, cases), tolerances.values(), strict=True):
        for mine, reference in zip(split, whole, strict=True):
            assert mine.gradients.keys() == reference.gradients.keys()
            for name, gradient in reference.gradients.items():
                assert norm_error(mine.gradients[name], gradient) <= tolerance, (name, one.precision)


def test_replicas_share_the_optimizer_and_reduce_while_they_compute(workers):
    for _, split, whole in both(
        workers, [case((1, 1, 1), (0, 2, 1), 4, PLANNER, optimizer="adam", ddp=SHARED, **REPLICAS)]
    ):
        check_close(split, whole, REORDERED)


def check_close(split, whole, tolerance):
    """Every step's gradients, and what the optimizer made of them."""
    for step, (mine, reference) in enumerate(zip(split, whole, strict=True)):
        assert mine.gradients.keys() == reference.gradients.keys() and mine.weights.keys() == reference.weights.keys()
        for kind in ("gradients", "weights"):
            for name, tensor in getattr(reference, kind).items():
                error = norm_error(getattr(mine, kind)[name], tensor)
                assert error <= tolerance, f"step {step}: {kind} of {name} differ by {error:.2e}"


FROZEN = [("vit",), ("projector",), ("vit", "projector"), ("language",), ("vit", "language"), ("projector", "language")]


@pytest.mark.parametrize("frozen", FROZEN, ids="+".join)
def test_frozen_parts_stay_and_the_rest_learns_as_in_one_process(workers, frozen):
    cases = [case((1, 1, 1), (0, 1, 1), 4, planner, frozen=frozen) for planner in (PLANNER, "gpipe", "auto")]
    check_exact(workers, cases)
    everything, some = run_split(workers, [case((1, 1, 1), (0, 1, 1), 4, PLANNER, frozen=f) for f in ((), frozen)])
    for name in some[0].gradients:
        np.testing.assert_array_equal(some[0].gradients[name], everything[0].gradients[name], err_msg=name)
    prefixes = {"vit": ("vision.decoder", "vision.patch"), "projector": "vision.projector", "language": "language."}
    for name in everything[0].gradients.keys() - some[0].gradients.keys():
        assert any(name.startswith(prefixes[part]) for part in frozen), name


FIRST, SECOND, ALL = ("vit",), ("language",), ("vit", "language")
"""Of a cloud process the first of its two stages, the second, all of it."""


@pytest.mark.parametrize("frozen", [FIRST, SECOND, ALL], ids="+".join)
def test_frozen_parts_in_16_bits(workers, frozen):
    check_exact(workers, [case((1, 1, 1), (0, 1, 1), 4, PLANNER, precision=p, frozen=frozen) for p in ("bf16", "fp16")])


@pytest.mark.parametrize(
    ("frozen", "sizes"),
    [
        (ALL, {"cloud": SiteSize(tensor=2)}),
        (ALL, REPLICAS),
        (ALL, {"edge": SiteSize(tensor=2), "cloud": SiteSize(data=2)}),
        (FIRST, {"edge": SiteSize(tensor=2), "cloud": SiteSize(data=2)}),
        (SECOND, {"edge": SiteSize(tensor=2), "cloud": SiteSize(data=2)}),
    ],
    ids=[
        "all, TP 1 and 2",
        "all, DP 2 and 2",
        *(f"{some}, TP 2 and 1, DP 1 and 2" for some in ("all", "vit", "language")),
    ],
)
def test_frozen_parts_on_sites_of_other_sizes(workers, sizes, frozen):
    """Replicas with optimizers of their own, and with one that they share; and in 16 bits, for a step."""
    kinds = [({}, REORDERED), ({"optimizer": "adam", "clip": 1.0, "ddp": SHARED}, ADAM)]
    kinds += [({"precision": precision, "steps": 1}, ROUNDED) for precision in ("bf16", "fp16")]
    cases = [case((1, 1, 1), (0, 1, 1), 4, PLANNER, frozen=frozen, **kind, **sizes) for kind, _ in kinds]
    for (_, split, whole), (_, tolerance) in zip(both(workers, cases), kinds, strict=True):
        check_close(split, whole, tolerance)


def test_frozen_parts_in_16_bits_with_a_shared_optimizer(workers):
    kind = {"optimizer": "adam", "ddp": SHARED, "frozen": ALL, "steps": 1, **REPLICAS}
    cases = [case((1, 1, 1), (0, 1, 1), 4, PLANNER, precision=precision, **kind) for precision in ("bf16", "fp16")]
    for _, split, whole in both(workers, cases):
        check_close(split, whole, ROUNDED)


@pytest.mark.parametrize("cloud_ranks", [1, 2, 3])
def test_nobody_sends_a_gradient_that_nobody_needs(workers, cloud_ranks):
    """Bytes that the edge sends and receives in a step, against the shapes of the data."""
    vit, llm = (1, *[1] * cloud_ranks, 1), (0, *[1] * cloud_ranks, 1)
    count, float32 = 4, 4
    patches = sum(len(batch["pixel_values"]) for batch in vision_batches(0, range(count))) * 16 * float32
    tokens = count * 2 * SEQUENCE * 32 * float32
    assert patches > 0
    parts = ((), ("vit",), ("vit", "projector"), ("vit", "language"))
    made = [case(vit, llm, count, PLANNER, frozen=frozen, steps=1) for frozen in parts]
    free, *frozen = (run_split(workers, [one])[0][0].crossed for one in made)
    assert free == (2 * patches + 2 * tokens, 2 * patches + 2 * tokens)
    # Of the last nothing of lap 1 or 2 learns: what goes up in lap 1 comes down, and no gradient does.
    assert frozen == [(patches + 2 * tokens, patches + 2 * tokens)] * 3
