"""Sites of different sizes on GPUs, under NCCL: the same comparison as `test_asymmetric.py`, one GPU a process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ldt_schedules.topology import SiteSize
from tests.parity.case import Case
from tests.parity.compare import run_whole
from tests.parity.test_asymmetric import SPLITS, check

SITES = {
    "tp 1 and 2": (SiteSize(1), SiteSize(2, sequence_parallel=True)),
    "tp 2 and 1": (SiteSize(2), SiteSize(1)),
    "dp 1 and 2": (SiteSize(), SiteSize(data=2)),
    "tp and dp 1 and 2": (SiteSize(), SiteSize(2, data=2)),
}


@pytest.mark.multi_gpu
@pytest.mark.parametrize("name", SITES)
def test_sites_of_different_sizes_under_nccl(workers, name):
    edge, cloud = SITES[name]
    case = Case(SPLITS[2], 4, edge=edge, cloud=cloud, optimizer="sgd", device="cuda")
    needed, found = case.topology.total_processes, torch.cuda.device_count()
    if found < needed:
        pytest.skip(f"needs {needed} GPUs, this machine has {found}")
    check(workers, [case, replace(case, per_token=True)])


@pytest.mark.multi_gpu
def test_a_gpu_gives_the_numbers_of_a_cpu(workers):
    """Of the model in one process, in float64: what the comparison above is made with."""
    if not torch.cuda.device_count():
        pytest.skip("needs 1 GPU, this machine has none")
    case = Case(SPLITS[2], 4, precision="fp64", optimizer="sgd")
    (on_cpu,), (on_gpu,) = run_whole(workers, [case]), run_whole(workers, [replace(case, device="cuda")])
    for mine, reference in zip(on_gpu, on_cpu, strict=True):
        for name, gradient in reference.gradients.items():
            assert abs(mine.gradients[name] - gradient).max() <= 1e-12 * abs(gradient).max(), name
