"""Puts the ranks of a split run together and holds them against one process."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from ldt_schedules.topology import Site
from tests.helpers.workers import Workers, site_ports
from tests.parity.case import SEQUENCE, Case, StepResult, train_rank

EXACT = 0.0
"""Tolerance where the arithmetic and its order are the same."""
REORDERED = 5e-6
"""Relative tolerance of a parameter in float32 where sums are taken in another order."""

_whole_runs: dict[Case, list[StepResult]] = {}


@dataclass
class Step:
    """One step of a whole model: full tensors by name, and what the processes said."""

    reports: np.ndarray
    evaluation: np.ndarray
    gradients: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    grad_norms: list[float]
    inf_norms: list[float]
    stepped: list[bool]
    loss_scales: list[float]
    crossed: tuple[int, int]


def run_split(workers: Workers, cases: list[Case]) -> list[list[Step]]:
    """Run cases of one layout in one world, each rank a process; results by case and step."""
    return [joined(case, ranks) for case, ranks in zip(cases, run_ranks(workers, cases), strict=True)]


def run_ranks(workers: Workers, cases: list[Case]) -> list[list[list[StepResult]]]:
    """The same before ranks are put together: by case, step and rank."""
    ports = site_ports()
    places = cases[0].topology.places()
    results = workers.run(train_rank, [(cases, place.global_rank, ports) for place in places], timeout_s=110)
    return [[[rank[index][step] for rank in results] for step in range(case.steps)] for index, case in enumerate(cases)]


def joined(case: Case, ranks: list[list[StepResult]]) -> list[Step]:
    """Each step of one case, its ranks put together. Raises AssertionError when replicas differ."""
    return [_joined(case, step) for step in ranks]


def run_whole(workers: Workers, cases: list[Case]) -> list[list[Step]]:
    """The same cases in one process through Megatron's own schedule; each is run once and remembered."""
    missing = list({case.whole(): None for case in cases if case.whole() not in _whole_runs})
    if missing:
        (results,) = workers.run(train_rank, [(missing, 0, site_ports())], timeout_s=110)
        _whole_runs.update(zip(missing, results, strict=True))
    return [[_joined(case.whole(), [step]) for step in _whole_runs[case.whole()]] for case in cases]


def _joined(case: Case, ranks: list[StepResult]) -> Step:
    places = case.topology.places()
    gradients: dict[str, np.ndarray] = {}
    weights: dict[str, np.ndarray] = {}
    for site in Site:
        size = case.topology.size(site)
        for copy in itertools.product(range(size.data), range(size.context)):
            held = [p.site is site and (p.data_rank, p.context_rank) == copy for p in places]
            replica = list(itertools.compress(ranks, held))
            tensor_ranks = [place.tensor_rank for place in itertools.compress(places, held)]
            for kind, whole in (("gradients", gradients), ("weights", weights)):
                slices = [(t, getattr(r, kind), r.partition) for t, r in zip(tensor_ranks, replica, strict=True)]
                for name, tensor in _gathered(size.tensor, slices):
                    if copy == (0, 0):
                        assert name not in whole, f"both sites hold {name}"
                        whole[name] = tensor
                    np.testing.assert_array_equal(tensor, whole[name], f"{site} replicas differ in {kind} of {name}")
    edges = [
        rank for place, rank in zip(places, ranks, strict=True) if place.pipeline_rank == 0 and not place.tensor_rank
    ]
    for place, rank in zip(places, ranks, strict=True):
        assert place.pipeline_rank == 0 or not rank.reports, "a cloud process reported a loss"
    return Step(
        reports=_interleaved(case, [rank.reports for rank in edges]),
        evaluation=_interleaved(case, [rank.evaluation for rank in edges]),
        gradients=gradients,
        weights=weights,
        grad_norms=[rank.grad_norm for rank in ranks],  # type: ignore[misc]
        inf_norms=[rank.inf_norm for rank in ranks],
        stepped=[rank.stepped for rank in ranks],
        loss_scales=[rank.loss_scale for rank in ranks],
        crossed=(sum(rank.crossed[0] for rank in ranks), sum(rank.crossed[1] for rank in ranks)),
    )


def _interleaved(case: Case, processes: list[list[np.ndarray]]) -> np.ndarray:
    """Replica d of D holds microbatches d, d + D, …: back into the order of microbatches.

    Of each the context-parallel processes hold the sums over their parts of the sequence.
    """
    size = case.topology.edge.context
    replicas = [
        [np.sum(parts, axis=0) for parts in zip(*processes[first : first + size], strict=True)]
        for first in range(0, len(processes), size)
    ]
    return np.array([report for step in zip(*replicas, strict=True) for report in step])


def _gathered(size: int, ranks: list[tuple[int, dict[str, np.ndarray], dict[str, tuple[int, int]]]]):  # type: ignore[no-untyped-def]
    names = {name for _, tensors, _ in ranks for name in tensors}
    for name in sorted(names):
        slices = {tensor_rank: tensors[name] for tensor_rank, tensors, _ in ranks if name in tensors}
        partition = next(p for _, tensors, p in ranks if name in tensors)
        assert sorted(slices) == list(range(size)), f"{name} is held by tensor ranks {sorted(slices)}"
        if name not in partition:
            yield name, slices[0]
            continue
        dim, stride = partition[name]
        parts = [np.split(slices[rank], stride, axis=dim) for rank in range(size)]
        yield (
            name,
            np.concatenate([parts[rank][block] for block in range(stride) for rank in range(size)], axis=dim),
        )


def relative_error(mine: np.ndarray, reference: np.ndarray) -> float:
    """Largest absolute difference over the largest absolute value of the reference."""
    assert mine.shape == reference.shape
    difference = float(np.abs(mine.astype(np.float64) - reference).max())
    return difference if difference == 0 else difference / max(float(np.abs(reference).max()), 1e-30)


def assert_parity(
    case: Case, split: Step, whole: Step, tolerance: float, named: dict[str, float] | None = None, step: int = 0
) -> None:
    """Every loss, gradient and weight within `tolerance` (0: bit-identical); `named` overrides it for a parameter."""
    assert set(split.gradients) == set(whole.gradients)
    where = f"{case}, step {step}"
    for kind in ("reports", "evaluation"):
        mine, reference = getattr(split, kind), getattr(whole, kind)
        assert len(mine) == len(reference), where
        error = relative_error(mine, reference) if len(mine) else 0.0
        assert error <= tolerance, f"{where}: {kind} differ by {error:.2e}"
    for kind in ("gradients", "weights"):
        for name, reference in getattr(whole, kind).items():
            allowed = (named or {}).get(name, tolerance)
            error = relative_error(getattr(split, kind)[name], reference)
            assert error <= allowed, f"{where}: {kind} of {name} differ by {error:.2e}, allowed {allowed:.0e}"
    np.testing.assert_allclose(split.grad_norms, whole.grad_norms[0], rtol=1e-6, err_msg=where)
    np.testing.assert_allclose(split.inf_norms, whole.inf_norms[0], rtol=max(tolerance, 1e-6), err_msg=where)
    assert split.stepped == [True] * len(split.stepped)


def norm_error(mine: np.ndarray, reference: np.ndarray) -> float:
    """Norm of the difference over the norm of the reference."""
    assert mine.shape == reference.shape
    difference = float(np.linalg.norm(mine.astype(np.float64) - reference.astype(np.float64)))
    return (
        difference if difference == 0 else difference / max(float(np.linalg.norm(reference.astype(np.float64))), 1e-30)
    )


def assert_close(case: Case, split: Step, whole: Step, gradients: float, step: int) -> None:
    """Losses, norms, every parameter's gradient and every updated weight; `gradients` is the tolerance of the former.

    Weights move by less than they are, so their own tolerance is a fifth of it.
    """
    where = f"{case}, step {step}"
    assert set(split.weights) == set(whole.weights) and split.weights
    assert len(split.reports) == len(whole.reports)
    # Each way an activation and a gradient for each microbatch, once.
    copies = 2 * case.num_microbatches * case.edge.data
    model = case.config().model
    one_copy = 2 * SEQUENCE * model.hidden_size * (8 if case.precision == "fp64" else 4)
    assert split.crossed == (copies * one_copy, copies * one_copy), f"{where}: {split.crossed} bytes crossed the link"
    assert relative_error(split.reports, whole.reports) <= gradients, where
    for kind, allowed in (("gradients", gradients), ("weights", gradients / 5)):
        errors = {name: norm_error(getattr(split, kind)[name], r) for name, r in getattr(whole, kind).items()}
        name = max(errors, key=lambda one: errors[one])
        assert errors[name] <= allowed, f"{where}: {kind} of {name} differ by {errors[name]:.2e}, allowed {allowed:.0e}"
    for norms, reference in ((split.grad_norms, whole.grad_norms), (split.inf_norms, whole.inf_norms)):
        # Megatron works its norms out in float32 whatever the gradients are.
        np.testing.assert_allclose(norms, reference[0], rtol=max(gradients, 1e-6), err_msg=where)
    assert split.stepped == [True] * len(split.stepped)
