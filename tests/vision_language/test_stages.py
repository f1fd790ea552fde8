"""The stages of a split model are the whole model: bit for bit, and with two tensor-parallel processes to rounding."""

from __future__ import annotations

import pytest
import torch

from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron.vision_language.description import check_vision_language, freeze
from tests.helpers.workers import site_ports
from tests.vision_language import chained, tiny


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_every_split_is_the_whole_model_bit_for_bit(workers, num_ranks):
    """Every way to cut the ViT and every way to cut the language model, zeros included; losses and gradients."""
    assert workers.run(chained.all_splits, [(0, site_ports(), num_ranks)]) == [[]]


def test_recomputed_activations_and_tied_weights(workers):
    (found,) = workers.run(chained.tied_and_recomputed, [(0, site_ports())])
    assert found == {"full": [], "selective": [], "dropout": [], "tied": []}


@pytest.mark.parametrize("parts", [("vit",), ("vit", "projector"), ("language",), ("projector",)])
def test_frozen_parts_have_no_gradient_and_the_others_theirs(workers, parts):
    """Also where a whole stage is frozen: its backward runs if what feeds it learns, else it has none."""
    assert workers.run(chained.frozen, [(0, site_ports(), parts)]) == [[]]


def test_in_bfloat16(workers):
    """The ViT rotates in float32, as the reference does; the language model in bfloat16, as the reference does."""
    (found,) = workers.run(chained.narrowed, [(0, site_ports())])
    assert found["chained"] == 0.0
    assert found["float32"] < 0.05
    wide, narrow = ("float32", "float32", "bfloat16"), ("bfloat16",) * 3
    assert found["dtypes"] == {"WindowAttention": {wide}, "FrameAttention": {wide}, "SegmentAttention": {narrow}}


def test_two_tensor_parallel_processes(workers):
    """The replicated parts too: the patch embedding and the norms have the same gradient on both processes."""
    (one_process,) = workers.run(chained.alone, [(0, site_ports())])
    ports = site_ports()
    for found in workers.run(chained.tensor_parallel_distances, [(rank, ports, one_process) for rank in range(2)]):
        assert max(found.values()) <= 1e-12, {name: value for name, value in found.items() if value > 1e-12}


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(sequence_parallel=True, tensor_model_parallel_size=2), "sequence parallelism"),
        (dict(context_parallel_size=2), "context parallelism"),
        (dict(mrope_section=[1, 1, 1]), "mrope_section"),
        (dict(mrope_section=None), "mrope_section"),
    ],
)
def test_what_a_split_model_cannot_do_is_refused(change, said):
    model = tiny.model()
    vars(model.language).update(change)
    with pytest.raises(ConfigError, match=said):
        check_vision_language(model)


def test_unknown_parts_are_refused():
    with pytest.raises(ConfigError, match="vit, projector, language"):
        freeze(torch.nn.Linear(1, 1), ["encoder"])
