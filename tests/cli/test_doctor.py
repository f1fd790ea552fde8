"""`ldt doctor`: an installation, a link between two processes, what a failed run left; and every way in which it refuses."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
from importlib import metadata

import pytest

from ldt_schedules.comm.ports import free_ports
from ldt_schedules.comm.probe import meeting
from ldt_schedules.comm.probe.figures import LinkFigures, answer, conclude, measure
from ldt_schedules.comm.probe.wire import Garbage, Gone, Late, Wire
from ldt_schedules.errors import ConfigError, LdtError
from ldt_schedules.planning.reached import State
from ldt_schedules.runtime.flight_file import DamagedFile, parse_flight_file
from ldt_schedules.runtime.post_mortem import read_post_mortem
from ldt_schedules.training import installation
from ldt_schedules.training.config import TrainConfig
from ldt_schedules.training.link_forecast import forecast_link
from ldt_schedules.training.schedule import table_source
from tests.helpers.cli import ldt
from tests.helpers.flights import CAUSE, failed_run, flight, table_of, write_flights

CONFIG = "configs/quickstart.yaml"
HELLO = {"format": meeting.FORMAT, "site": "edge"}
ANSWER = {"format": meeting.FORMAT, "site": "cloud"}
SHORT = ("--seconds", "0.2")


def quiet(text):
    pass


def start(*arguments):
    """`ldt doctor` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "ldt_schedules", "doctor", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process):
    out, err = process.communicate(timeout=150)
    return process.returncode, out, err


class InThread:
    """A function in a thread; `result` waits for it and raises what it raised."""

    def __init__(self, function, *arguments):
        self._value = self._error = None
        self._thread = threading.Thread(target=self._run, args=(function, *arguments), daemon=True)
        self._thread.start()

    def _run(self, function, *arguments):
        try:
            self._value = function(*arguments)
        except BaseException as error:
            self._error = error

    def result(self):
        self._thread.join(60)
        assert not self._thread.is_alive()
        if self._error is not None:
            raise self._error
        return self._value


@pytest.fixture
def port():
    return free_ports(1)[0]


@pytest.fixture
def server():
    with meeting.open_port("127.0.0.1", 0) as listening:
        yield listening


def port_of(server):
    return server.getsockname()[1]


# The installation


def test_a_good_installation_is_told():
    result = ldt("doctor", "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(result.stdout)
    versions = {one["name"]: one["version"] for one in found["components"]}
    assert versions["torch"] and versions["megatron-core"] and found["problems"] == []
    assert found["cores"] >= 1 and "gloo" in found["backends"] and found["device_type"] in ("cpu", "cuda", "npu")


def test_a_broken_megatron_is_told_without_a_traceback(tmp_path):
    """A package `megatron` that stands before the right one, and breaks."""
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "__init__.py").write_text("")
    (tmp_path / "megatron" / "core.py").write_text("raise RuntimeError('no CUDA here,\\nsorry')")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = ['ldt', 'doctor']; "
        "from ldt_schedules.cli.app import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert result.returncode == 2 and "Traceback" not in result.stdout + result.stderr
    assert "import megatron.core fails: RuntimeError: no CUDA here, sorry" in " ".join(result.stdout.split())


def test_versions_out_of_range_and_missing_packages_say_what_to_install(monkeypatch):
    real = metadata.version

    def version(name):
        if name == "numpy":
            raise metadata.PackageNotFoundError(name)
        return {"megatron-core": "0.11.0", "torch": "2.6.0+cu124"}.get(name) or real(name)

    monkeypatch.setattr(installation.metadata, "version", version)
    monkeypatch.setattr(installation, "_import_problem", lambda module: None)
    found = installation.inspect_installation()
    assert found.problems == [
        "megatron-core: 0.11.0 is not >=0.12.1,<0.17; pip install 'megatron-core>=0.12.1,<0.17'",
        "numpy: not installed; pip install numpy",
    ]


# The link


def test_both_ends_here_measure_and_forecast():
    result = ldt("doctor", CONFIG, *SHORT, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    link, forecast = report["link"], report["forecast"]
    assert report["here"] and report["differing_config"] == report["differing_versions"] == []
    assert 0 < link["rtt_min_s"] <= link["rtt_s"] <= link["rtt_p95_s"] and link["up"] > 0 < link["down"]
    assert abs(link["clock_ahead_s"]) <= 1e-3 + link["clock_uncertain_s"], "one machine, one clock"
    # 4 microbatches of [128, 4, 128] in fp32, one process a rank.
    assert {(row["messages"], row["bytes"]) for row in forecast["rows"]} == {(4, 4 * 128 * 4 * 128 * 4)}
    assert len(forecast["rows"]) == 6 and forecast["step_s"] >= forecast["unlinked_step_s"] > 0
    assert forecast["assumed"] == [] and forecast["verdict"].startswith("the link is")


def test_two_sites_print_the_same_report(port):
    both = [
        start(CONFIG, f"link.address=127.0.0.1:{port}", "--site", site, *SHORT, "--wait", 100)
        for site in ("cloud", "edge")
    ]
    (code, cloud, said), (edge_code, edge, edge_said) = map(finish, both)
    assert code == edge_code == 0, said + edge_said
    assert cloud == edge and "round trip" in edge and "the link is" in edge and "same config" in edge
    assert "hardware.link_latency_ms=" in edge
    assert f"cloud: waiting at port {port} for the edge" in said


def test_sites_with_other_configs_name_the_keys(port):
    address = f"link.address=127.0.0.1:{port}"
    cloud = start(CONFIG, address, "train.lr=0.5", "data.path=/nowhere", "--site", "cloud", *SHORT, "--json")
    edge = start(CONFIG, address, "schedule.planner=gpipe", "--site", "edge", *SHORT, "--wait", 100)
    code, out, _ = finish(edge)
    assert code == 2
    assert "train.lr: edge 0.0015, cloud 0.5" in out and "schedule.planner: edge gpipe, cloud ldt_1f1b" in out
    assert "schedule (hash of the table): edge" in out and "data.path" not in out
    code, out, _ = finish(cloud)
    report = json.loads(out)
    assert code == 2 and len(report["differing_config"]) == 3 and report["forecast"] is None


def test_a_port_where_nobody_listens_is_refused(port):
    result = ldt("doctor", CONFIG, f"link.address=127.0.0.1:{port}", "--site", "edge", "--wait", 1)
    assert result.returncode == 1
    assert "refused: 127.0.0.1 answers, but nobody listens" in result.stderr and "--site cloud" in result.stderr
    assert "trying 127.0.0.1" in result.stderr and "Traceback" not in result.stderr


def test_a_cloud_to_which_nobody_comes_gives_up(port):
    result = ldt("doctor", CONFIG, f"link.address=127.0.0.1:{port}", "--site", "cloud", "--wait", 1)
    assert result.returncode == 1
    assert f"nobody came to port {port} within 1 s" in result.stderr and "--site edge" in result.stderr


@pytest.mark.parametrize(
    "stranger",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\xff\xff\xff\xff",
        b"\x00\x00\x00\x05{]}[(",
        b"\x00\x00\x00\x02[]",
        b"\x00\x00\x00\x0f" + b'{"format": "x"}',
        b"",
        b"\x00\x00",
    ],
)
def test_a_stranger_is_sent_away_and_waiting_goes_on(server, stranger):
    told = []
    cloud = InThread(meeting.listen, server, ANSWER, 30, told.append)
    # Closed with what he sent still unread, his connection is reset.
    with socket.create_connection(("127.0.0.1", port_of(server))) as connection, contextlib.suppress(OSError):
        connection.settimeout(20)
        connection.sendall(stranger)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(4096):
            pass  # an answer may come first: why he is not wanted
    wire, theirs = meeting.connect("127.0.0.1", port_of(server), HELLO, 30, quiet)
    assert theirs == ANSWER and cloud.result()[1] == HELLO
    assert any("sent away 127.0.0.1" in line for line in told)
    wire.close()


def test_a_cloud_with_a_name_listens_at_all_its_addresses():
    """The name may be that of a NAT before it, so it is not looked up."""
    with meeting.open_port("cloud.invalid", 0) as listening:
        cloud = InThread(meeting.listen, listening, ANSWER, 30, quiet)
        with meeting.connect("127.0.0.1", port_of(listening), HELLO, 30, quiet)[0]:
            wire, _ = cloud.result()
            assert wire.peer == "127.0.0.1"
            wire.close()


def test_a_silent_stranger_has_only_a_moment(server, monkeypatch):
    monkeypatch.setattr(meeting, "HELLO_S", 0.3)
    cloud = InThread(meeting.listen, server, ANSWER, 30, quiet)
    with socket.create_connection(("127.0.0.1", port_of(server))) as silent:
        silent.settimeout(20)
        assert silent.recv(1) == b""
        with meeting.connect("127.0.0.1", port_of(server), HELLO, 30, quiet)[0]:
            cloud.result()


def test_a_stranger_at_the_clouds_real_port_does_no_harm(port):
    address = f"link.address=127.0.0.1:{port}"
    cloud = start(CONFIG, address, "--site", "cloud", *SHORT, "--wait", 100)
    for line in cloud.stderr:
        if "waiting at port" in line:
            break
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(b"SSH-2.0-stranger\r\n" * 1000)
        result = ldt("doctor", CONFIG, address, "--site", "edge", *SHORT)
    code, out, err = finish(cloud)
    assert (code, result.returncode) == (0, 0), err + result.stderr
    assert out == result.stdout


def test_whoever_listens_and_is_no_doctor_is_named():
    with socket.create_server(("127.0.0.1", 0)) as other:

        def babble():
            connection, _ = other.accept()
            connection.sendall(b"SSH-2.0-OpenSSH\r\n")
            connection.recv(1 << 16)
            connection.close()
            other.close()

        babbling = InThread(babble)
        told = []
        with pytest.raises(LdtError, match="was not reached"):
            meeting.connect("127.0.0.1", port_of(other), HELLO, 1.5, told.append)
        babbling.result()
    assert "answers, but not as ldt doctor does" in told[0]


def test_two_edges_and_other_versions_of_the_protocol_are_refused(server):
    cloud = InThread(meeting.listen, server, ANSWER, 30, quiet)
    with pytest.raises(ConfigError, match=r"one speaks ldt-doctor/1, the other 'ldt-doctor/9'"):
        meeting.connect("127.0.0.1", port_of(server), {**HELLO, "format": "ldt-doctor/9"}, 10, quiet)
    with pytest.raises(ConfigError, match="says that it is the cloud; start one site as edge and one as cloud"):
        meeting.connect("127.0.0.1", port_of(server), ANSWER, 10, quiet)
    meeting.connect("127.0.0.1", port_of(server), HELLO, 10, quiet)[0].close()
    cloud.result()


def test_a_port_in_use_is_told(server):
    with pytest.raises(ConfigError, match=r"port \d+ \(link.address\) is in use on this machine"):
        meeting.open_port("127.0.0.1", port_of(server))


def test_each_way_of_not_reaching_has_its_remedy(monkeypatch):
    for error, says in (
        (TimeoutError(), "a firewall that drops packets"),
        (OSError(meeting.errno.EHOSTUNREACH, "No route to host"), "no route to .* is the VPN up"),
        (OSError(meeting.errno.ENETUNREACH, "Network is unreachable"), "no route to"),
        (OSError(meeting.errno.EACCES, "Permission denied"), "Permission denied; look at the address"),
    ):

        def fail(self, address, error=error):
            raise error

        monkeypatch.setattr(socket.socket, "connect", fail)
        with pytest.raises(LdtError, match=says):
            meeting.connect("127.0.0.1", 9, HELLO, 0.2, quiet)


def test_a_name_that_nobody_knows_is_told_at_once(monkeypatch):
    def fail(*arguments, **keywords):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(ConfigError, match="nobody knows the name 'cluod'"):
        meeting.connect("cluod", 9, HELLO, 60, quiet)


def pair():
    """Two ends of one connection."""
    with meeting.open_port("127.0.0.1", 0) as listening:
        near = socket.create_connection(("127.0.0.1", port_of(listening)))
        far, _ = listening.accept()
    return Wire(near, "near"), Wire(far, "far")


def test_a_wire_refuses_what_is_too_long_and_does_not_wait_for_ever():
    near, far = pair()
    with near, far:
        near.connection.sendall(b"\x7f\xff\xff\xff")
        with pytest.raises(Garbage, match="a message of 2147483647 bytes"):
            far.receive(5)
        with pytest.raises(Late):
            near.receive(0.1)
        far.close()
        with pytest.raises(Gone):
            near.receive(5)


def test_what_comes_over_a_wire_cannot_command_a_terminal():
    near, far = pair()
    with near, far:
        near.send({"host\x1b": ["\x1b[2J", "\u0085", "é ✓"], "n": 1}, 5)
        assert far.receive(5) == {"host?": ["?[2J", "?", "é ✓"], "n": 1}


def test_a_measurement_whose_other_end_goes_away_says_so():
    near, far = pair()
    cloud = InThread(answer, far)
    near.send({"do": "ping"}, 5)
    near.receive(5)
    near.close()
    with pytest.raises(LdtError, match="the measurement broke off: .* at the edge"):
        cloud.result()
    near, far = pair()
    far.close()
    with near, pytest.raises(LdtError, match="the measurement broke off: .* at the cloud"):
        measure(near, 0.1, quiet)


@pytest.mark.parametrize("asked", [{"do": "rm"}, {}, {"do": "send", "seconds": "1"}, {"do": "end", "report": 1}])
def test_a_cloud_does_only_what_it_knows(asked):
    near, far = pair()
    with near, far:
        cloud = InThread(answer, far)
        near.send(asked, 5)
        with pytest.raises(LdtError, match="the measurement broke off"):
            cloud.result()


def test_the_cloud_learns_what_came_of_it():
    near, far = pair()
    with near, far:
        cloud = InThread(answer, far)
        figures = measure(near, 0.1, quiet)
        conclude(near, {"what": "came of it"})
        assert cloud.result() == {"what": "came of it"}
    assert figures.num_pings == 50 and figures.up > 0 < figures.down


# What the plan expects


def figures(rtt_s=1e-4, up=1e9, down=1e9):
    return LinkFigures(rtt_s, rtt_s, rtt_s, 50, up, down, 0.0, 0.0, 1500, 1448, 1500, 1448)


def config(**sections):
    speeds = {"edge_tflops": 1.0, "cloud_tflops": 1.0}
    return TrainConfig(**{"hardware": speeds, **sections})


def verdict(run, link):
    return forecast_link(run, table_source(run), link)


def test_a_narrow_link_is_named_as_the_bottleneck():
    run = config()
    narrow = verdict(run, figures(up=1e5))
    # 8 microbatches of [128, 4, 128] in fp32, activations and gradients.
    assert narrow.up_wire_s == pytest.approx(2 * 8 * 128 * 4 * 128 * 4 / 1e5)
    assert narrow.step_s >= narrow.up_wire_s > narrow.unlinked_step_s
    assert (
        narrow.verdict.startswith("the link is the bottleneck: the wire up is busy")
        and "precision=bf16" in narrow.verdict
    )


def test_a_long_link_is_told_apart_from_a_narrow_one():
    run = config()
    far = verdict(run, figures(rtt_s=2.0))
    assert far.step_s >= far.unlinked_step_s + 2.0
    assert "schedule.planner=auto" in far.verdict and "bottleneck" not in far.verdict
    near = verdict(run, figures())
    assert near.verdict.startswith("the link is busy ") and near.step_s < 1.2 * near.unlinked_step_s


def test_it_says_what_it_assumes_and_what_it_cannot_know():
    assumed = verdict(TrainConfig(), figures()).assumed
    assert (
        assumed[0] == "hardware.edge_tflops is not in the config: 10 TFLOP/s a device are assumed" and len(assumed) == 2
    )
    strange = verdict(config(model={"megatron": {"num_moe_experts": 4}}), figures())
    assert strange.step_s is None and "num_moe_experts" in strange.assumed[0] and "not known here" in strange.verdict


# A mistaken command


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--site", "edge"), "--site edge needs the config"),
        ((CONFIG, "--site", "edge"), "the sites meet at a port that both know"),
        ((CONFIG, "sites.cloud.pipeline_ranks=0", "layers=[8]"), "there is no link"),
        ((CONFIG, "--post-mortem", "x"), "leave out the config"),
        (("--out", "x.png"), "--out goes with --post-mortem"),
        (("--post-mortem", "x", "--out", "x.gif"), "the name must end in .png or .svg"),
        (("--post-mortem", "/nowhere"), "/nowhere is no directory"),
    ],
)
def test_a_mistaken_command_is_one_message(arguments, says):
    result = ldt("doctor", *arguments)
    assert result.returncode == 2 and says in result.stderr and "Traceback" not in result.stderr


# After a failure


def test_a_failed_run_is_put_together(tmp_path):
    table = failed_run(tmp_path / "flight")
    result = ldt("doctor", "--post-mortem", tmp_path / "flight", "--out", tmp_path / "x.svg", "--verbose")
    assert result.returncode == 0, result.stderr
    screen = " ".join(result.stdout.split())
    assert CAUSE["text"] in screen and "files of 3 of 3 processes" in screen
    assert f"6 of {len(table.ranks[0])} done" in screen and "✗ F s0 m2 · SEND_F s0 m2 ->1" in screen
    assert "◇ F s1 m2" in screen and "executor.py:141 run_row" in screen
    assert (
        "cloud rank 0 step 3, 3 updates; at F s1 m2, waits for RECV_F s1 m2 <-0 for 41.2 s; heard edge 41.3 s,"
        in screen
    )
    svg = (tmp_path / "x.svg").read_text()
    assert "sample 17 has no text" in svg and 'id="failed-0-F-s0"' in svg and 'id="done-1-F-s1"' in svg


def test_rows_say_what_was_done_of_what_was_expected(tmp_path):
    table = failed_run(tmp_path)
    found = read_post_mortem(tmp_path)
    edge, first, _ = found.rows
    assert edge.states[:8] == (*[State.DONE] * 6, State.FAILED, State.NOT_BEGUN)
    assert first.at == [str(action) for action in table.ranks[1]].index("F s1 m2") and first.state is State.WAITING
    assert found.cause.process == "edge rank 0" and found.missing == () and found.step == 3


def test_processes_without_a_file_and_damaged_files_are_named(tmp_path):
    failed_run(tmp_path)
    (tmp_path / "cloud-rank1.json").unlink()
    whole = (tmp_path / "cloud-rank0.json").read_text()
    (tmp_path / "cloud-rank0.json").write_text(whole[: len(whole) // 2])
    result = ldt("doctor", "--post-mortem", tmp_path)
    screen = " ".join(result.stdout.split())
    assert result.returncode == 0 and "no file of cloud rank 1: killed" in screen
    assert "cloud-rank0.json is damaged: it is cut off" in screen and "nothing is known" in screen
    figures = json.loads(ldt("doctor", "--post-mortem", tmp_path, "--json").stdout)
    assert figures["missing"] == ["cloud rank 1"] and figures["damaged"][0]["process"] == "cloud rank 0"
    assert figures["ranks"][0] == {"rank": 0, "done": 6, "actions": 48, "at": "F s0 m2", "state": "failed"}


def test_a_killed_process_leaves_others_that_waited_for_it(tmp_path):
    """Nobody failed: the others noticed a silence, and one of them was already in the next step."""
    table = table_of()
    silence = {"process": "cloud rank 0", "text": "cloud rank 0 was not heard of for 30 s"}
    write_flights(
        tmp_path,
        [
            flight(table, "edge rank 0", 0, 10, cause=silence, own_failure=False, step=4),
            flight(table, "cloud rank 1", 2, 5, cause=silence, step=3, now=None),
        ],
    )
    found = read_post_mortem(tmp_path)
    assert found.missing == ("cloud rank 0",) and found.step == 3
    assert found.rows[0].states == (State.DONE,) * 48, "it is a step ahead"
    assert set(found.rows[1].states) == {State.UNKNOWN} and found.rows[2].at is None
    assert ldt("doctor", "--post-mortem", tmp_path).returncode == 0


def test_before_the_first_step_there_is_a_cause_and_no_table(tmp_path):
    cause = {"process": "edge rank 0", "text": "edge rank 0: OSError: no such file", "step": None}
    early = {**flight(table_of(), "edge rank 0", 0, 0), "cause": cause, "step": -1, "table": None, "now": None}
    write_flights(tmp_path, [early])
    result = ldt("doctor", "--post-mortem", tmp_path)
    assert result.returncode == 0 and "OSError: no such file" in result.stdout and "Step" not in result.stdout
    refused = ldt("doctor", "--post-mortem", tmp_path, "--out", tmp_path / "x.png")
    assert refused.returncode == 2 and "nothing to draw" in refused.stderr


def test_the_process_that_came_least_far_is_the_row(tmp_path):
    table = table_of()
    both = [
        flight(table, f"edge rank {rank}", 0, done, processes=5, own_failure=False, cause=None)
        for rank, done in enumerate((9, 4))
    ]
    write_flights(tmp_path, both)
    found = read_post_mortem(tmp_path)
    assert found.rows[0].done == 4 and found.cause is None
    assert found.missing == ("cloud rank 0",) and found.num_missing == 3
    assert "no process told a cause" in ldt("doctor", "--post-mortem", tmp_path).stdout


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "ldt-flight/2"}, "\"format\" is 'ldt-flight/2', expected"),
        ({"done": "many"}, "\"done\" is 'many'"),
        ({"done": -1}, '"done" is '),
        ({"table": {"format": "ldt-table/1"}}, '"table" cannot be read'),
        ({"now": {"what": 3}}, '"now.what" is'),
        ({"site": "moon"}, '"site" is'),
        ({"processes": 0}, '"processes" is'),
    ],
)
def test_a_damaged_file_says_what_is_wrong_with_it(change, says):
    content = flight(table_of(), "edge rank 0", 0, 8)
    with pytest.raises(DamagedFile) as found:
        parse_flight_file(json.dumps({**content, **change}))
    assert says in str(found.value)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"format": "ldt-flight/1"}', "[" * 100_000])
def test_anything_else_is_damaged_too(text):
    with pytest.raises(DamagedFile):
        parse_flight_file(text)


def test_a_key_that_is_not_known_is_let_pass():
    content = {**flight(table_of(), "edge rank 0", 0, 8), "colour": "red"}
    assert parse_flight_file(json.dumps(content)).process == "edge rank 0"
