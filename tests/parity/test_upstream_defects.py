"""What the public implementations get silently wrong where the sites differ in size, one test a defect.

Each puts the mistake in and shows that the comparison with one process notices it; the same comparison passes without.
All of it runs once, in one world: an edge of one process, a cloud of two replicas of two processes each.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from ldt_schedules.planning.layout import Layout
from ldt_schedules.planning.planners import PLANNERS, plan
from ldt_schedules.planning.validator import validate
from ldt_schedules.topology import Site, SiteSize
from tests.helpers.workers import site_ports
from tests.parity.case import Case, open_rank
from tests.parity.compare import assert_close, joined, run_ranks, run_whole

CLOUD = SiteSize(2, data=2, sequence_parallel=True)
CLEAN = Case((1, 2, 1), 4, cloud=CLOUD, optimizer="sgd", steps=2, precision="fp64")
TOLERANCE = 1e-12


def in_cloud(run: Any) -> bool:
    return run.place.site is Site.CLOUD


@contextmanager
def edge_is_not_averaged(trained: Any, run: Any) -> Iterator[None]:
    finalize = trained.config.finalize_model_grads_func

    def finalize_model_grads(chunks: Any, *args: Any, **kwargs: Any) -> None:
        finalize(chunks, *args, **kwargs)
        chunks[0].scale_gradients(float(run.topology.domains))

    if not in_cloud(run):
        trained.config.finalize_model_grads_func = finalize_model_grads
    yield


@contextmanager
def domains_are_not_averaged(trained: Any, run: Any) -> Iterator[None]:
    run.domain_scale, scale = 1.0, run.domain_scale
    yield
    run.domain_scale = scale


@contextmanager
def cloud_is_not_reduced(trained: Any, run: Any) -> Iterator[None]:
    if in_cloud(run):
        trained.config.finalize_model_grads_func = lambda *args, **kwargs: None
    yield


@contextmanager
def first_shard_for_all(trained: Any, run: Any) -> Iterator[None]:
    from ldt_schedules.comm.boundary import BoundaryTransport

    with mock.patch.object(BoundaryTransport, "_assemble_slices", lambda self, part: self.group.broadcast(part)):
        yield


@contextmanager
def tokens_stay_at_the_edge(trained: Any, run: Any) -> Iterator[None]:
    from ldt_schedules.megatron import forward_backward

    with mock.patch.object(forward_backward, "share_num_tokens", lambda run, num_tokens: None):
        yield


@contextmanager
def ends_are_not_tied(trained: Any, run: Any) -> Iterator[None]:
    """The tail reads the weight, and its gradient is lost."""
    if not in_cloud(run):
        tail = trained.model.module.tail
        weight = tail.output_layer.weight
        tail.shared_embedding_or_output_weight = lambda: weight.detach()
    yield


@contextmanager
def maxima_are_summed(trained: Any, run: Any) -> Iterator[None]:
    from ldt_schedules.megatron import cross_site

    with mock.patch.object(cross_site, "max", lambda a, b: a + b, create=True):
        yield


@contextmanager
def each_site_skips_for_itself(trained: Any, run: Any) -> Iterator[None]:
    """A site that skips asks for no norm, so the other must not wait for it either."""
    from ldt_schedules.megatron import cross_site, two_phases

    with (
        mock.patch.object(cross_site, "ready", lambda run, flag: flag),
        mock.patch.object(two_phases, "commit", lambda run: None),
        mock.patch.object(cross_site, "both_sites", lambda run, value, what: (value, 0.0)),
    ):
        yield


@contextmanager
def reduced_after_the_first_backward(trained: Any, run: Any) -> Iterator[None]:
    """What a no_sync that is left too early leads to: a bucket is reduced while gradients are still to come.

    (Megatron 0.16 counts the gradients of the first step and so forgives most of it; an average of an average would not
    show, the sum of per-token loss does.)
    """
    from ldt_schedules.megatron.grad_sync import GradSync

    around_backward = GradSync.around_backward

    @contextmanager
    def and_reduce(self: Any, stage: int, microbatch: int) -> Iterator[None]:
        with around_backward(self, stage, microbatch):
            yield
        if in_cloud(run) and microbatch == run.place.domain:
            for group in trained.model.bucket_groups:
                group.start_grad_sync()
                group.grad_reduce_handle.wait()
                group.grad_reduce_handle = None

    with mock.patch.object(GradSync, "around_backward", and_reduce):
        yield


OVERLAP = (("overlap_grad_reduce", True), ("bucket_size", 3000))
CASES = {
    "clean": CLEAN,
    "D1": replace(CLEAN, mistake=edge_is_not_averaged),
    "D1, cloud": replace(CLEAN, mistake=domains_are_not_averaged),
    "D2": replace(CLEAN, mistake=cloud_is_not_reduced),
    "D5": replace(CLEAN, mistake=first_shard_for_all),
    "per token": replace(CLEAN, per_token=True),
    "D6": replace(CLEAN, per_token=True, mistake=tokens_stay_at_the_edge),
    "tied": replace(CLEAN, tied=True),
    "D7": replace(CLEAN, tied=True, mistake=ends_are_not_tied),
    "D8": replace(CLEAN, mistake=maxima_are_summed),
    "inf": replace(CLEAN, inf_at=(0, 2)),
    "D14": replace(CLEAN, inf_at=(0, 2), mistake=each_site_skips_for_itself),
    "overlap": replace(CLEAN, ddp=OVERLAP, per_token=True),
    "D24": replace(CLEAN, ddp=OVERLAP, per_token=True, mistake=reduced_after_the_first_backward),
}


@pytest.fixture(scope="module")
def ranks(workers: Any) -> dict[str, Any]:
    return dict(zip(CASES, run_ranks(workers, list(CASES.values())), strict=True))


@pytest.fixture(scope="module")
def check(workers: Any, ranks: dict[str, Any]) -> Any:
    def compare(name: str) -> None:
        case = CASES[name]
        ((reference,),) = [run_whole(workers, [case])]
        for step, mine in enumerate(joined(case, ranks[name])):
            assert_close(case, mine, reference[step], TOLERANCE, step)

    return compare


def test_d1_gradients_are_averaged_over_domains_on_both_sites(check):
    """Upstream's edge gradients come out D times too large: its average runs on `param.grad`, which DDP has emptied."""
    check("clean")
    with pytest.raises(
        AssertionError, match=r"gradients of (embedding|decoder.layers.[03]|output_layer|decoder.final)"
    ):
        check("D1")
    with pytest.raises(AssertionError, match=r"gradients of decoder.layers.[12]"):
        check("D1, cloud")


def test_d2_cloud_replicas_hold_the_same_weights(check, ranks):
    """Upstream finalises its first chunk only."""
    joined(CLEAN, ranks["clean"])
    with pytest.raises(AssertionError, match=r"cloud replicas differ in gradients of decoder.layers.[12]"):
        joined(CASES["D2"], ranks["D2"])


def test_d5_sequence_parallel_processes_get_their_own_part(check):
    check("clean")
    with pytest.raises(AssertionError):
        check("D5")


def test_d6_per_token_loss_counts_the_tokens_of_the_edge(check):
    check("per token")
    with pytest.raises(AssertionError, match=r"gradients of decoder.layers.[12]"):
        check("D6")


def test_d7_tied_embeddings_get_both_gradients(check):
    check("tied")
    with pytest.raises(AssertionError, match="gradients of embedding"):
        check("D7")


def test_d8_the_infinity_norm_is_a_maximum(check):
    """Upstream sums it, and returns what was not reduced at all."""
    check("clean")
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check("D8")


def norms_of_a_frozen_cloud(rank: int, ports: dict[str, int]) -> tuple[float, float]:
    import torch
    from megatron.core.optimizer import clip_grads

    from ldt_schedules.megatron import world

    place, _ = open_rank(CLEAN, rank, ports)
    gradients = [] if place.site is Site.CLOUD else [torch.tensor([3.0, -4.0])]
    norms = tuple(clip_grads.get_grad_norm_fp32(gradients, norm) for norm in (2, float("inf")))
    world.close_site()
    return norms


def test_d8_a_site_without_gradients_has_norm_zero(workers):
    """Everything in the cloud frozen: upstream takes the maximum of an empty list."""
    ports = site_ports()
    places = CLEAN.topology.places()
    assert workers.run(norms_of_a_frozen_cloud, [(p.global_rank, ports) for p in places]) == [(5.0, 4.0)] * len(places)


@pytest.mark.parametrize("ranks_of_u", range(2, 7))
def test_d12_any_number_of_microbatches(ranks_of_u):
    """Fewer than the warm-up wants: upstream's edge raises IndexError below (4 P + 1) / 6 and the cloud hangs."""
    for domains in (1, 2, 3):
        layout = Layout.u(ranks_of_u, domains)
        for num_microbatches in range(1, 2 * ranks_of_u):
            for name in set(PLANNERS) - {"exact", "ldt_2lap_1f1b"}:
                table = plan(name, layout, num_microbatches)
                assert validate(table) == [], (name, domains, num_microbatches)


def test_d14_an_inf_on_one_site_is_skipped_by_both(ranks):
    first, second = joined(CASES["inf"], ranks["inf"])
    assert first.stepped == [False] * 5 and second.stepped == [True] * 5
    assert {rank.stepped for rank in ranks["D14"][0]} == {True, False}, "the mistake was not noticed"


@pytest.fixture(scope="module")
def worlds(workers: Any) -> list[dict[str, Any]]:
    ports = site_ports()
    return workers.run(world_of_rank, [(place.global_rank, ports) for place in CLEAN.topology.places()])


def test_d16_the_world_is_the_sites_own(worlds):
    """Upstream replaces get_world_size by a forged one; ours is torch's own, of a site of equal processes."""
    assert [world["size"] for world in worlds] == [1, 4, 4, 4, 4]
    assert [world["data"] for world in worlds] == [1, 2, 2, 2, 2]
    assert all(world["is torch's"] for world in worlds)


def test_d23_groups_are_made_in_one_order_by_all(worlds):
    """Upstream's processes call new_group with different lists, and a placeholder in place of the edge's rank."""
    assert len(worlds[1]["groups"]) > 10
    assert worlds[1]["groups"] == worlds[2]["groups"] == worlds[3]["groups"] == worlds[4]["groups"]
    lanes = [world["lanes"] for world in worlds]
    assert lanes == [lanes[0]] * 5 and len(lanes[0]) == 5, "four lanes and the scalars"


def world_of_rank(rank: int, ports: dict[str, int]) -> dict[str, Any]:
    """Joins the world, and notes which groups were made."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from ldt_schedules.comm import link
    from ldt_schedules.megatron import world

    functions = {name: getattr(dist, name) for name in ("get_world_size", "barrier", "get_rank")}
    groups, lanes = [], []
    new_group, raw_group = dist.new_group, link._raw_group

    def noted_group(ranks: Any = None, *args: Any, **kwargs: Any) -> Any:
        groups.append(tuple(ranks or ()))
        return new_group(ranks, *args, **kwargs)

    def noted_lane(backend: str, store: Any, prefix: str, *rest: Any) -> Any:
        lanes.append(prefix)
        return raw_group(backend, store, prefix, *rest)

    with mock.patch.object(dist, "new_group", noted_group), mock.patch.object(link, "_raw_group", noted_lane):
        open_rank(CLEAN, rank, ports)
    result = {
        "size": dist.get_world_size(),
        "data": parallel_state.get_data_parallel_world_size(),
        "is torch's": all(getattr(dist, name) is function for name, function in functions.items()),
        "groups": groups,
        "lanes": lanes,
    }
    world.close_site()
    return result


def test_d24_overlapped_reduction_waits_for_the_last_backward(check):
    """Upstream keeps the last chunk's no_sync only, and calls a list of functions as if it were one."""
    check("overlap")
    with pytest.raises(AssertionError, match="gradients of decoder.layers.[12]"):
        check("D24")


def test_the_mistakes_are_really_in(ranks):
    """Each changes some gradient, weight or decision of its run."""
    clean = ranks["clean"][0][1]
    for name in ("D2", "D5"):
        wrong = ranks[name][0][1]
        assert any(not np.array_equal(wrong.gradients[key], clean.gradients[key]) for key in clean.gradients), name
