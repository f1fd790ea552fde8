"""What people read: the first screen, the lines of a run, its summary; the figures for programs."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from ldt_schedules.training.config import TrainConfig
from ldt_schedules.training.describe import describe_run
from ldt_schedules.training.metrics import MetricsWriter
from ldt_schedules.training.parameters import layer_parameters, padded_vocab_size, stage_parameters
from ldt_schedules.training.reports import EvalReport, RunSummary, StepReport
from ldt_schedules.training.screens import (
    TrainingScreen,
    evaluation_line,
    first_screen,
    human_bytes,
    human_count,
    human_time,
    plain_step,
    step_figures,
    summary_screen,
)

STEP = StepReport(
    iteration=12,
    loss=2.345678,
    grad_norm=1.25,
    lr=1e-3,
    tokens_per_s=4096.4,
    bytes_up=4_194_304,
    bytes_down=8_388_608,
    bubble=0.31,
    skipped=False,
    step_s=1.0,
)
SUMMARY = RunSummary(150, 2.1, 2.2, 3.23, 629_000_000, 629_000_000, 143.0, "runs/quickstart/metrics.jsonl")


def rendered(content: object, width: int = 120) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(content)
    return out.getvalue()


def described(**sections: object) -> str:
    return rendered(first_screen(describe_run(TrainConfig.model_validate(sections), 257)))


def test_first_screen_says_who_runs_what() -> None:
    lines = described(layers=[1, 3, 3, 1]).splitlines()
    edge = next(line for line in lines if line.startswith(" edge"))
    assert edge.split()[1:5] == ["0", "1", "0,", "7"]
    assert "data, labels, embedding, output layer, loss" in edge
    assert [line.split()[1:5] for line in lines if line.startswith(" cloud")] == [
        ["1", "1", "1–3", "591k"],
        ["2", "1", "4–6", "591k"],
    ]


def test_first_screen_says_what_crosses_and_what_never_does() -> None:
    text = " ".join(described().split())
    # Two tensors each way: 2 * 128 * 4 * 128 * 4 bytes a microbatch, 8 microbatches a step.
    assert "up 524 kB and down 524 kB a microbatch, 4.19 MB and 4.19 MB a step" in text
    assert "[s, b, h] = 128×4×128 fp32" in text
    assert "never crosses data, tokens, labels" in text
    assert "4,096 tokens" in text


def test_first_screen_says_that_the_cloud_is_told_of_conversations() -> None:
    told = "where each conversation and padding begin"
    for data, segmented in (
        ({"format": "messages"}, True),
        ({"format": "messages", "packing": False}, False),
        ({"format": "messages", "packing": False, "padding_side": "left"}, True),
        ({}, False),
    ):
        text = " ".join(described(data=data).split())
        assert (told in text) is segmented
        assert ("questions about the functions" in text) is (data != {})


def test_bytes_follow_precision_and_replicas() -> None:
    site = {"data_parallel": 2}
    link = describe_run(
        TrainConfig.model_validate({"model": {"precision": "bf16"}, "sites": {"edge": site, "cloud": site}}), 257
    ).link
    assert link is not None
    assert link.up_bytes_per_microbatch == 2 * 128 * 4 * 128 * 2
    assert link.up_bytes_per_step == link.up_bytes_per_microbatch * 8  # 4 microbatches on each of 2 replicas


def test_edge_alone_has_no_link() -> None:
    text = described(sites={"cloud": {"pipeline_ranks": 0}})
    assert "none: everything runs on the edge" in text
    assert "crosses" not in text


@pytest.mark.parametrize("width", [66, 80, 200])
def test_first_screen_fits(width: int) -> None:
    text = rendered(first_screen(describe_run(TrainConfig.model_validate({}), 257)), width)
    assert max(map(len, text.splitlines())) <= width
    assert "embedding" in text and "parameters" in text and "…" not in text


def test_stage_without_layers() -> None:
    assert "none" in described(layers=[0, 4, 4, 0])


def test_parameters_of_gpt2_small() -> None:
    # The published model: 124 439 808 parameters with its 50257 rows and tied ends.
    model = {
        "num_layers": 12,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "seq_length": 1024,
        "tie_embeddings": True,
        "normalization": "LayerNorm",
        "position_embedding": "learned_absolute",
        "linear_bias": True,
    }
    assert sum(stage_parameters(TrainConfig.model_validate({"model": model}), 50257)) == 124_439_808


def test_parameters_of_a_gated_grouped_layer() -> None:
    # Llama 3 8B: 32 layers of 218 112 000.
    model = {
        "num_layers": 32,
        "hidden_size": 4096,
        "ffn_hidden_size": 14336,
        "num_attention_heads": 32,
        "num_query_groups": 8,
        "activation": "swiglu",
    }
    assert layer_parameters(TrainConfig.model_validate({"model": model}).model) == 218_112_000


def test_vocabulary_is_padded_alike_for_every_tensor_size() -> None:
    assert {padded_vocab_size(257, tensor) for tensor in (1, 2, 4, 8)} == {384}
    assert padded_vocab_size(256, 1) == 256
    assert padded_vocab_size(257, 3) % 3 == 0
    assert padded_vocab_size(257, 1, published=True) == 257 and padded_vocab_size(257, 2, published=True) == 258


def test_step_figures_drop_the_least_important_first() -> None:
    assert step_figures(STEP) == (
        "loss 2.3457  grad 1.25  4,096 tok/s  up 4.19 MB down 8.39 MB  bubble 31%  lr 1.00e-03"
    )
    assert step_figures(STEP, 60) == "loss 2.3457  grad 1.25  4,096 tok/s  up 4.19 MB down 8.39 MB"
    assert step_figures(STEP, 5) == "loss 2.3457"


def test_unmeasured_and_skipped() -> None:
    text = step_figures(replace(STEP, grad_norm=math.inf, bubble=None, skipped=True, loss=math.nan))
    assert "loss nan SKIPPED" in text and "grad inf" in text and "bubble ?" in text


def test_plain_lines() -> None:
    assert plain_step(STEP, 200, 75).startswith("step 12/200  loss 2.3457")
    assert plain_step(STEP, 200, 75).endswith("eta 1:15")
    assert evaluation_line(EvalReport(50, 2.5, 64)) == "evaluation after step 50: loss 2.5000 (64 samples)"


def test_summary_compares_with_unigram_entropy() -> None:
    text = rendered(summary_screen(SUMMARY))
    for part in (
        "150 in 2:23",
        "1.13 below the corpus's unigram entropy (3.2300)",
        "2.2000",
        "629 MB",
        "metrics.jsonl",
    ):
        assert part in text
    assert "0.77 above" in rendered(summary_screen(replace(SUMMARY, loss=4.0)))
    assert "validation" not in rendered(summary_screen(replace(SUMMARY, validation_loss=None)))


def run_screen(console: Console) -> None:
    with TrainingScreen(25, log_interval=10, console=console) as screen:
        for iteration in range(1, 26):
            screen.report(replace(STEP, iteration=iteration))
            if iteration == 20:
                screen.report(EvalReport(20, 2.5, 64))


def test_without_a_terminal_lines_come_at_intervals() -> None:
    out = io.StringIO()
    run_screen(Console(file=out, width=40))
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/25", "10/25", "20/25", "after", "25/25"]
    assert lines[1].endswith("eta 0:15")


@pytest.mark.parametrize("width", [60, 120])
def test_on_a_terminal_one_line_is_redrawn(width: int) -> None:
    out = io.StringIO()
    run_screen(Console(file=out, width=width, force_terminal=True))
    text = out.getvalue()
    assert "25/25" in text and "loss 2.3457" in text and "evaluation after step 20" in text
    assert "\x1b[?25h" in text  # the cursor is back


def test_human_units() -> None:
    assert [human_bytes(n) for n in (0, 999, 1000, 1_536_000, 99_960, 999_500, 2.5e12)] == [
        "0 B", "999 B", "1 kB", "1.54 MB", "100 kB", "1 MB", "2.5 TB",
    ]  # fmt: skip
    assert human_count(1_536_000) == "1.54M"
    assert [human_time(s) for s in (-1, 59.6, 3675)] == ["0:00", "1:00", "1:01:15"]


def lines_of(directory: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_metrics_are_written(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "run") as metrics:
        metrics.report(STEP)
        metrics.report(replace(STEP, iteration=13, loss=math.nan, grad_norm=math.inf, bubble=None, skipped=True))
        metrics.report(EvalReport(13, 2.5, 64))
    first, second, third = lines_of(tmp_path / "run")
    assert (first["event"], first["iteration"], first["loss"], first["bytes_up"]) == ("step", 12, 2.345678, 4_194_304)
    assert (second["loss"], second["grad_norm"], second["skipped"]) == (None, None, True)
    assert third == {"event": "evaluation", "iteration": 13, "loss": 2.5, "samples": 64}
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


def test_metrics_of_a_resumed_run_continue_at_its_step(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as metrics:
        for iteration in (1, 2, 3):
            metrics.report(replace(STEP, iteration=iteration))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "st')  # killed in the middle of a line
    with MetricsWriter(tmp_path, start_iteration=2) as metrics:
        metrics.report(replace(STEP, iteration=3, loss=1.0))
    assert [(line["iteration"], line["loss"]) for line in lines_of(tmp_path)] == [
        (1, STEP.loss),
        (2, STEP.loss),
        (3, 1.0),
    ]
    with MetricsWriter(tmp_path):
        pass
    assert lines_of(tmp_path) == []
