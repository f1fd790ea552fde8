"""The heart of the project: a split model gives the numbers of one process, bit for bit where no sum is reordered."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ldt_schedules.topology import SiteSize
from tests.parity.case import Case
from tests.parity.compare import EXACT, REORDERED, assert_parity, run_split, run_whole

SPLITS = {2: (1, 3, 1), 3: (1, 2, 1, 1), 4: (1, 1, 1, 1, 1), 5: (0, 1, 1, 1, 1, 1)}
MICROBATCHES = (1, 2, 3, 5, 8)
EMBEDDING = "embedding.word_embeddings.weight"


def check(workers, cases, tolerance=EXACT, named=None):
    split, whole = run_split(workers, cases), run_whole(workers, cases)
    for case, mine, reference in zip(cases, split, whole, strict=True):
        for step in range(case.steps):
            assert_parity(case, mine[step], reference[step], tolerance, named, step)


@pytest.mark.parametrize("ranks", SPLITS)
@pytest.mark.parametrize(("optimizer", "per_token"), [("sgd", False), ("adam", True)])
def test_split_is_bit_identical_to_one_process(workers, ranks, optimizer, per_token):
    """Losses, evaluation, every gradient and every updated weight, two steps, M from 1 (less than P) to 8."""
    base = Case(SPLITS[ranks], 1, optimizer=optimizer, per_token=per_token, evaluate=True)
    check(workers, [replace(base, num_microbatches=m, planner=p) for m in MICROBATCHES for p in ("gpipe", "ldt_1f1b")])


@pytest.mark.parametrize(("optimizer", "per_token"), [("sgd", True), ("adam", False)])
def test_the_other_loss_normalisation(workers, optimizer, per_token):
    base = Case(SPLITS[3], 1, optimizer=optimizer, per_token=per_token, evaluate=True)
    check(workers, [replace(base, num_microbatches=m, planner=p) for m in (1, 2, 5) for p in ("gpipe", "ldt_1f1b")])


def test_a_planned_order_is_as_identical(workers):
    """Whatever order `auto` finds, each stage adds up its microbatches in the same order."""
    check(workers, [Case(SPLITS[3], m, planner="auto", evaluate=True) for m in (1, 2, 5, 8)])


@pytest.mark.parametrize("ranks", SPLITS)
def test_tied_embeddings_differ_in_the_shared_weight_alone(workers, ranks):
    """One step: afterwards the shared weight's rounding reaches everything."""
    base = Case(SPLITS[ranks], 1, steps=1, tied=True, optimizer="sgd")
    cases = [replace(base, num_microbatches=m, planner=p) for m in (1, 2, 5, 8) for p in ("gpipe", "ldt_1f1b")]
    check(workers, cases, named={EMBEDDING: 1e-6})


def test_tied_embeddings_in_float64_show_that_it_is_rounding(workers):
    cases = [Case(SPLITS[3], m, steps=3, tied=True, optimizer="sgd", precision="fp64") for m in (1, 4)]
    split, whole = run_split(workers, cases), run_whole(workers, cases)
    for mine, reference in zip(split, whole, strict=True):
        from tests.parity.compare import relative_error

        for name, gradient in reference[0].gradients.items():
            assert relative_error(mine[0].gradients[name], gradient) <= 1e-12, name


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_clipped_steps(workers, optimizer):
    """The norm is that of the whole model, so both sites clip by the same factor."""
    cases = [Case(SPLITS[3], m, optimizer=optimizer, clip=0.05, steps=3) for m in (1, 4)]
    split, whole = run_split(workers, cases), run_whole(workers, cases)
    for case, mine, reference in zip(cases, split, whole, strict=True):
        for step in range(case.steps):
            assert reference[step].grad_norms[0] > 1.0, "the test clips nothing"
            assert_parity(case, mine[step], reference[step], 1e-6, step=step)


@pytest.mark.parametrize(("tensor", "data"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("tied", [False, True])
def test_equal_tensor_and_data_parallelism_on_both_sites(workers, tensor, data, tied):
    size = SiteSize(tensor, data=data)
    base = Case(SPLITS[2], 4, edge=size, cloud=size, tied=tied, optimizer="sgd", evaluate=True)
    check(workers, [base, replace(base, per_token=True, planner="gpipe")], tolerance=REORDERED)


MODELS = {
    "swiglu, grouped queries, biases": {"activation": "swiglu", "num_query_groups": 2, "linear_bias": True},
    "layer norm, learned positions": {"normalization": "LayerNorm", "position_embedding": "learned_absolute"},
}


def test_other_models(workers):
    models = [tuple(model.items()) for model in MODELS.values()]
    check(workers, [Case(SPLITS[3], m, optimizer="adam", model=model) for model in models for m in (1, 4)])


def test_recomputed_activations(workers):
    kinds = [(("recompute", kind),) for kind in ("full", "selective")]
    check(workers, [Case(SPLITS[3], 4, optimizer="sgd", train=kind) for kind in kinds])


def test_half_precision(workers):
    """What crosses is bf16 or fp16, as between two of Megatron's own stages: nothing is rounded twice."""
    check(workers, [Case(SPLITS[3], m, optimizer="adam", precision=p) for p in ("bf16", "fp16") for m in (1, 4)])


def test_layer_splits_with_empty_ends(workers):
    """A head of nothing but the embedding, a tail of nothing but norm and output layer, an empty cloud rank."""
    for layers in ((0, 2, 0), (0, 1, 2, 1), (2, 0, 2, 0)):
        check(workers, [Case(layers, 3, optimizer="sgd", steps=1)])


def test_the_comparison_notices_the_last_bit(workers):
    """A control: one gradient, one weight, one loss, moved to the next float, is found and named."""
    case = Case(SPLITS[2], 2, steps=1, evaluate=True)
    ((mine,),), ((reference,),) = run_split(workers, [case]), run_whole(workers, [case])
    assert_parity(case, mine, reference, EXACT)
    name = "decoder.layers.2.mlp.linear_fc1.weight"
    for tensors, message in ((mine.gradients, name), (mine.weights, name), ({"": mine.reports}, "reports")):
        array = tensors[name] if name in tensors else tensors[""]
        before = array.copy()
        array.flat[array.argmax()] = np.nextafter(array.max(), np.inf, dtype=array.dtype)
        with pytest.raises(AssertionError, match=message):
            assert_parity(case, mine, reference, EXACT)
        array[...] = before
    assert_parity(case, mine, reference, EXACT)
