"""Real MindSpeed checkouts on a CPU, each program in a process of its own.

They run where these name checkouts, and are skipped elsewhere with what is missing:

    MINDSPEED_PATH, MINDSPEED_MM_PATH, MINDSPEED_LLM_PATH    master or 26.1.0
    MEGATRON_LM_PATH                                         one or several, one of them core_v0.12.1
    MINDSPEED_DEPS_PATH                                      a folder with the packages they import (see docs/mindspeed.md)
"""

from __future__ import annotations

import functools
import json
import os
import pickle
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldt_schedules.comm.ports import free_ports
from ldt_schedules.topology import Topology
from tests.helpers.workers import site_ports
from tests.parity.compare import relative_error

ROOT = Path(__file__).parents[2]
PACKAGES = ("transformers", "datasets", "peft", "diffusers", "orjson", "ftfy", "av", "accelerate")


pytestmark = pytest.mark.slow


def megatron_version(checkout: Path) -> str:
    return str(runpy.run_path(str(checkout / "megatron/core/package_info.py"))["__version__"])


@functools.cache
def python_path(trainer: str) -> str:
    """What PYTHONPATH must be for a trainer; skips where something is missing, by name."""
    names = ("MINDSPEED_PATH", trainer)
    missing = [name for name in names if not Path(os.environ.get(name, "/nowhere")).is_dir()]
    if missing:
        pytest.skip(f"{', '.join(missing)}: no checkout named")
    given = [path for path in os.environ.get("MEGATRON_LM_PATH", "").split(os.pathsep) if Path(path).is_dir() and path]
    made_for = [path for path in given if megatron_version(Path(path)) == "0.12.1"]
    if not made_for:
        pytest.skip("MEGATRON_LM_PATH names no checkout of core_v0.12.1, which MindSpeed is made for")
    extra = os.environ.get("MINDSPEED_DEPS_PATH")
    folders = [*([extra] if extra else []), *(os.environ[name] for name in names), made_for[0], str(ROOT)]
    path = os.pathsep.join(folders)
    code = f"from importlib.util import find_spec; print(*(n for n in {PACKAGES} if find_spec(n) is None))"
    lacking = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    ).stdout.split()
    if lacking:
        pytest.skip(f"{', '.join(lacking)}: not installed (MINDSPEED_DEPS_PATH may name a folder that has them)")
    return path


def run(tmp_path: Path, trainer: str, task: str, arguments: Sequence[Sequence[Any]]) -> list[Any]:
    """Run a task of `real_mm` or `real_llm`, one process for each list of arguments; what each answered."""
    module = "tests.mindspeed.real_mm" if trainer == "MINDSPEED_MM_PATH" else "tests.mindspeed.real_llm"
    environment = {**os.environ, "PYTHONPATH": python_path(trainer), "OMP_NUM_THREADS": "1", "LDT_DEVICE": "cpu"}
    running = []
    for number, argument in enumerate(arguments):
        out, log = tmp_path / f"{task}{number}.pickle", tmp_path / f"{task}{number}.log"
        command = [sys.executable, "-W", "ignore", "-m", module, str(out), task, json.dumps(argument)]
        with log.open("w") as stream:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        running.append((process, out, log))
    try:
        for process, _, _ in running:
            process.wait(timeout=200)
    finally:
        for process, _, _ in running:
            process.kill()
    logs = "\n".join(log.read_text()[-3000:] for process, _, log in running if process.returncode)
    assert all(out.exists() for _, out, _ in running), logs
    return [pickle.loads(out.read_bytes()) for _, out, _ in running]


def mm(tmp_path: Path, task: str, *arguments: Any) -> Any:
    (answer,) = run(tmp_path, "MINDSPEED_MM_PATH", task, [arguments])
    return answer


def test_mm_applies_our_list_for_the_key(tmp_path):
    """Its own manager, twice: every declared target is ours, once, and nothing of its own list is left."""
    seen = mm(tmp_path, "take_over")
    assert seen["registered"] == seen["declared"] >= 10
    assert set(seen["wrappers"].values()) == {1}
    assert len(seen["marked"]) == seen["declared"], "a target does not hold our replacement"
    assert seen["theirs left"] == []
    assert seen["by name"], "megatron.core.pipeline_parallel still holds Megatron's own function"
    assert seen["args"] == {"world_size": 3, "tensor_model_parallel_size": 2, "data_parallel_size": 5}
    assert seen["initialize is Megatron's"] and seen["distributed changed"] == []


def test_mm_loses_its_own_list_where_it_was_applied(tmp_path):
    seen = mm(tmp_path, "take_back")
    assert seen["barrier was replaced"] and len(seen["before"]) >= 10, "nothing was applied: the test shows nothing"
    assert seen["left"] == []
    assert seen["barrier is torch's"] and seen["norm wraps Megatron's"]
    assert seen["print_rank_last is Megatron's"] == "print_rank_last"


@pytest.mark.parametrize(
    ("what", "messages"),
    [
        ("too early", ["mindspeed_mm must be imported before patches.mindspeed.install()"]),
        ("too late", ["MindSpeed-MM has replaced initialize_model_parallel already"]),
        ("no key", ["this MindSpeed-MM has no patch key 'layerwise_disaggregated_training'"]),
        (
            "version",
            ["get_forward_backward_func: megatron-core is 0.18.0", "post_validate_args_for_vtp: megatron-core is"],
        ),
        (
            "renamed",
            [
                "schedules:get_forward_backward_func: does not exist",
                "parallel_state:is_pipeline_last_stage: does not exist",
                "parallel_state_patch:post_validate_args_for_vtp: does not exist",
            ],
        ),
    ],
)
def test_mm_refusals(tmp_path, what, messages):
    seen = mm(tmp_path, "refusal", what)
    assert [message for message in messages if message not in seen["message"]] == [], seen["message"]
    assert seen["applied"] == ()


@pytest.mark.parametrize(("num_ranks", "per_token"), [(2, False), (3, True)])
def test_mm_train_step_with_three_chunks(tmp_path, num_ranks, per_token):
    """MM's own train step, real processes, float64: gradients and the reported loss of one process."""
    case = {"num_ranks": num_ranks, "num_microbatches": 3, "double": True, "per_token": per_token}
    whole = {**case, "num_ranks": 1, "like": num_ranks}
    ports, topology = site_ports(), Topology(num_ranks)
    ranks = run(
        tmp_path, "MINDSPEED_MM_PATH", "train", [(case, place.global_rank, ports) for place in topology.places()]
    )
    (reference,) = run(tmp_path, "MINDSPEED_MM_PATH", "train", [(whole, 0, site_ports())])
    names: list[str] = []
    for rank in ranks:
        names += rank["gradients"]
        assert rank["finalized"] == [[True, True, True]]
        for name, gradient in rank["gradients"].items():
            error = relative_error(gradient, reference["gradients"][name])
            assert error <= 1e-12, f"{name} differs by {error:.2e}"
    assert sorted(names) == sorted(reference["gradients"])
    np.testing.assert_allclose(ranks[0]["reports"]["loss"], reference["reports"]["loss"], rtol=1e-12)
    assert [rank["reports"] for rank in ranks[1:]] == [{}] * (num_ranks - 1)
    assert {chunk for _, chunk in ranks[0]["virtual"]} == {0, 1, 2}


@pytest.mark.parametrize(("num_ranks", "per_token"), [(2, False), (3, True)])
def test_mm_vision_language_model(tmp_path, num_ranks, per_token):
    """MM's own VLMModel, positions, forward step and train step: the gradients of its whole model in one process, where
    upstream cannot run one step. Microbatch 1 has no image, microbatch 0 three, each has its own length."""
    case = {"num_ranks": num_ranks, "num_microbatches": 3, "per_token": per_token}
    whole = {**case, "num_ranks": 1, "like": num_ranks}
    ports, topology = site_ports(), Topology(num_ranks)
    ranks = run(
        tmp_path, "MINDSPEED_MM_PATH", "vision", [(case, place.global_rank, ports) for place in topology.places()]
    )
    (reference,) = run(tmp_path, "MINDSPEED_MM_PATH", "vision", [(whole, 0, site_ports())])
    names: list[str] = []
    for rank in ranks:
        names += rank["gradients"]
        for name, gradient in rank["gradients"].items():
            assert np.abs(gradient).max() > 0, f"{name} has no gradient"
            error = relative_error(gradient, reference["gradients"][name])
            assert error <= 5e-6, f"{name} differs by {error:.2e}"
    assert sorted(names) == sorted(reference["gradients"]) and len(names) > 60
    assert ranks[0]["loss"].keys() == reference["loss"].keys()
    np.testing.assert_allclose(list(ranks[0]["loss"].values()), list(reference["loss"].values()), rtol=5e-6)
    for rank in ranks[1:]:
        assert {batch["pixel_values"] for batch in rank["seen"]} == {(36, 0), (0, 0)}
        assert {batch["input_ids"] for batch in rank["seen"]} == {(2, 30), (2, 27), (2, 24)}
        assert not any("labels" in batch for batch in rank["seen"])


def test_llm_picks_up_our_feature(tmp_path):
    """`import mindspeed_llm` on both processes of a split run, one edge and one cloud, and applied once more."""
    (port,) = free_ports(1)
    edge, cloud = run(tmp_path, "MINDSPEED_LLM_PATH", "features", [(True, 0, port), (True, 1, port)])
    for seen in (edge, cloud):
        assert seen["features"][-1] == "LdtSchedulesFeature" and len(seen["features"]) > 50
        assert not {"UShapedSplitFeature", "VTPFeature", "VirtualDPFeature"} & set(seen["features"])
        assert seen["ours"] == seen["declared"], "a target does not hold our replacement, or holds it twice"
        assert not seen["is Megatron's"] and seen["by name"]
        assert seen["theirs"] == [] and seen["distributed by us"] == []
        assert seen["our switch"] is True and seen["their switch"] == "absent"
        assert seen["environment"] == ("0", "1"), "each site is a world of one process"
        assert "--pipeline-model-parallel-size 1" in " ".join(seen["argv"])
    assert "NullTokenizer" in cloud["argv"] and "NullTokenizer" not in edge["argv"]


def test_llm_without_the_switch_is_as_before(tmp_path):
    (seen,) = run(tmp_path, "MINDSPEED_LLM_PATH", "features", [(False, 0, 1)])
    assert seen["ours"] == [] and seen["is Megatron's"] and seen["by name"]
    assert seen["our switch"] is False and seen["environment"] == ("0", "2")
    assert seen["features"][-1] == "LdtSchedulesFeature"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("too late", "mindspeed_llm is imported already"),
        ("version", "set_features_list: megatron-core is 0.14.0, checked on >=0.12.1,<0.13"),
    ],
)
def test_llm_refusals(tmp_path, what, message):
    (seen,) = run(tmp_path, "MINDSPEED_LLM_PATH", "refusal", [(what,)])
    assert message in seen["message"]
