"""Instruction tuning as users start it: the example, split and in one process; every process is real."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.cli import ldt, metrics

EXAMPLE = Path(__file__).parent.parent.parent / "configs" / "finetune_qwen3.yaml"
SMALL = [
    "model.num_layers=3",
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "model.head_dim=16",
    "model.seq_length=96",
    "layers=[1,1,1]",
    "sites.cloud.pipeline_ranks=1",
    "train.iterations=4",
    "train.eval_interval=2",
    "train.warmup_iterations=0",
    "train.clip_grad=0",
    "link.timeout_s=60",
]


@pytest.fixture
def talks(tmp_path):
    """Sixty conversations of one question or two; every second has other keys beside its messages."""
    lines = []
    for number in range(60):
        turns = [("user", f"{number} + {number}?"), ("assistant", f"{2 * number}")]
        turns += [("user", "sure?"), ("assistant", "yes")] if number % 3 == 0 else []
        more = {"id": number} if number % 2 else {}
        lines.append({"messages": [{"role": role, "content": content} for role, content in turns], **more})
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(directory, *options):
    found = ldt("train", EXAMPLE, *SMALL, f"train.output_dir={directory}", *options)
    assert found.returncode == 0, found.stderr
    return found, metrics(directory)


def test_a_packed_run_reports_the_numbers_of_an_edge_alone(tmp_path, talks):
    """Both processes of the edge know where conversations begin, and neither reads for the other."""
    data = [f"data.path={talks}", "data.format=auto"]
    found, split = run(tmp_path / "split", *data, "sites.edge.tensor_parallel=2")
    assert "60 conversations in 2" in found.stdout.replace("\n", " ") and "where each conversation" in found.stdout
    _, alone = run(tmp_path / "alone", *data, "layers=null", "sites.cloud.pipeline_ranks=0")
    assert [entry["event"] for entry in alone] == ["step", "step", "evaluation"] * 2
    for mine, reference in zip(split, alone, strict=True):
        assert mine["loss"] == pytest.approx(reference["loss"], rel=1e-5)
    assert split[-1]["loss"] < split[2]["loss"]
    (log,) = (tmp_path / "split" / "logs").glob("cloud*.log")
    assert "conversation" not in log.read_text(), "the cloud was told of the data"


def test_the_example_learns(tmp_path):
    """As it is, but for fewer steps; the cloud needs no key of the data."""
    found = ldt(
        "train", EXAMPLE, "train.iterations=6", "train.eval_interval=0", f"train.output_dir={tmp_path}", "--json"
    )
    assert found.returncode == 0, found.stderr
    losses = [step["loss"] for step in metrics(tmp_path)]
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.5, losses


def test_what_is_wrong_with_a_file_is_said_before_a_process_starts(tmp_path, talks):
    talks.write_text(talks.read_text() + '{"messages": [{"role": "robot", "content": "hm"}]}\n')
    found = ldt("train", EXAMPLE, *SMALL, f"data.path={talks}", f"train.output_dir={tmp_path / 'run'}")
    assert found.returncode == 2 and "talks.jsonl, line 61" in found.stderr and "'robot'" in found.stderr, found.stderr
    assert "Traceback" not in found.stderr and not (tmp_path / "run" / "logs").exists()
    talks.write_text('{"chat": []}\n')
    found = ldt("train", EXAMPLE, *SMALL, f"data.path={talks}", "data.format=auto", "--dry-run")
    assert found.returncode == 2 and "keys chat" in found.stderr and "data.format=messages" in found.stderr, (
        found.stderr
    )


def test_lines_that_cannot_be_used_are_passed_over_if_asked(tmp_path, talks):
    talks.write_text('{"messages": []}\n' + talks.read_text())
    options = [
        f"data.path={talks}",
        "data.on_bad_sample=skip",
        "data.packing=false",
        "layers=null",
        "train.iterations=1",
    ]
    found, steps = run(tmp_path / "run", *options, "sites.cloud.pipeline_ranks=0")
    assert (
        "1 of 61 conversations cannot be used" in found.stderr and "line 1: messages is an empty list" in found.stderr
    )
    assert len(steps) == 1
