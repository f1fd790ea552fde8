"""Checkpoints as the two sites of a small split run save them."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.workers import Workers, site_ports
from tests.parity.case import Case


def save_sites(workers: Workers, folder: Path, case: Case, steps: int) -> None:
    """Train and save `folder/edge/iter_…` and `folder/cloud/iter_…`."""
    ports, places = site_ports(), case.topology.places()
    workers.run(_rank, [(case, place.global_rank, ports, str(folder), steps) for place in places], timeout_s=110)


def _rank(case: Case, global_rank: int, ports: dict[str, int], folder: str, steps: int) -> None:
    from ldt_schedules.megatron import world
    from ldt_schedules.megatron.checkpoints.site_directory import Manifest
    from ldt_schedules.megatron.checkpoints.site_saver import SiteSaver
    from ldt_schedules.megatron.checkpoints.site_state import Trainee
    from ldt_schedules.training.config import shared_fingerprint
    from ldt_schedules.training.model import build
    from tests.parity.case import open_rank, run_schedule

    place, _ = open_rank(case, global_rank, ports)
    trained = build(case.config(), case.topology, place, case.vocabulary())
    for step in range(steps):
        trained.model.zero_grad_buffer()
        trained.optimizer.zero_grad()
        run_schedule(case, place, trained, step, forward_only=False)
        assert trained.optimizer.step()[0]
        trained.scheduler.step(1)
    settings = shared_fingerprint(case.config())
    manifest = Manifest(site=str(place.site), iteration=0, run="a run", sizes={}, settings=settings)
    saver = SiteSaver(Path(folder) / str(place.site), manifest)
    samples = steps * case.config().train.global_batch_size
    saver.save(Trainee(trained.model, trained.optimizer, trained.scheduler), steps, consumed_samples=samples)
    world.close_site()
