"""What a vision-language step costs: counted by hand, and against the stages themselves."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from ldt_schedules.planning import plan, simulate
from ldt_schedules.planning.actions import Kind
from ldt_schedules.planning.planners import plan_problem
from ldt_schedules.training.config import TrainConfig
from ldt_schedules.training.cost_model import (
    GIB,
    activation_bytes,
    describe_costs,
    problem_of,
    stage_work,
    static_bytes,
)
from ldt_schedules.training.describe import describe_run
from ldt_schedules.training.parameters import stage_parameters, trained_parameters, vision_parameters
from ldt_schedules.training.screens import first_screen
from ldt_schedules.training.stage_work import StageWork
from ldt_schedules.training.vision_shapes import Patches
from tests.training.measuring import of_both_sites
from tests.training.test_screens import rendered

VOCABULARY = 384  # bytes, and the special tokens of a conversation, padded
VISION = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "window_size": 56, "patch_size": 14}
MODEL = {"num_layers": 4, "hidden_size": 128, "num_attention_heads": 4, "num_query_groups": 2, "seq_length": 48}
RICH = {"activation": "swiglu", "qkv_bias": True, "ffn_hidden_size": 320}
PARTS = ("vit", "projector", "language")
FROZEN = [list(some) for size in range(3) for some in itertools.combinations(PARTS, size)]


def given(vision: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    """25 tokens, so 100 patches, of a picture: 5 x 5 tokens in windows of 2 x 2, 2 x 1, 1 x 2 and 1."""
    content = {
        "model": {**MODEL, **(model or {})},
        "vision": {**VISION, "max_pixels": 140**2, "full_attention_layers": [3], **(vision or {})},
        "layers": {"vit": [1, 2, 1], "llm": [0, 3, 1]},
        "sites": {"cloud": {"pipeline_ranks": 1}},
        "schedule": {"planner": "ldt_2lap_1f1b"},
        "train": {"global_batch_size": 8, "micro_batch_size": 2},
    }
    return {**content, **sections}


def config_of(
    vision: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **sections: Any
) -> TrainConfig:
    return TrainConfig.model_validate(given(vision, model, **sections))


def test_work_by_hand() -> None:
    """Every product written out; M = 2 samples, 200 patches, 96 tokens."""
    work = stage_work(config_of(), VOCABULARY)
    embed = 2 * 200 * (3 * 2 * 14 * 14) * 64
    # QKV, projection, gate and up, down.
    vit = 2 * 200 * (64 * 192 + 64 * 64 + 64 * 512 + 256 * 64)
    # Scores, and scores times values: 4 windows of 16 patches, 2 + 2 of 8, 1 of 4, in each of 2 pictures; or all 100.
    windows = 2 * 2 * 64 * 2 * (4 * 16**2 + 4 * 8**2 + 4**2)
    frame = 2 * 2 * 64 * 2 * 100**2
    projector = 2 * 50 * (256 * 256 + 256 * 128)
    language = 2 * 96 * (128 * 256 + 128 * 128 + 128 * 512 + 512 * 128)
    causal = 2 * 2 * 128 * 2 * (48 * 49 // 2)
    output = 2 * 96 * 128 * VOCABULARY

    def of(linear: float, core: float, without_input: float = 0.0) -> StageWork:
        """The backward's core: scores again, and two gradients of each product."""
        return StageWork(linear + core, linear - without_input + core * 5 / 2, linear)

    expected = [
        of(embed + vit, windows, embed),
        of(2 * vit, 2 * windows),
        of(vit + projector, frame),
        of(3 * language, 3 * causal),
        of(language + output, causal),
    ]
    assert list(work) == expected


def test_what_is_recomputed() -> None:
    base = stage_work(config_of(), VOCABULARY)
    selective, full = (
        stage_work(config_of(train={"global_batch_size": 8, "micro_batch_size": 2, "recompute": how}), VOCABULARY)
        for how in ("selective", "full")
    )
    windows, language = 2 * 2 * 64 * 2 * (4 * 16**2 + 4 * 8**2 + 4**2), base[3].forward
    assert selective[1].input_grad - base[1].input_grad == 2 * windows
    assert full[3].input_grad - base[3].input_grad == language
    assert [work.forward for work in full] == [work.forward for work in base]


def test_the_images_are_an_estimate() -> None:
    """A square of max_pixels in whole tokens, as many as samples have, and as a sequence has places for."""
    assert Patches.of(config_of()) == Patches(200, pytest.approx((4 * 16**2 + 4 * 8**2 + 4**2) / 100), 100)
    assert Patches.of(config_of(hardware={"images_per_sample": 0.25})).count == 50
    assert Patches.of(config_of(hardware={"images_per_sample": 7})).count == 2 * 48 * 4
    assert Patches.of(config_of({"max_pixels": 150**2})).count == 200  # no more whole tokens
    assert Patches.of(config_of({"max_pixels": 3136, "min_pixels": 3136, "window_size": 112})) == Patches(32, 16, 16)


def test_more_pixels_are_more_work() -> None:
    small, large = (problem_of(config_of({"max_pixels": pixels})).costs for pixels in (84**2, 168**2))
    assert all(a < b for a, b in zip(small.forward[:3], large.forward[:3], strict=True))
    assert all(a < b for a, b in zip(small.memory[:3], large.memory[:3], strict=True))
    assert small.forward[3:] == large.forward[3:] and small.memory[3:] == large.memory[3:]
    assert 4 * small.size(1, 2, True) == large.size(1, 2, True) and small.size(3, 4, True) == large.size(3, 4, True)
    none = problem_of(config_of(hardware={"images_per_sample": 0})).costs
    assert none.forward[:3] == none.backward[:3] == (0.0,) * 3 and none.size(0, 1, True) == 0
    assert none.forward[3:] == small.forward[3:]


def test_messages_differ_by_lap() -> None:
    costs = problem_of(config_of()).costs
    patches, tokens = 200 * 64 * 4, 48 * 2 * 128 * 4
    for forward in (True, False):
        assert [costs.size(stage, stage + 1, forward) for stage in range(4)] == [patches, patches, tokens, tokens]


@pytest.mark.parametrize("frozen", FROZEN, ids=str)
def test_frozen_parts(frozen: list[str]) -> None:
    """No W where nothing learns, no backward before the first that does; less memory; the rest as ever."""
    config, whole = config_of({"frozen": frozen}), config_of()
    problem = problem_of(config)
    layout, costs, all_costs = problem.layout, problem.costs, problem_of(whole).costs
    assert costs.forward == all_costs.forward
    for stage in layout.stages:
        s = stage.index
        assert isinstance(costs.weight_grad, tuple) and isinstance(costs.input_grad, tuple)
        assert isinstance(costs.backward, tuple) and isinstance(costs.memory, tuple)
        assert (costs.memory[s] > 0) == layout.has_backward(s)
        # All that learns in the joining stage may be the text embedding, which is looked up, not multiplied.
        looked_up = s == 2 and frozen == ["vit", "projector"]
        assert (costs.weight_grad[s] > 0) == (not stage.frozen and not looked_up)
        assert (costs.backward[s] > 0) == (layout.has_backward(s) and not looked_up)
        assert costs.backward[s] == pytest.approx(costs.input_grad[s] + costs.weight_grad[s])
        assert costs.held(s) <= all_costs.held(s)
    for rank in range(2):
        parts = [vision_parameters(config, VOCABULARY)[s] for s in layout.stages_on(rank)]
        lost = sum(count for one in parts for name, count in one.items() if name in frozen)
        assert static_bytes(whole, rank, VOCABULARY) - static_bytes(config, rank, VOCABULARY) == lost * (4 + 8)
    table = plan("ldt_2lap_1f1b", layout, problem.num_microbatches)
    assert simulate(layout, table.ranks, costs).makespan <= simulate(whole.layout, table_of(whole), all_costs).makespan


def table_of(config: TrainConfig) -> Any:
    return plan("ldt_2lap_1f1b", config.layout, config.num_microbatches).ranks


def test_a_frozen_vit_in_the_joining_stage_keeps_nothing() -> None:
    """The projector learns: a norm [200, 64], its mean square, gelu's input and output [50, 256]; the input is held."""
    config = config_of({"frozen": ["vit"]})
    assert activation_bytes(config, VOCABULARY)[:3] == (0, 0, 4 * (3 * 200 * 64 + 200 + 2 * 50 * 256 + 200 * 64))
    assert stage_work(config, VOCABULARY)[2].weight_grad == 2 * 50 * (256 * 256 + 256 * 128)


def splits(total: int, places: int) -> list[list[int]]:
    found = [[*counts, total - sum(counts)] for counts in itertools.product(range(total + 1), repeat=places - 1)]
    return [counts for counts in found if counts[-1] >= 0]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_split_holds_the_same_model(ranks: int) -> None:
    """Work and parameters add up to the same, however 2 and 2 layers are split; 0 layers anywhere are fine."""
    totals = set()
    for vit, llm in itertools.product(splits(2, ranks + 1), repeat=2):
        config = config_of(
            {"num_layers": 2, "full_attention_layers": [1]},
            {"num_layers": 2},
            layers={"vit": vit, "llm": llm},
            sites={"cloud": {"pipeline_ranks": ranks - 1}},
        )
        work = sum(stage_work(config, VOCABULARY), StageWork())
        parameters = stage_parameters(config, VOCABULARY)
        assert trained_parameters(config, VOCABULARY) == parameters and len(parameters) == 2 * ranks + 1
        assert min(activation_bytes(config, VOCABULARY)) > 0
        rows = describe_run(config, 263).ranks
        assert sum(row.parameters for row in rows) == sum(parameters)
        spans = [span for row in rows for span in row.vision_layers or ()]
        assert sorted(n for a, b in spans for n in range(a, b + 1)) == [0, 1]
        totals.add((work.forward, work.input_grad, work.weight_grad, sum(parameters)))
    assert len(totals) == 1


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("domains", [1, 2])
def test_it_can_be_planned(ranks: int, domains: int) -> None:
    sites = {"edge": {}, "cloud": {"pipeline_ranks": ranks - 1, "data_parallel": domains}}
    for frozen in ([], ["vit"], ["language"]):
        config = config_of(
            {"frozen": frozen}, sites=sites, layers=None, train={"global_batch_size": 8, "micro_batch_size": 1}
        )
        problem = problem_of(config)
        assert problem.layout.num_domains == domains
        for name in ("ldt_2lap_1f1b", "auto"):
            table = plan_problem(name, problem)
            assert simulate(problem.layout, table.ranks, problem.costs).makespan > 0


def test_memory_that_is_left() -> None:
    config = config_of(hardware={"cloud_memory_gib": 1})
    edge, cloud = problem_of(config).memory_cap
    assert edge is None and cloud == GIB - static_bytes(config, 1, VOCABULARY)


def test_rows_for_people() -> None:
    config = config_of()
    rows = describe_costs(problem_of(config), config)
    assert [(row.rank, row.vision_layers, row.layers) for row in rows] == [
        (0, 1, 0), (1, 2, 0), (0, 1, 0), (1, 0, 3), (0, 0, 1),
    ]  # fmt: skip


def test_first_screen() -> None:
    config = config_of(
        {"frozen": ["vit"]}, sites={"cloud": {"pipeline_ranks": 2}}, layers={"vit": [2, 1, 0, 1], "llm": [0, 0, 4, 0]}
    )
    run = describe_run(config, 263)
    text = " ".join(rendered(first_screen(run), 400).split())
    for part in (
        "vision 0–1, 3; language -",
        "vision 2; language -",
        "vision -; language 0–3",
        "pixels, tokens, labels, patch embedding, projector, embedding, output layer, loss",
        "vision: 4 layers, hidden 64, 4 heads, windows of 56 pixels; language: 4 layers, hidden 128",
        "vocabulary 263",
        "drawn charts with questions",
        "[patches, 1, h] = about 200×1×64 on the first lap, [s, b, h] = 48×2×128 on the second, fp32",
        "a step header (sizes of the images, positions of the tokens, where samples and padding begin, step number, plan)",
        "never crosses pixels, tokens, labels, loss masks, logits, loss",
        "frozen vit: ",
    ):
        assert part in text, part
    assert 0 < run.trained_parameters < run.parameters
    assert "frozen" not in rendered(first_screen(describe_run(config_of(), 263)))


@pytest.mark.parametrize(
    ("frozen", "up", "down"),
    [
        ([], (2, 2), (2, 2)),
        (["vit"], (1, 2), (1, 2)),  # P passes no gradient up to P-1, nor 1 down to 0
        (["vit", "projector"], (1, 2), (1, 2)),  # the text embedding learns
        (["vit", "language"], (1, 2), (1, 2)),  # the projector learns
        (["language"], (2, 2), (2, 2)),
    ],
)
def test_what_crosses_the_link(frozen: list[str], up: tuple[int, int], down: tuple[int, int]) -> None:
    """Messages of patches and of tokens, each way."""
    patches, tokens = 200 * 64 * 4, 48 * 2 * 128 * 4
    link = describe_run(config_of({"frozen": frozen}), 263).link
    assert link is not None and link.vision_shape == (200, 1, 64) and link.shape == (48, 2, 128)
    assert link.up_bytes_per_microbatch == up[0] * patches + up[1] * tokens
    assert link.down_bytes_per_microbatch == down[0] * patches + down[1] * tokens
    assert link.up_bytes_per_step == 4 * link.up_bytes_per_microbatch


def test_an_edge_that_is_alone() -> None:
    config = config_of(sites={"cloud": {"pipeline_ranks": 0}}, layers=None)
    run = describe_run(config, 263)
    assert run.link is None and run.ranks[0].vision_layers == run.ranks[0].layers == ((0, 3),)
    assert run.parameters == sum(stage_parameters(config_of(), VOCABULARY))


@pytest.mark.parametrize("frozen", [[], ["vit"]], ids=str)
def test_measured_steps(tmp_path: Path, frozen: list[str]) -> None:
    """Of both laps; a stage without a backward has none to be measured."""
    from ldt_schedules.training.measured import TraceWriter, measured_problem, write_step_traces

    train = {"global_batch_size": 8, "micro_batch_size": 2, "trace_iterations": 1, "output_dir": str(tmp_path)}
    config = config_of({"frozen": frozen}, train=train)
    problem = problem_of(config)
    table = plan_problem("ldt_2lap_1f1b", problem)
    timeline = simulate(problem.layout, table.ranks, problem.costs)
    for rank, row in enumerate(timeline.rows):
        spans = [(span.action, 2 * span.start, 2 * span.end) for span in row]
        recorder = SimpleNamespace(started_s=1.0, step_s=1.0, waited_s=0.0, spans_s=lambda spans=spans: spans)
        TraceWriter(config, rank).step(3, recorder)  # type: ignore[arg-type]
    measured = measured_problem(tmp_path, config)
    assert measured.layout == problem.layout and measured.costs.sizes == problem.costs.sizes
    for stage in range(5):
        for kind in (Kind.F, Kind.B, Kind.I, Kind.W):
            assert measured.costs.time(kind, stage, 0) == pytest.approx(2 * problem.costs.time(kind, stage, 0))
    (path,) = write_step_traces(tmp_path, config)
    assert ldt("draw", str(path))[0] == 0


def ldt(*arguments: str) -> tuple[int, str]:
    from ldt_schedules.cli.app import app

    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


@pytest.mark.parametrize("frozen", [[], ["vit"]], ids=str)
def test_on_the_command_line(tmp_path: Path, frozen: list[str]) -> None:
    """Plan, validate, draw, dry run; `auto` for what is frozen, since its searches take long."""
    path, table, problem = tmp_path / "run.yaml", tmp_path / "table.json", tmp_path / "problem.json"
    path.write_text(yaml.safe_dump(given({"frozen": frozen})))
    for name in ("ldt_2lap_1f1b", "auto") if frozen else ("ldt_2lap_1f1b",):
        code, text = ldt(
            "plan", str(path), "--schedule", name, "--out", str(table), "--save-problem", str(problem), "--json"
        )
        figures = json.loads(text)
        assert code == 0 and figures["schedule"] == name and figures["fits"]
        assert ldt("validate", str(table))[0] == 0
        assert ldt("draw", str(table), "--problem", str(problem))[0] == 0
        code, text = ldt("plan", "--problem", str(problem), "--schedule", name, "--json")
        assert code == 0 and json.loads(text)["makespan"] == pytest.approx(figures["makespan"])
        code, text = ldt("train", str(path), f"schedule.planner={name}", "--dry-run", "--json")
        assert code == 0 and json.loads(text)["frozen"] == frozen
        assert ldt("train", str(path), f"schedule.planner={name}", "--dry-run")[0] == 0
    code, text = ldt("plan", str(path))
    assert code == 0 and "2 vision" in text and ("frozen: " in text) == bool(frozen)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rich": {"model": RICH},
    "bf16": {"model": {**RICH, "precision": "bf16"}},
    "full recompute": {"model": RICH, "train": {"global_batch_size": 8, "micro_batch_size": 2, "recompute": "full"}},
    "selective": {"model": RICH, "train": {"global_batch_size": 8, "micro_batch_size": 2, "recompute": "selective"}},
    "frozen vit": {"vision": {"frozen": ["vit"]}},
    "frozen language": {"vision": {"frozen": ["language"]}},
    "frozen projector, language, bf16": {
        "vision": {"frozen": ["projector", "language"]},
        "model": {**RICH, "precision": "bf16"},
    },
    "tied": {"model": {"tie_embeddings": True}},
    "no layers at the ends": {"layers": {"vit": [0, 4, 0], "llm": [0, 4, 0]}},
}


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[int, dict[str, float]]]:
    """Of every case, each stage as it is."""
    from tests.training.vision_stages import measure

    return of_both_sites(measure, CASES, timeout_s=200)


@pytest.mark.parametrize("name", CASES)
def test_against_the_stages(name: str, measured: dict[str, Any]) -> None:
    """Parameters and products to the last one; bytes within 1 %, but for tables that all layers share."""
    config = config_of(**CASES[name])
    whole = stage_work(config_of(**{**CASES[name], "vision": {}}), VOCABULARY)
    kept = activation_bytes(config, VOCABULARY)
    parameters, trained = stage_parameters(config, VOCABULARY), trained_parameters(config, VOCABULARY)
    for stage, found in measured[name].items():
        assert (parameters[stage], trained[stage]) == (found["parameters"], found["trained"]), stage
        # torch counts no product inside its attention kernel. Angles of M-RoPE: 3 directions, 96 tokens, 16 frequencies.
        angles = 2 * 3 * 96 * 16 if stage >= 2 else 0
        assert whole[stage].weight_grad + angles == found["weight products"], stage
        # Left out: angles and segments, tables that all layers share; and what the first norm that learns does not keep.
        tables, first = 80 * 200, 200 * 64 * 4 if name == "frozen vit" and stage == 2 else 0
        assert found["kept"] * 0.99 - tables <= kept[stage] <= found["kept"] + first, (
            stage,
            kept[stage],
            found["kept"],
        )
