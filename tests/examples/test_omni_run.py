"""The Omni example in six real processes, against one process with the whole model; and its script as users run it.

Measured where each process had one thread: for the tables that pack nothing every gradient is that of one process, bit for
bit, in float32 and float64. The packed table differs by rounding, since an audio or vision tower multiplies larger matrices:
1.3e-15 in float64, 3e-7 in float32.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers.models.qwen2_5_omni")

from examples.omni import packing, pipeline, samples, thinker
from ldt_schedules.comm.ports import free_ports
from ldt_schedules.errors import LdtError
from ldt_schedules.planning import Kind, read_table, validate
from ldt_schedules.planning.progress import Semantics
from tests.examples.omni_ranks import Case, Outcome, run_rank
from tests.helpers.workers import Workers

ROOT = Path(__file__).parents[2]
OMNI = ROOT / "examples" / "omni"
TABLES = ("omni_table.txt", "omni_packed.txt", "omni_1f1b.txt")
CASES = [Case(table, dtype, blocking) for table in TABLES for dtype in pipeline.LIMITS for blocking in (False, True)]
CASES.append(Case("omni_packed.txt", torch.float64, False, step=3))
RANKS = 6


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As on the ranks: another number of threads adds up in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def outcomes(workers: Workers) -> dict[Case, list[Outcome]]:
    """Of each case that of every rank; all in one world, since each process imports transformers anew."""
    (port,) = free_ports(1)
    by_rank = workers.run(run_rank, [(rank, RANKS, port, CASES) for rank in range(RANKS)], timeout_s=200)
    return {case: [found[number] for found in by_rank] for number, case in enumerate(CASES)}


def whole_losses(dtype: torch.dtype, data: list[samples.Microbatch]) -> list[float]:
    whole = thinker.build(pipeline.SEED, dtype)
    return [float(whole(**samples.whole_kwargs(batch)).loss.detach()) for batch in data]


def test_the_samples_are_as_uneven_as_they_should_be() -> None:
    data = pipeline.microbatches(0, 4)
    assert [batch["audio"] is None for batch in data] == [False, True, False, False]
    assert [batch["vision"] is None for batch in data] == [False, False, True, False]
    for name in ("audio", "vision", "text"):
        shapes = [tuple(next(iter(batch[name].values())).shape) for batch in data if batch[name] is not None]
        assert len(set(shapes)) == len(shapes) >= 3, name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_gradient_is_that_of_one_process(case: Case, outcomes: dict[Case, list[Outcome]]) -> None:
    data = pipeline.microbatches(case.step, 4)
    found: dict[str, Tensor | None] = {}
    for rank, outcome in enumerate(outcomes[case]):
        assert not found.keys() & outcome.gradients.keys(), "a rank holds what another holds"
        assert bool(outcome.losses) == (rank == RANKS - 1)
        found |= {name: None if one is None else torch.from_numpy(one) for name, one in outcome.gradients.items()}
    verified = pipeline.compared(found, pipeline.whole_gradients(case.dtype, data), pipeline.LIMITS[case.dtype])
    assert verified.count == len(dict(thinker.build(pipeline.SEED).named_parameters()))
    assert outcomes[case][-1].losses == pytest.approx(whole_losses(case.dtype, data), rel=verified.limit)


def test_the_tables() -> None:
    read = {name: read_table((OMNI / name).read_text(encoding="utf-8")) for name in TABLES}
    published, packed, one_f_one_b = read.values()
    for table in read.values():
        assert validate(table) == validate(table, Semantics.BLOCKING) == []
        assert table.layout.same_work(published.layout)
    for rank in range(3):
        computed = [action.microbatches for action in packed.ranks[rank] if action.kind.is_compute]
        assert computed == [(0, 1), (2, 3), (0, 1), (2, 3)]
    last = [(action.kind, action.microbatches) for action in one_f_one_b.compute_order()[5]]
    assert last == [(kind, (m,)) for m in range(4) for kind in (Kind.F, Kind.B)]


@pytest.mark.parametrize("group", [(0, 1), (2, 3), (1, 2, 3), (3, 2, 0), (4, 5, 6, 7)], ids=str)
@pytest.mark.parametrize("root", range(3), ids=thinker.STAGES[:3])
def test_a_packed_pass_is_one_pass_after_the_other(root: int, group: tuple[int, ...]) -> None:
    """Outputs and gradients, of microbatches of which some lack a modality and so have other keys than the rest."""
    table = read_table((OMNI / "omni_table.txt").read_text(encoding="utf-8"))
    stage = pipeline.own_stages(table, root, torch.float64)[root]
    data = [batch for step in range(2) for batch in pipeline.microbatches(step, 4)]
    inputs = [given for m in group if (given := (data[m]["audio"], data[m]["vision"], data[m]["text"])[root])]
    alone = [_parts(stage.module(**given)) for given in inputs]
    _sum_of_squares(alone).backward()
    expected = pipeline.gradients([stage.module])
    stage.module.zero_grad(set_to_none=True)
    together = [_parts(one) for one in stage.packing.split(stage.module(**stage.packing.pack(inputs)), inputs)]
    _sum_of_squares(together).backward()
    pipeline.compared(pipeline.gradients([stage.module]), expected, 1e-13)
    for mine, others in zip(together, alone, strict=True):
        torch.testing.assert_close(mine[0], others[0], rtol=1e-13, atol=1e-13)
        assert all(torch.equal(one, other) for one, other in zip(mine[1:], others[1:], strict=True))


def _parts(output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def _sum_of_squares(outputs: list[tuple[Tensor, ...]]) -> Tensor:
    return torch.stack([output[0].square().sum() for output in outputs]).sum()


def test_packing_counts_what_the_towers_return() -> None:
    table = read_table((OMNI / "omni_table.txt").read_text(encoding="utf-8"))
    audio, vision = (pipeline.own_stages(table, rank, torch.float32)[rank].module for rank in range(2))
    merge_size = thinker.tiny_config().vision_config.spatial_merge_size
    for batch in (samples.microbatch(thinker.tiny_config(), number) for number in range(8)):
        assert packing.audio_tokens(batch["audio"]) == len(audio(**batch["audio"]))
        assert packing.image_tokens(merge_size, batch["vision"]) == len(vision(**batch["vision"]))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"a": torch.ones(2)}, "on one side only: ['b']"),
        ({"a": torch.ones(2), "b": torch.zeros(2)}, "b has a gradient on its rank only"),
        ({"a": None, "b": None}, "a has a gradient in one process only"),
        ({"a": torch.tensor([1.0, 1.1]), "b": None}, "the gradient of a differs from that of one process by 7.1e-02"),
        ({"a": torch.tensor([1.0, torch.nan]), "b": None}, "the gradient of a differs"),
    ],
)
def test_a_wrong_gradient_is_noticed(found: dict[str, Tensor | None], message: str) -> None:
    with pytest.raises(LdtError) as caught:
        pipeline.compared(found, {"a": torch.ones(2), "b": None}, 5e-6)
    assert message in str(caught.value)


def run_script(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`python examples/omni/train.py`, as a user starts it."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, str(OMNI / "train.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, cwd=ROOT.parent)


@pytest.mark.slow
def test_the_script_trains_and_verifies() -> None:
    done = run_script("--steps", 2)
    assert done.returncode == 0, done.stderr
    first, step1, verified, step2 = done.stdout.splitlines()
    assert first == "omni_table.txt: 6 ranks, 4 microbatches a step, float32"
    assert step1.startswith("step   1   loss ") and step2.startswith("step   2   loss ")
    assert verified.startswith("verified: 152 gradients against one process, worst relative difference ")
    assert verified.endswith("limit 5e-06")


@pytest.mark.parametrize(
    ("cell", "by", "message"),
    [
        ("0,1,SEND_F,(2,),3", "0,1,SEND_F,(2,),4", "stage 0 of rank 1 feeds stage 1 of rank 3, but no stage on rank 4"),
        ("3,5,B,3,", "", "rank 5: B s5 m3 (or I and W) is missing"),
    ],
)
def test_the_script_refuses_a_wrong_table(cell: str, by: str, message: str, tmp_path: Path) -> None:
    text = (OMNI / "omni_table.txt").read_text(encoding="utf-8")
    wrong = tmp_path / "wrong.txt"
    wrong.write_text(text.replace(cell, by), encoding="utf-8")
    done = run_script("--table", wrong)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith(f"omni: {wrong}: ") and message in done.stderr


def test_the_script_refuses_a_table_for_another_model(tmp_path: Path) -> None:
    other = tmp_path / "u.txt"
    other.write_text((ROOT / "tests" / "golden" / "gpipe_p2_m2.txt").read_text(encoding="utf-8"), encoding="utf-8")
    done = run_script("--table", other)
    assert done.returncode == 2 and "is not for this model" in done.stderr
