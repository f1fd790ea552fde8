"""What is to be planned: a run's config, a problem's file, or a U in a few numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ldt_schedules.cli.files import reading
from ldt_schedules.errors import ConfigError

if TYPE_CHECKING:
    from ldt_schedules.planning.layout import Layout
    from ldt_schedules.planning.problem import Problem
    from ldt_schedules.training.cost_model import CostRow


@dataclass(frozen=True)
class PlanInput:
    """A problem, the units its figures are in, and the memory budget that goes without saying.

    `time_unit` is "s" or a word for one time; `memory_unit` is "B" or a word. `rows` describes the stages of a config,
    `traces` are files of the measured steps, for `ldt draw`.
    """

    problem: Problem
    time_unit: str
    memory_unit: str
    budget: str
    rows: tuple[CostRow, ...] = ()
    traces: tuple[Path, ...] = ()


def from_file(path: Path) -> PlanInput:
    """A problem's own caps are its budget. Raises ConfigError or ScheduleError, the file named."""
    from ldt_schedules.planning.formats import problem_json

    problem = reading(path, problem_json.loads, "a problem as JSON (ldt-problem/1)")
    return PlanInput(problem, "units of time", "units of memory", "none")


def from_numbers(
    ranks: int | None, microbatches: int | None, domains: int, laps: int, latency: float, bandwidth: float | None,
    backward: float, cloud: float, freeze: str | None = None,
) -> PlanInput:  # fmt: skip
    """A U whose edge stages take 1 forward each, its cloud stages `cloud` forwards. `freeze` names stages that are not
    trained: of their backward, where there is one, only the gradient of the input is left, which is half of it."""
    from ldt_schedules.planning import Costs, Layout
    from ldt_schedules.planning.budgets import DEFAULT_BUDGET
    from ldt_schedules.planning.layout import EDGE_RANK
    from ldt_schedules.planning.problem import Problem

    if ranks is None or microbatches is None:
        raise ConfigError(
            "say what to plan: a config (ldt plan configs/quickstart.yaml), --problem FILE, or --ranks and "
            "--microbatches, for example --ranks 4 --microbatches 16 --latency 2"
        )
    layout = Layout.laps(ranks, laps, domains) if laps > 1 else Layout.u(ranks, domains)
    layout = layout.freeze(_stages_named(freeze, layout)) if freeze is not None else layout
    forward = tuple(1.0 if stage.ranks[0] == EDGE_RANK else cloud for stage in layout.stages)
    both = tuple(zip(layout.stages, forward, strict=True))
    costs = Costs(
        forward=forward,
        backward=tuple(backward * time / (2 if stage.frozen else 1) for stage, time in both),
        input_grad=tuple(None if stage.frozen else backward * time / 2 for stage, time in both),
        weight_grad=tuple(None if stage.frozen else backward * time / 2 for stage, time in both),
        latency=latency,
        bandwidth=bandwidth,
    )
    return PlanInput(Problem(layout, microbatches, costs), "forwards", "microbatches", DEFAULT_BUDGET)


def _stages_named(text: str, layout: Layout) -> set[int]:
    """The stages in a list of numbers and names, separated by commas. Raises ConfigError for what is neither."""
    known = {stage.name: stage.index for stage in layout.stages}
    known |= {str(stage.index): stage.index for stage in layout.stages}
    wanted = [word.strip() for word in text.split(",")]
    for word in wanted:
        if word not in known:
            there = ", ".join(f"{stage.index} {stage.name}" for stage in layout.stages)
            raise ConfigError(f"--freeze: there is no stage {word!r}; give numbers or names of these: {there}")
    return {known[word] for word in wanted}


def from_config(path: Path, overrides: list[str], measure: Path | None) -> PlanInput:
    """The step of a training run, from its shapes and declared hardware, or (`measure`) from a traced run of it.

    Raises:
        ConfigError: the config or the trace is not as it should be, or the edge trains alone.
    """
    from ldt_schedules.training.config import load_config
    from ldt_schedules.training.cost_model import describe_costs, problem_of

    config = load_config(path, overrides)
    if config.num_pipeline_ranks < 2:
        raise ConfigError("sites.cloud.pipeline_ranks is 0: the edge trains alone, and there is nothing to plan")
    traces: list[Path] = []
    if measure is None:
        problem = problem_of(config)
    else:
        from ldt_schedules.training.measured import measured_problem, write_step_traces

        problem = measured_problem(measure, config)
        traces = write_step_traces(measure, config)
    rows = tuple(describe_costs(problem, config))
    return PlanInput(problem, "s", "B", config.schedule.memory, rows, tuple(traces))
