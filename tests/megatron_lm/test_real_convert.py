"""The real, unmodified `pretrain_gpt.py` loads what `ldt convert merge` writes, and goes on as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldt_schedules.megatron.converting.merging import merge
from ldt_schedules.megatron.converting.splitting import split
from ldt_schedules.planning.layout import Layout
from ldt_schedules.topology import Site
from ldt_schedules.training.huggingface_model import holder
from tests.megatron_lm.checkout import CHECKOUTS, Finished, assembled, torchrun
from tests.megatron_lm.test_real_checkout import BY_ITERATIONS, SPLIT, Options, Runs, line, worst

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.parametrize("checkout", CHECKOUTS, scope="session"),
]


@pytest.fixture(scope="session")
def runs(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("megatron_lm")
    return Runs(assembled(checkout, folder) / "pretrain_gpt.py", folder)


def silent(done: int, total: int) -> None:
    """In the place of a progress bar."""


def stock(runs: Runs, loaded: Path, *options: object, processes: int = 1) -> Finished:
    """An unsplit run with Megatron's own keys."""
    # Random states are of other processes; 0.12 insists on them.
    given = line(*BY_ITERATIONS, "--load", loaded, "--no-load-rng", *options)
    return torchrun(processes, "one_process", runs.script, *given, folder=runs.folder)


@pytest.mark.parametrize(
    "sizes",
    [(), ("--pipeline-model-parallel-size", 2), ("--use-checkpoint-args",)],
    ids=["one process", "PP 2", "args of the checkpoint"],
)
def test_a_split_and_merged_checkpoint_goes_on(runs: Runs, tmp_path: Path, sizes: Options) -> None:
    """To all printed digits: losses, gradient norms, validation; Adam's state and the place in the data are loaded."""
    layers, layout = (1, 2, 1), Layout.u(2)
    for site in Site:
        split(
            runs.checkpoint(), site, lambda *_: lambda name: holder(layers, layout, name), tmp_path / str(site), silent
        )
    merge(tmp_path / "edge", tmp_path / "cloud", tmp_path / "merged", silent)
    processes = 2 if "--pipeline-model-parallel-size" in sizes else 1
    found = stock(runs, tmp_path / "merged", *sizes, processes=processes).require(3, 4, 5)
    # Stock 0.12 takes the groups of parameters by position: the second pipeline rank decays its norms, no matrix.
    assert worst(found, runs.reference()) <= (1e-6 if runs.is_old and processes > 1 else 0)


def test_what_both_sites_saved_goes_on_in_one_process(runs: Runs, tmp_path: Path) -> None:
    """`ldt launch` trains two iterations split, Megatron's own loop saves a checkpoint a site."""
    if runs.is_old:
        pytest.skip("megatron-core 0.12 cannot write this format with a new torch")
    saving = ("--save", tmp_path / "saved", "--save-interval", 2)
    through = runs.split(2, *BY_ITERATIONS, *SPLIT, 2, *saving).require(1, 2, 3, 4, 5)
    edge, cloud = (tmp_path / "saved" / str(site) / "iter_0000002" for site in Site)
    done = merge(edge, cloud, tmp_path / "merged", silent)
    assert (done.iteration, done.num_layers, done.notes) == (2, 4, ())
    continued = stock(runs, tmp_path / "merged").require(3, 4, 5)
    # 0.16.1's console shows the mean of a start's first two losses as the second.
    (third, _), (fourth, norm) = through["iteration 3"][:2], through["iteration 4"][:2]
    assert continued.pop("iteration 4") == (pytest.approx((third + fourth) / 2, abs=1.01e-6), norm)
    assert continued == {key: through[key] for key in continued} and len(continued) >= 4
