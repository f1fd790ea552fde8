"""The launcher: no process outlives a run, and the first failure is the one that is shown."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ldt_schedules.comm.ports import free_ports
from ldt_schedules.topology import Site
from ldt_schedules.training import launcher
from ldt_schedules.training.config import TrainConfig
from ldt_schedules.training.launcher import Child, ChildFailed, run_all
from ldt_schedules.training.local_run import children

ROOT = Path(__file__).parents[2]
SLEEPS = "import time; time.sleep(60)"


def child(name: str, code: str, **environment: str) -> Child:
    return Child(name, (sys.executable, "-S", "-c", textwrap.dedent(code)), environment)


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "SETTLE_S", 0.2)
    monkeypatch.setattr(launcher, "TERMINATE_S", 0.5)


def alive(pid: int) -> bool:
    """Is it running? (A zombie that nobody has reaped yet is not.)"""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition: object, timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.02)
    return False


def pids_in(directory: Path, count: int) -> list[int]:
    """The children write their process ids into files of their own."""
    assert wait_for(lambda: len([f for f in directory.glob("*.pid") if f.read_text()]) == count)
    return [int(file.read_text()) for file in directory.glob("*.pid")]


def sleeper(name: str, directory: Path, before: str = "") -> Child:
    code = f"import os; open({str(directory / (name + '.pid'))!r}, 'w').write(str(os.getpid()))"
    return child(name, f"{before}\n{code}\n{SLEEPS}")


def once_there(file: Path, code: str) -> str:
    """Code that runs when `file` has been written: machines under test are busy, sleeping proves nothing."""
    wait = f"import os, sys, time\nwhile not os.path.exists({str(file)!r}) or not os.path.getsize({str(file)!r}):"
    return f"{wait}\n    time.sleep(0.01)\n{code}"


def test_all_end_well(tmp_path: Path) -> None:
    run_all(
        [child("edge rank 0", "pass"), child("cloud rank 1", "import os; print(os.environ['ME'])", ME="x")], tmp_path
    )
    assert (tmp_path / "cloud-rank1.log").read_text() == "x\n"


@pytest.mark.parametrize("code", [1, 2, 7])
def test_first_failure_stops_the_others_and_keeps_its_code(tmp_path: Path, code: int) -> None:
    fail = once_there(tmp_path / "edge rank 0.pid", f"print('the reason'); sys.exit({code})")
    failing = child("cloud rank 1", fail)
    start = time.monotonic()
    with pytest.raises(
        ChildFailed, match=f"cloud rank 1 failed with exit code {code}; the end of .*cloud-rank1.log"
    ) as caught:
        run_all([sleeper("edge rank 0", tmp_path), failing], tmp_path)
    assert caught.value.exit_code == code
    assert "the reason" in str(caught.value)
    assert time.monotonic() - start < 10
    assert not any(alive(pid) for pid in pids_in(tmp_path, 1))


def test_only_the_end_of_a_long_log_is_shown(tmp_path: Path) -> None:
    with pytest.raises(ChildFailed) as caught:
        run_all([child("cloud rank 0", "for i in range(100): print('line', i)\nraise SystemExit(1)")], tmp_path)
    assert "line 99" in str(caught.value) and "line 79" not in str(caught.value)


def test_the_first_to_fail_is_named_not_its_victims(tmp_path: Path) -> None:
    sign = tmp_path / "failing"
    culprit = child("cloud rank 0", f"import os; open({str(sign)!r}, 'w').write('now'); os._exit(3)")
    victim = child("edge rank 0", once_there(sign, "time.sleep(0.1); sys.exit(1)"))
    with pytest.raises(ChildFailed, match="cloud rank 0 failed with exit code 3"):
        run_all([victim, culprit], tmp_path)


def test_others_may_say_their_side_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "SETTLE_S", 10.0)
    sign = tmp_path / "failing"
    failing = child("edge rank 0", f"import os; open({str(sign)!r}, 'w').write('now'); os._exit(2)")
    other = child("cloud rank 0", once_there(sign, "print('my side'); sys.exit(2)"))
    with pytest.raises(ChildFailed):
        run_all([failing, other], tmp_path)
    assert (tmp_path / "cloud-rank0.log").read_text() == "my side\n"


def test_a_child_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    stubborn = sleeper("edge rank 0", tmp_path, before="import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    failing = child("cloud rank 0", once_there(tmp_path / "edge rank 0.pid", "sys.exit(1)"))
    with pytest.raises(ChildFailed):
        run_all([stubborn, failing], tmp_path)
    assert not any(alive(pid) for pid in pids_in(tmp_path, 1))


def test_killed_child(tmp_path: Path) -> None:
    with pytest.raises(ChildFailed, match=r"was killed by SIGKILL \(out of memory\?\)") as caught:
        run_all([child("cloud rank 0", "import os; os.kill(os.getpid(), 9)")], tmp_path)
    assert caught.value.exit_code == 1


def test_terminal_belongs_to_one_child(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    owner = Child("edge rank 0", (sys.executable, "-c", "print('bar')"), owns_terminal=True)
    run_all([owner, child("cloud rank 0", "print('hidden')")], tmp_path)
    assert capfd.readouterr().out == "bar\n"
    assert not (tmp_path / "edge-rank0.log").exists()


def test_handlers_are_given_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    run_all([child("edge rank 0", "pass")], tmp_path)
    assert signal.getsignal(signal.SIGTERM) is before


_LAUNCHES_TWO = """
import signal, sys
for number in (signal.SIGINT, signal.SIGHUP):  # whoever runs the tests may have switched them off (nohup)
    signal.signal(number, signal.SIG_DFL)
from pathlib import Path
from ldt_schedules.training.launcher import Stopped, run_all
from tests.training.test_launcher import sleeper
try:
    run_all([sleeper("edge rank 0", Path(sys.argv[1])), sleeper("cloud rank 0", Path(sys.argv[1]))], sys.argv[1])
except Stopped as stopped:
    print(stopped)
    sys.exit(stopped.exit_code)
"""


@pytest.fixture
def launching(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A launcher of two sleepers, in a process of its own."""
    command = [sys.executable, "-c", _LAUNCHES_TWO, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_all(launching: subprocess.Popen[str], tmp_path: Path, number: signal.Signals) -> None:
    pids = pids_in(tmp_path, 2)
    launching.send_signal(number)
    said, _ = launching.communicate(timeout=10)
    assert launching.returncode == 128 + number
    assert said == f"stopped by {number.name}; all processes were ended\n"
    assert not any(alive(pid) for pid in pids)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the children watch the launcher")
def test_no_orphan_when_the_launcher_is_killed(launching: subprocess.Popen[str], tmp_path: Path) -> None:
    pids = pids_in(tmp_path, 2)
    launching.kill()
    assert wait_for(lambda: not any(alive(pid) for pid in pids), 5)


def test_ports_are_different_and_free() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    assert all(10_000 <= port < 65_000 for port in ports)


def test_children_of_a_run() -> None:
    config = TrainConfig.model_validate({"train": {"threads": 3}})
    started = list(children("run.yaml", config, ["train.lr=1"], json_output=True))
    assert [c.name for c in started] == ["edge rank 0", "cloud rank 0", "cloud rank 1"]
    assert [c.owns_terminal for c in started] == [True, False, False]
    assert [c.environment["RANK"] for c in started] == ["0", "0", "1"]
    assert [c.environment["WORLD_SIZE"] for c in started] == ["1", "2", "2"]
    assert [c.environment["LOCAL_RANK"] for c in started] == ["0", "1", "2"]
    assert {c.environment["OMP_NUM_THREADS"] for c in started} == {"3"}
    edge_port, cloud_port = (started[i].environment["MASTER_PORT"] for i in (0, 1))
    links = {argument for c in started for argument in c.argv if argument.startswith("link.address=")}
    assert len(links) == 1
    assert len({edge_port, cloud_port, links.pop().rpartition(":")[2]}) == 3
    assert started[0].argv[:6] == [sys.executable, "-m", "ldt_schedules", "train", "run.yaml", "train.lr=1"]
    assert started[0].argv[-1] == "--json" and list(started[1].argv[-2:]) == ["--site", "cloud"]


def test_a_given_link_port_is_kept_and_an_edge_alone_has_no_cloud() -> None:
    config = TrainConfig.model_validate(
        {"link": {"address": "127.0.0.1:12345"}, "sites": {"cloud": {"pipeline_ranks": 0}}}
    )
    (only,) = children("run.yaml", config, [], json_output=False)
    assert only.name == "edge rank 0"
    assert not [argument for argument in only.argv if argument.startswith("link.")]
    assert config.site_processes(Site.CLOUD) == 0


def test_launcher_is_told_to_children(tmp_path: Path) -> None:
    run_all([child("edge rank 0", "import os; print(os.environ['LDT_LAUNCHER_PID'])")], tmp_path)
    assert (tmp_path / "edge-rank0.log").read_text().strip() == str(os.getpid())
