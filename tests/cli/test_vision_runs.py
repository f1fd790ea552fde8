"""Runs of a vision-language model as users start them, on images of their own; every process is real."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from ldt_schedules.comm.ports import free_ports
from tests.helpers.cli import finish, metrics, start_training
from tests.huggingface.tiny import contents, make

TINY = Path(__file__).parent.parent.parent / "configs" / "qwen2_5_vl_tiny.yaml"
SMALL = [
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "model.seq_length=96",
    "model.mrope_section=[1,1,2]",
    "vision.num_layers=2",
    "vision.hidden_size=32",
    "vision.full_attention_layers=[1]",
    "layers={vit: [1, 1, 0], llm: [0, 1, 1]}",
    "sites.cloud.pipeline_ranks=1",
    "train.iterations=2",
    "train.global_batch_size=4",
    "train.micro_batch_size=1",
    "train.eval_interval=2",
    "train.warmup_iterations=0",
    "train.clip_grad=0",
    "data.validation_fraction=0.2",
    "link.timeout_s=60",
]


@pytest.fixture
def pictures(tmp_path):
    """Ten conversations: no image, one, two of different sizes."""
    lines = []
    for number in range(10):
        content = [{"type": "text", "text": f"How many? {number}"}]
        for index in range(number % 3):
            name = f"{number}-{index}.png"
            size = (56 + 28 * (number % 2), 56 + 56 * index)
            Image.effect_noise(size, 20.0 + 10 * number).convert("RGB").save(tmp_path / name)
            content.insert(0, {"type": "image", "image": name})
        answer = {"role": "assistant", "content": f"{number * number}"}
        lines.append({"messages": [{"role": "user", "content": content}, answer]})
    path = tmp_path / "pictures.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def start(pictures, *arguments):
    one_thread = {"OMP_NUM_THREADS": "1"}
    return start_training(TINY, *SMALL, f"data.path={pictures}", *arguments, environment=one_thread)


def test_a_split_run_reports_the_numbers_of_an_edge_alone(tmp_path, pictures):
    """Losses to the last bit, tokens and bytes; dealt over two replicas with balanced images the step learns the same."""
    runs = {
        "alone": ["layers=null", "sites.cloud.pipeline_ranks=0"],
        "split": [],
        "balanced": ["train.encoder_dp_balance=true", "sites.edge.data_parallel=2", "sites.cloud.data_parallel=2"],
    }
    found = {}
    for name, options in runs.items():
        code, _, err = finish(start(pictures, *options, f"train.output_dir={tmp_path / name}", "--json"))
        assert code == 0, err
        found[name] = metrics(tmp_path / name)
    assert [entry["event"] for entry in found["alone"]] == ["step", "step", "evaluation"]
    for alone, split, balanced in zip(*found.values(), strict=True):
        assert split["loss"] == alone["loss"] == pytest.approx(balanced["loss"], rel=1e-5)
        if alone["event"] == "step":
            assert split["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-6)
            assert balanced["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-5)
            assert 10 < split["tokens_per_sample"] == alone["tokens_per_sample"] == balanced["tokens_per_sample"] < 96
            assert split["bytes_up"] == split["bytes_down"] > 0 == alone["bytes_up"]


def test_weights_go_out_and_in_again_and_a_projector_may_learn_alone(tmp_path, pictures):
    """The cloud of the second run has a directory of its own, with the file of its own layers only."""
    source, saved, cloud = (tmp_path / name for name in ("hf", "saved", "cloud"))
    make(source, dtype=torch.float32, vocab_size=300)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "image_token_id": 260, "video_token_id": 261}))
    only = ["vision.frozen=[vit,language]", "train.eval_interval=0", f"train.output_dir={tmp_path / 'run'}"]
    sizes = [one for one in SMALL if not one.startswith(("model.", "vision.", "layers"))]
    layers = ["layers={vit: [1, 1, 1], llm: [1, 1, 0]}", "model.seq_length=96"]
    layers += ["vision.min_pixels=64", "vision.max_pixels=1024"]

    def run(*options):
        path = tmp_path / "run.yaml"
        path.write_text("model: {precision: fp32}\n")
        return start_training(path, *sizes, *layers, *only, *options)

    data = f"data.path={pictures}"
    code, shown, said = finish(run(f"model.hf={source}", data, f"train.save_hf={saved}"))
    assert code == 0 and "a cloud on another machine has its files" in shown.replace("\n", ""), shown + said
    before, after = contents(source), contents(saved)
    learned = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert learned and all(".merger." in name for name in learned), learned
    cloud.mkdir()
    for name in ("config.json", "model.safetensors.index.json", "model-00002-of-00002.safetensors"):
        shutil.copy(saved / name, cloud / name)
    (port,) = free_ports(1)
    address = f"link.address=127.0.0.1:{port}"
    sites = {"cloud": run(f"model.hf={cloud}", address, "--site", "cloud")}
    sites["edge"] = run(f"model.hf={saved}", data, address, "--site", "edge")
    for site, process in sites.items():
        code, _, said = finish(process)
        assert code == 0, (site, said)


def spoil(pictures, line):
    """Make the picture of a conversation far too large for the sequence."""
    samples = [json.loads(text) for text in pictures.read_text().splitlines()]
    name = samples[line - 1]["messages"][0]["content"][0]["image"]
    Image.new("RGB", (1400, 1400)).save(pictures.parent / name)


TOO_LARGE = ["vision.max_pixels=2000000", "train.iterations=4", "train.eval_interval=0", "link.timeout_s=600"]
"""A site that waits for its deadline is still there when the test's patience ends."""


def test_a_bad_sample_stops_both_sites_before_the_step(tmp_path, pictures):
    """Started apart, each ends by itself, long before the deadline; only the edge says what is in the data."""
    spoil(pictures, 2)
    (port,) = free_ports(1)
    address = f"link.address=127.0.0.1:{port}"
    cloud = start("/nowhere.jsonl", *TOO_LARGE, address, "--site", "cloud", f"train.output_dir={tmp_path / 'cloud'}")
    edge = start(pictures, *TOO_LARGE, address, "--site", "edge", f"train.output_dir={tmp_path / 'edge'}")
    code, _, said = finish(edge)
    assert code == 2, said
    assert "pictures.jsonl, line 2 has 1 image of 2500 tokens" in said and "model.seq_length is 96" in said, said
    assert "lower vision.max_pixels" in said and "Traceback" not in said
    code, _, said = finish(cloud)
    assert code == 2 and "the edge could not read the batches of step" in said, said
    assert "pictures" not in said and "image" not in said, "the cloud was told of the data"


def test_a_bad_sample_of_one_process_stops_all_of_the_edge(tmp_path, pictures):
    """Two replicas of two tensor-parallel processes, one of which finds it; every process ends with a mistake's exit code."""
    spoil(pictures, 2)
    sites = "sites={edge: {data_parallel: 2, tensor_parallel: 2}, cloud: {pipeline_ranks: 1, data_parallel: 2}}"
    code, shown, said = finish(start(pictures, *TOO_LARGE, sites, f"train.output_dir={tmp_path / 'run'}"))
    assert code == 2, said
    logs = {path.stem: path.read_text() for path in (tmp_path / "run" / "logs").glob("*.log")}
    assert logs.keys() == {"edge-rank1", "edge-rank2", "edge-rank3", "cloud-rank0", "cloud-rank1"}
    assert "line 2 has 1 image" in shown + said + "".join(logs.values())
    assert not any("line 2" in text for name, text in logs.items() if name.startswith("cloud"))


def test_a_bad_sample_is_passed_over_if_asked(tmp_path, pictures):
    spoil(pictures, 2)
    code, _, said = finish(
        start(pictures, *TOO_LARGE, "data.on_bad_sample=skip", f"train.output_dir={tmp_path / 'run'}", "--json")
    )
    assert code == 0, said
    assert "sample skipped (1 so far)" in said and "line 2" in said
    assert len(metrics(tmp_path / "run")) == 4


def test_mistakes_in_the_file_are_named_before_a_process_starts(tmp_path, pictures):
    pictures.write_text(pictures.read_text() + '{"messages": [{"role": "robot", "content": "hm"}]}\n')
    code, _, said = finish(start(pictures, f"train.output_dir={tmp_path / 'run'}"))
    assert code == 2 and "line 11" in said and "robot" in said and "Traceback" not in said, said
    assert not (tmp_path / "run" / "logs").exists()
