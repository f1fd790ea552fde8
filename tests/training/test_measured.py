"""Measured steps: what the processes of a real run write, and what is made of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from statistics import median

import pytest

from ldt_schedules.errors import ConfigError
from ldt_schedules.planning import plan, simulate
from ldt_schedules.planning.actions import Kind
from ldt_schedules.planning.formats import trace_json
from ldt_schedules.training.config import TrainConfig, load_config
from ldt_schedules.training.cost_model import describe_costs, problem_of
from ldt_schedules.training.measured import measured_problem, measured_timelines, write_step_traces
from tests.cli.test_train_runs import QUICKSTART, SMALL, finish, metrics, start

TRACED = [3, 4, 5]
OVERRIDES = [*SMALL, "train.iterations=6", "train.trace_iterations=3"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainConfig]:
    """One edge process and two cloud processes, 6 steps with evaluations between them, 3 of them traced."""
    directory = tmp_path_factory.mktemp("traced")
    (directory / "corpus.txt").write_text("".join(f"line {n}: {n * n} is the square of {n}\n" for n in range(2000)))
    overrides = [*OVERRIDES, f"data.path={directory / 'corpus.txt'}", f"train.output_dir={directory}"]
    code, _, err = finish(start(*overrides))
    assert code == 0, err
    return directory, load_config(QUICKSTART, overrides)


@pytest.fixture
def copy(run: tuple[Path, TrainConfig], tmp_path: Path) -> Path:
    """The traces alone, to break."""
    shutil.copytree(run[0] / "trace", tmp_path / "trace")
    return tmp_path


def content_of(directory: Path, rank: int) -> dict:
    return json.loads((directory / "trace" / f"rank{rank}.json").read_text())


def test_every_action_of_the_table_once_and_in_its_order(run: tuple[Path, TrainConfig]) -> None:
    directory, config = run
    table = plan(config.schedule.planner, problem_of(config).layout, config.num_microbatches)
    timelines = measured_timelines(directory, config)
    assert len(timelines) == len(TRACED)
    for timeline in timelines:
        assert timeline.num_ranks == 3
        for rank, row in enumerate(timeline.rows):
            assert [span.action for span in row] == [a for a in table.ranks[rank] if a.kind.is_compute]
            times = [time for span in row for time in (span.start, span.end)]
            assert times == sorted(times) and times[0] >= 0


def test_ranks_lie_on_one_clock(run: tuple[Path, TrainConfig]) -> None:
    """One machine, one clock: nothing starts before what it needs has ended."""
    for timeline in measured_timelines(run[0]):
        ends = {(s.action.kind, s.action.stage, s.action.microbatches): s.end for s in timeline.spans}
        starts = {(s.action.kind, s.action.stage, s.action.microbatches): s.start for s in timeline.spans}
        for (kind, stage, microbatch), begin in starts.items():
            source = stage - 1 if kind is Kind.F else stage + 1
            assert begin >= ends.get((kind, source, microbatch), 0.0)


def test_busy_and_waiting_fill_the_step(run: tuple[Path, TrainConfig]) -> None:
    """Spans and waits of a rank do not overlap and lie inside its step; the edge's agree with its metrics."""
    directory, _ = run
    timelines = measured_timelines(directory)
    for rank in range(3):
        steps = content_of(directory, rank)["steps"]
        assert [step["iteration"] for step in steps] == TRACED
        for step, timeline in zip(steps, timelines, strict=True):
            busy = sum(end - begin for _, begin, end in step["actions"])
            assert timeline.busy(rank) == pytest.approx(busy)
            assert busy > 0 and busy + step["waited_s"] <= step["step_s"]
            assert step["actions"][-1][2] <= step["step_s"] + 1e-3
    by_iteration = {m["iteration"]: m for m in metrics(directory) if m["event"] == "step"}
    for step, timeline in zip(content_of(directory, 0)["steps"], timelines, strict=True):
        assert 1 - timeline.busy(0) / step["step_s"] == pytest.approx(by_iteration[step["iteration"]]["bubble"])


def test_a_problem_of_medians(run: tuple[Path, TrainConfig]) -> None:
    directory, config = run
    measured, modelled = measured_problem(directory, config), problem_of(config)
    spans = [span for timeline in measured_timelines(directory) for span in timeline.spans]
    for stage in range(4):
        for kind in (Kind.F, Kind.B):
            lengths = [s.end - s.start for s in spans if s.action.kind is kind and s.action.stage == stage]
            assert len(lengths) == len(TRACED) * config.num_microbatches
            assert measured.costs.time(kind, stage, 0) == pytest.approx(median(lengths)) and median(lengths) > 0
        split = [measured.costs.time(kind, stage, 0) for kind in (Kind.I, Kind.W)]
        assert min(split) > 0 and sum(split) == pytest.approx(measured.costs.time(Kind.B, stage, 0))
    assert measured.costs.memory == modelled.costs.memory
    assert measured.costs.links == modelled.costs.links and measured.costs.size(0, 1, True) == 32 * 2 * 32 * 4
    table = plan("gpipe", measured.layout, measured.num_microbatches)
    assert simulate(measured.layout, table.ranks, measured.costs).makespan > 0
    assert all(row.forward_ms > 0 and row.backward_ms > 0 for row in describe_costs(measured, config))


def test_steps_as_files_that_can_be_drawn(run: tuple[Path, TrainConfig]) -> None:
    directory, config = run
    paths = write_step_traces(directory, config)
    assert [path.name for path in paths] == [f"step{iteration}.json" for iteration in TRACED]
    for path, timeline in zip(paths, measured_timelines(directory), strict=True):
        trace = trace_json.loads(path.read_text())
        assert (trace.unit, trace.num_microbatches) == ("s", config.num_microbatches)
        assert trace.timeline == timeline


def test_another_config_is_refused(run: tuple[Path, TrainConfig]) -> None:
    directory, config = run
    other = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch_size": 4})})
    with pytest.raises(ConfigError, match=r"another config:\n  train\.micro_batch_size: traced 2, given 4$"):
        measured_problem(directory, other)


def test_a_trace_that_is_missing_or_broken(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    def message(directory: Path) -> str:
        with pytest.raises(ConfigError) as caught:
            measured_timelines(directory)
        assert "train.trace_iterations=3" in str(caught.value)
        return str(caught.value)

    assert "holds no trace" in message(tmp_path_factory.mktemp("empty"))
    whole = content_of(copy, 1)
    path = copy / "trace" / "rank1.json"
    path.write_text(json.dumps({**whole, "steps": whole["steps"][:2]}))
    assert "rank1.json is of another run than rank0.json" in message(copy)
    path.write_text(json.dumps(whole)[:200])
    assert f"{path} is broken" in message(copy)
    path.write_text(json.dumps({**whole, "steps": []}))
    assert "it has no step" in message(copy)
    path.unlink()
    assert "lacks the trace of pipeline ranks [1] of 3" in message(copy)


def test_nothing_is_written_unless_asked(tmp_path: Path) -> None:
    """And what could not be traced is refused before anything starts."""
    from ldt_schedules.training.measured import trace_writer

    quiet = load_config(QUICKSTART, [*SMALL, f"train.output_dir={tmp_path}"])
    assert trace_writer(quiet, quiet.topology.place_of_global_rank(0)) is None
    for override, part in (
        ("train.iterations=4", "traces steps 3 to 5, but train.iterations is 4; set train.iterations=5 or more"),
        ("sites.cloud.pipeline_ranks=0", "sites.cloud.pipeline_ranks is 0; set train.trace_iterations=0"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(QUICKSTART, [*OVERRIDES, "layers=null", override])
        assert part in str(caught.value)
    two = {"tensor_parallel": 2}
    shared = [f"sites.edge={json.dumps(two)}", f"sites.cloud={json.dumps({**two, 'pipeline_ranks': 2})}"]
    config = load_config(QUICKSTART, [*OVERRIDES, *shared, f"train.output_dir={tmp_path}"])
    writers = [trace_writer(config, place) is not None for place in config.topology.places()]
    assert writers == [True, False, True, False, True, False]
    domains = [f"sites.edge={json.dumps({'data_parallel': 2})}", "sites.cloud.data_parallel=4"]
    config = load_config(QUICKSTART, [*OVERRIDES, *domains, f"train.output_dir={tmp_path}"])
    written = [place.pipeline_rank for place in config.topology.places() if trace_writer(config, place) is not None]
    assert sorted(written) == list(range(config.layout.num_ranks)) == [0, 1, 2, 3, 4]
