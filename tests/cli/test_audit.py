"""`ldt audit`: the ledgers of a run put together, and what it says when they do not agree."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.helpers.cli import ldt
from tests.helpers.workers import Workers
from tests.training.checkpoint_runs import run_all, tiny

CASES = {
    "plain": (),
    "asymmetric": ("sites.edge.tensor_parallel=2", "sites.cloud.data_parallel=2", "train.eval_interval=2"),
    "lead": ("sites.cloud.tensor_parallel=2", "link.boundary=lead"),
}


@pytest.fixture(scope="module")
def run(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(workers, tmp_path_factory.mktemp("audit") / "plain", CASES["plain"])


def trained(workers: Workers, folder: Path, *starts: Sequence[str]) -> Path:
    """Two steps; with the options of several starts one after the other."""
    common = ("train.iterations=2", "train.save_interval=0")
    run_all(workers, *(tiny(folder, *common, *options) for options in starts))
    return folder


def figures(folder: Path) -> dict:
    done = ldt("audit", folder, "--json")
    return {"code": done.returncode, **json.loads(done.stdout)}


def test_all_accounts_agree_to_the_byte(run: Path) -> None:
    found = figures(run)
    (start,) = found["starts"]
    assert found["code"] == 0 and found["proven"] and start["verdict"] == "equal" and start["steps"] == 2
    sent = {(row["kind"], row["direction"]): row["sent"] for row in start["rows"]}
    # 16 x 2 tokens of 32 float32, 4 microbatches, 2 steps.
    one = {"messages": 8, "num_bytes": 8 * 16 * 2 * 32 * 4}
    assert all(sent[kind, way] == one for kind in ("activation", "gradient") for way in ("up", "down"))
    assert sent["header", "up"]["messages"] == 2 and ("header", "down") not in sent
    assert start["bytes_up"] == sum(count["num_bytes"] for (_, way), count in sent.items() if way == "up")
    screen = ldt("audit", run)
    assert screen.returncode == 0 and "Senders, receivers and plan agree to the byte." in screen.stdout
    assert "outputs of layers, [s, b, h]" in screen.stdout


@pytest.mark.parametrize("name", ["asymmetric", "lead"])
def test_other_layouts(workers: Workers, name: str, tmp_path: Path) -> None:
    found = figures(trained(workers, tmp_path / "run", CASES[name]))
    (start,) = found["starts"]
    assert found["code"] == 0 and start["verdict"] == "equal" and start["missing"] == []


def test_a_resumed_run_adds_an_entry(workers: Workers, tmp_path: Path) -> None:
    save = ("train.save_interval=1", "train.lr_decay_iterations=3")
    found = figures(trained(workers, tmp_path, save, (*save, "train.iterations=3", "train.resume=auto")))
    assert [start["steps"] for start in found["starts"]] == [2, 1] and found["code"] == 0


def changed(run: Path, folder: Path, process: str, edit) -> Path:
    (folder / "ledger").mkdir()
    for path in (run / "ledger").glob("*.json"):
        content = json.loads(path.read_text())
        if path.stem == process:
            edit(content["starts"][0])
        (folder / "ledger" / path.name).write_text(json.dumps(content))
    return folder


def test_more_than_was_planned(run: Path, tmp_path: Path) -> None:
    """A byte more than the table says, and the audit ends with exit code 1."""

    def one_byte(start):
        start["sent"]["activation"]["num_bytes"] += 1

    done = ldt("audit", changed(run, tmp_path, "edge-rank0", one_byte))
    assert done.returncode == 1 and "More passed the gates than the plan says" in done.stdout
    assert "activation up: sent 8 messages of 32,769 bytes" in done.stdout


def test_less_than_was_planned(run: Path, tmp_path: Path) -> None:
    """In a run that came to its end the accounts must agree; one that was stopped has sent less in its last step."""

    def one_message(start):
        start["sent"]["gradient"]["messages"] -= 1

    for name in ("ended", "stopped"):
        (tmp_path / name).mkdir()
    done = ldt("audit", changed(run, tmp_path / "ended", "edge-rank0", one_message))
    assert done.returncode == 1 and "The accounts differ" in done.stdout

    def stopped(start):
        one_message(start)
        start["complete"] = False

    done = ldt("audit", changed(run, tmp_path / "stopped", "edge-rank0", stopped))
    assert done.returncode == 0 and "in the last step less" in done.stdout


def test_a_ledger_without_this_start(run: Path, tmp_path: Path) -> None:
    """Two machines, and the cloud's files were forgotten: that is said, and nobody is accused."""
    folder = changed(run, tmp_path, "", lambda start: None)
    for name in ("cloud-rank0", "cloud-rank1"):
        (folder / "ledger" / f"{name}.json").unlink()
    done = ldt("audit", folder)
    assert done.returncode == 1 and "no ledger of this start from cloud rank 0, cloud rank 1" in done.stdout


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "ldt-ledger/1"}', "[" * 5000])
def test_what_is_no_ledger(content: str, tmp_path: Path) -> None:
    (tmp_path / "edge-rank0.json").write_text(content)
    done = ldt("audit", tmp_path)
    assert done.returncode == 2 and "is no ledger" in done.stderr and "Traceback" not in done.stderr
    empty = ldt("audit", tmp_path / "nowhere")
    assert empty.returncode == 2 and "has no ledgers; give the directory of a run" in empty.stderr
