"""Plain Megatron's checkpoints are a split run's, with no tool between: any TP and PP, Adam's state included, and back.

plain Megatron    0 ─ 1 ─ saved ─ 2 ─ 3
                          └─ split, each site reads what it holds ─ 2 ─ 3 ─ saved, merged ─ plain Megatron ─ 4 ─ 5
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ldt_schedules.megatron.converting.merging import merge
from ldt_schedules.topology import Site, SiteSize
from tests.helpers.workers import site_ports
from tests.megatron.plain import CASE, continue_plain, save_plain
from tests.parity.case import Case, open_rank
from tests.parity.compare import joined

LR = (("lr", 1e-5),)  # with Adam a rounding of a gradient near 0 is a visible part of a step
USUAL = replace(CASE, train=LR)


def go_on(case, global_rank, ports, checkpoint, output):
    """A process of a split run: loads what it holds of a whole model's checkpoint, trains two steps, saves."""
    from ldt_schedules.megatron import world
    from ldt_schedules.megatron.checkpoints.site_directory import Manifest
    from ldt_schedules.megatron.checkpoints.site_saver import SiteSaver
    from ldt_schedules.megatron.checkpoints.site_state import Trainee, load_state
    from ldt_schedules.megatron.checkpoints.torch_dist import open_checkpoint
    from ldt_schedules.training.config import shared_fingerprint
    from ldt_schedules.training.model import build
    from tests.parity.case import one_step

    place, _ = open_rank(case, global_rank, ports)
    trained = build(case.config(), case.topology, place, case.vocabulary(), first_weights=False)
    trainee = Trainee(trained.model, trained.optimizer, trained.scheduler)
    load_state(trainee, open_checkpoint(checkpoint), schedule_steps=2)
    results = [one_step(case, place, trained, step) for step in (2, 3)]
    manifest = Manifest(str(place.site), 0, "run", {}, settings=shared_fingerprint(case.config()))
    SiteSaver(output / str(place.site), manifest).save(trainee, 4, 4 * case.config().train.global_batch_size)
    world.close_site()
    return results


def split_from(workers, case: Case, checkpoint, output):
    """Two steps of the split run, and its sites' checkpoints in `output`."""
    ports = site_ports()
    arguments = [(case, place.global_rank, ports, checkpoint, output) for place in case.topology.places()]
    ranks = workers.run(go_on, arguments, timeout_s=110)
    return joined(case, [list(step) for step in zip(*ranks, strict=True)])


def assert_close(mine, reference, tolerance=1e-6):
    assert mine.keys() == reference.keys()
    for name, value in reference.items():
        worst = np.abs(mine[name] - value).max() / np.abs(value).max()
        assert worst <= tolerance, (name, worst)


@pytest.mark.parametrize(
    ("tensor", "pipeline", "edge", "cloud", "changes"),
    [
        (1, 1, SiteSize(), SiteSize(tensor=2), {}),
        (1, 2, SiteSize(), SiteSize(), {"tied": True, "layers": (1, 2, 3, 0)}),
        (2, 1, SiteSize(tensor=2), SiteSize(), {"layers": (2, 3, 1)}),
        (2, 2, SiteSize(), SiteSize(tensor=2, data=2), {"layers": (2, 3, 1)}),
        (1, 2, SiteSize(tensor=2), SiteSize(tensor=1), {"precision": "bf16"}),
        (2, 1, SiteSize(), SiteSize(data=2), {"ddp": (("use_distributed_optimizer", True),), "layers": (2, 3, 1)}),
    ],
    ids=lambda value: str(value).replace("SiteSize", "") if not isinstance(value, int) else None,
)
def test_plain_megatron_to_split_and_back(workers, tmp_path, tensor, pipeline, edge, cloud, changes):
    """Losses, and the weights after 6 steps, two of them split, against plain Megatron alone."""
    case = replace(USUAL, edge=edge, cloud=cloud, **changes)
    sixteen = case.precision == "bf16"
    saved, whole, merged = tmp_path / "plain" / "iter_0000002", replace(case, ddp=()), tmp_path / "merged"
    reference = save_plain(workers, saved, whole, tensor=tensor, pipeline=pipeline, steps=2, more=4)
    steps = split_from(workers, case, saved, tmp_path)
    losses = [float(np.mean([loss / tokens for loss, tokens in step.reports])) for step in steps]
    merge(tmp_path / str(Site.EDGE), tmp_path / str(Site.CLOUD), merged, lambda done, total: None)
    step = merged / "iter_0000004"
    again = continue_plain(workers, step, whole, tensor=tensor, pipeline=pipeline, first=4, steps=2)
    np.testing.assert_allclose([*losses, *again.losses], reference.losses[2:], rtol=1e-2 if sixteen else 1e-6)
    assert_close(again.weights, reference.weights, 5e-3 if sixteen else 1e-6)
