"""Encoders on the edge as roots of the pipeline, the language model a U: every gradient equals one process's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldt_schedules.errors import ConfigError, LdtError
from ldt_schedules.topology import SiteSize
from tests.parity.case import Case
from tests.parity.compare import EXACT, REORDERED, Step, assert_parity, norm_error, run_split, run_whole
from tests.parity.multimodal import MODALITIES, multimodal_batches, multimodal_step


def case(layers, num_microbatches, planner="one_f_one_b", **more):
    return Case(
        layers,
        num_microbatches,
        planner,
        modalities=MODALITIES,
        batches=multimodal_batches,
        forward_step=multimodal_step,
        **more,
    )


def both(workers, cases):
    return zip(cases, run_split(workers, cases), run_whole(workers, cases), strict=True)


def assert_encoders_learn(step: Step) -> None:
    for name in ("audio", "vision"):
        of_it = [gradient for key, gradient in step.gradients.items() if key.startswith(f"encoders.{name}.")]
        assert len(of_it) > 5 and all(np.abs(gradient).max() > 0 for gradient in of_it)


@pytest.mark.parametrize("layers", [(1, 2, 1), (1, 1, 1, 1), (0, 2, 1, 1)])
def test_every_gradient_and_weight_is_that_of_one_process(workers, layers):
    """Two steps of SGD, four and five microbatches, three planners: bit for bit, in float32."""
    cases = [case(layers, 4, planner) for planner in ("gpipe", "one_f_one_b", "auto")]
    cases += [case(layers, 5, per_token=True)]
    for one, split, whole in both(workers, cases):
        for number, (mine, reference) in enumerate(zip(split, whole, strict=True)):
            assert_encoders_learn(mine)
            assert_parity(one, mine, reference, EXACT, step=number)


@pytest.mark.parametrize(
    ("sizes", "tied"),
    [
        ({"cloud": SiteSize(tensor=2)}, False),
        ({"edge": SiteSize(data=2), "cloud": SiteSize(data=2)}, False),
        ({}, True),
    ],
    ids=["TP 1 and 2", "DP 2 and 2", "tied"],
)
def test_other_sizes_differ_by_rounding_alone(workers, sizes, tied):
    tolerances = {"fp32": REORDERED, "fp64": 1e-12}
    cases = [case((1, 2, 1), 4, tied=tied, precision=precision, **sizes) for precision in tolerances]
    for (one, split, whole), tolerance in zip(both(workers, cases), tolerances.values(), strict=True):
        assert split[0].gradients.keys() == whole[0].gradients.keys()
        assert_encoders_learn(split[0])
        for name, reference in whole[0].gradients.items():
            assert norm_error(split[0].gradients[name], reference) <= tolerance, (name, one.precision)


def test_in_16_bits_too(workers):
    """Features, like what crosses the link, are of the model's dtype; the arithmetic and its order are one process's."""
    for one, split, whole in both(workers, [case((1, 2, 1), 4, precision=precision) for precision in ("bf16", "fp16")]):
        assert_encoders_learn(split[0])
        assert_parity(one, split[0], whole[0], EXACT)


def test_features_go_where_their_placeholders_are():
    """Against a loop over samples and tokens."""
    from ldt_schedules.megatron.modalities import in_their_places

    tokens = torch.tensor([[1, 9, 9, 2], [9, 3, 8, 4]])
    embedded = torch.arange(4 * 2 * 3, dtype=torch.float64).reshape(4, 2, 3)
    features = {"audio": -torch.ones(3, 3) * torch.arange(1, 4)[:, None], "vision": torch.full((1, 3), 0.5)}
    joined = in_their_places(embedded, tokens, features, {"audio": 9, "vision": 8})
    expected, used = embedded.clone(), {"audio": 0, "vision": 0}
    for sample in range(2):
        for position in range(4):
            name = {9: "audio", 8: "vision"}.get(int(tokens[sample, position]))
            if name is not None:
                expected[position, sample] = features[name][used[name]].double()
                used[name] += 1
    assert torch.equal(joined, expected)
    with pytest.raises(LdtError, match=r"audio: 2 tokens of features for 3 placeholders \(token id 9\)"):
        in_their_places(embedded, tokens, {"audio": torch.ones(2, 3)}, {"audio": 9})


def test_what_a_multimodal_edge_cannot_do_is_refused():
    from types import SimpleNamespace

    from ldt_schedules.megatron.modalities import check_modalities

    with pytest.raises(ConfigError, match="turn it off for the edge"):
        check_modalities(SimpleNamespace(sequence_parallel=True), MODALITIES)
    with pytest.raises(ConfigError, match="different names"):
        check_modalities(SimpleNamespace(sequence_parallel=False), (MODALITIES[0], MODALITIES[0]))
