"""`ldt launch` under a real torchrun, with real process groups and megatron-core; the training loop is a stand-in.

The same with the real loop of Megatron-LM: `test_real_checkout.py`.
"""

from __future__ import annotations

import functools
import itertools
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from ldt_schedules.comm.ports import free_ports
from ldt_schedules.planning import Layout, plan, write_table
from tests.megatron_lm.checkout import Figures, Finished, core_paths, core_version, started, torchrun, words

SCRIPT = Path(__file__).parent / "stand_in" / "pretrain_tiny.py"
ON = "--layerwise-disaggregated-training"
STEPS = (1, 2, 3)


def arguments(options: str) -> tuple[object, ...]:
    model = "--num-layers 4 --mock-data --calculate-per-token-loss --log-params-norm --own-flag 7"
    kept = f"--ldt-run-dir {tempfile.mkdtemp(prefix='ldt_run')}" if ON in options else ""
    return "launch", SCRIPT, *words(f"{model} {options} {kept}")


def launch(processes: int, options: str, **environment: str) -> Finished:
    return torchrun(processes, "ldt_schedules", *arguments(options), folder=SCRIPT.parent, **environment)


@functools.lru_cache
def unsplit() -> Figures:
    """One process, without the switch: Megatron's own schedule and whole model."""
    found = launch(1, "").require(*STEPS)
    assert {"validation iteration 2", "validation iteration 3 on test set"} < found.keys()
    return found


def worst(found: Figures, wanted: Figures) -> float:
    assert found.keys() == wanted.keys()
    return max(abs(x - y) / abs(y) for key in wanted for x, y in zip(found[key], wanted[key], strict=True))


def test_a_split_model_prints_what_the_whole_one_prints() -> None:
    """Tied embeddings, uneven layers, training, evaluation, test; the cloud says nothing of a loss and opens no data."""
    split = launch(3, f"{ON} --pipeline-model-parallel-size 3 --ldt-layers 1,0,2,1 --data-path /data/corpus")
    assert worst(split.require(*STEPS), unsplit()) <= 1e-6
    assert "layers 1 (head) + 1 (tail)" in split.output and "layers 0, 2" in split.output
    assert split.output.count("opens /data/corpus") == 1


def test_sites_of_other_tensor_and_data_sizes() -> None:
    sizes = "--tensor-model-parallel-size 2 --ldt-edge-tensor-model-parallel-size 1"
    split = launch(5, f"{ON} --pipeline-model-parallel-size 2 {sizes}")
    assert worst(split.require(*STEPS), unsplit()) <= 1e-5


def test_the_oldest_core() -> None:
    """megatron-core 0.12.1 under the same loop: every patch fits, the figures are those of the installed version."""
    oldest = [path for path in core_paths() if core_version(path / "megatron" / "core") == "0.12.1"]
    if not oldest:
        pytest.skip("MEGATRON_CORE_PATH names no folder of `pip install --target FOLDER megatron-core==0.12.1`")
    split = launch(3, f"{ON} --pipeline-model-parallel-size 3 --ldt-layers 1,1,1,1", PYTHONPATH=str(oldest[0]))
    assert worst(split.require(*STEPS), unsplit()) <= 1e-6


def test_sites_launched_apart(tmp_path: Path) -> None:
    """Two administrators, two launchers; --exit-interval stops both, and a process leaves only when all are done."""
    (port,) = free_ports(1)
    common = f"{ON} --pipeline-model-parallel-size 3 --ldt-link 127.0.0.1:{port} --exit-interval 2"
    with ThreadPoolExecutor() as pool:
        edge = pool.submit(launch, 1, f"{common} --ldt-site edge")
        cloud = pool.submit(launch, 2, f"{common} --ldt-site cloud --data-path /nowhere")
    assert cloud.result().code == 0, cloud.result().complaint
    assert "opens" not in cloud.result().output and "lm loss" not in cloud.result().output
    found, wanted = edge.result().require(1, 2), unsplit()
    assert found.keys() == {"iteration 1", "iteration 2", "validation iteration 2"}
    assert worst(found, {key: wanted[key] for key in found}) <= 1e-6


def test_a_killed_process_of_one_site_stops_the_other_sites_launch() -> None:
    """The edge's own torchrun knows nothing of the cloud; the watch tells it who has gone."""
    (port,) = free_ports(1)
    common = (
        f"{ON} --pipeline-model-parallel-size 2 --ldt-link 127.0.0.1:{port} --train-iters 100000 --eval-interval 100000"
    )
    module, folder = "ldt_schedules", SCRIPT.parent
    with (
        started(1, module, *arguments(f"{common} --ldt-site cloud"), folder=folder) as cloud,
        started(1, module, *arguments(f"{common} --ldt-site edge"), folder=folder) as edge,
    ):
        assert edge.stdout is not None
        seen = list(itertools.takewhile(lambda text: not re.match(" *iteration +3/", text), edge.stdout))
        (worker,) = psutil.Process(cloud.pid).children()
        worker.kill()
        begin = time.monotonic()
        rest, _ = edge.communicate(timeout=60)
        assert edge.returncode != 0 and time.monotonic() - begin < 15  # torchrun takes its time
    assert "ldt: edge rank 0 stops, because cloud rank 0 has gone without a word" in rest, (seen, rest)


@pytest.mark.parametrize(
    "edge, cloud, told",
    [
        ("--lr 0.1", "--lr 0.2", ["lr: edge 0.1, cloud 0.2", "give both sites the same command line"]),
        ("--load {folder}/a", "--load {folder}/b", ["iteration: edge 4, cloud 2", "(--ckpt-step)"]),
        ("--ldt-plan {folder}/gpipe.json", "", ["--ldt-plan (hash of the table): edge ", ", cloud (key unknown)"]),
    ],
    ids=["arguments", "checkpoints", "plan"],
)
def test_sites_that_differ_say_how_and_stop_both(edge: str, cloud: str, told: list[str], tmp_path: Path) -> None:
    for name, iteration in (("a/edge", 4), ("b/cloud", 2)):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    (tmp_path / "gpipe.json").write_text(write_table(plan("gpipe", Layout.u(2), 3), "json"))
    (port,) = free_ports(1)
    common = f"{ON} --pipeline-model-parallel-size 2 --ldt-link 127.0.0.1:{port}"
    with ThreadPoolExecutor() as pool:
        launched = [
            pool.submit(launch, 1, f"{common} --ldt-site {site} {options.format(folder=tmp_path)}")
            for site, options in (("edge", edge), ("cloud", cloud))
        ]
    for one in launched:
        assert one.result().code != 0
        assert "exitcode  : 2" in one.result().output and "Traceback" not in one.result().output.split("ldt: ")[0]
        assert all(text in one.result().output for text in told), one.result().complaint


@pytest.mark.parametrize(
    "options, told",
    [
        ("--ldt-layers 1,1,1", f"--ldt-layers without {ON}"),
        (f"{ON} --pipeline-model-parallel-size 2 --sft", "--sft: masks and sequence boundaries"),
        (f"{ON} --pipeline-model-parallel-size 2 --ldt-schedule auto_zb", "whole backwards"),
        (f"{ON} --pipeline-model-parallel-size 2 --ldt-plan none.json", "--ldt-plan none.json cannot be read"),
    ],
)
def test_mistakes_end_with_exit_code_2_before_anything_starts(options: str, told: str) -> None:
    environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "LDT_DEVICE": "cpu"}
    done = run_alone(["launch", str(SCRIPT), "--num-layers", "4", *words(options)], environment)
    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr, done.stderr


def run_alone(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    import os

    command = [sys.executable, "-W", "ignore", "-m", "ldt_schedules", *arguments]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)


def test_help_shows_the_argument_group() -> None:
    shown = run_alone(["launch", "--help"], {}).stdout
    for flag in (ON, "--ldt-site", "--num-layer-list", "--ldt-edge-tensor-model-parallel-size", "--ldt-link"):
        assert flag in shown
    assert "torchrun --nproc-per-node 3 -m ldt_schedules launch pretrain_gpt.py" in shown


def test_a_script_that_is_not_there() -> None:
    done = run_alone(["launch", "/nowhere/pretrain_gpt.py", ON], {})
    assert done.returncode == 2 and "/nowhere/pretrain_gpt.py is no file" in done.stderr
