"""What is wrong with the config of a vision-language model is said at once, by key, before anything starts."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from ldt_schedules.errors import ConfigError
from ldt_schedules.training.config import load_config, shared_fingerprint
from ldt_schedules.training.describe import describe_run
from ldt_schedules.training.screens import first_screen
from ldt_schedules.training.vision_config import mrope_section

TINY = Path(__file__).parent.parent.parent / "configs" / "qwen2_5_vl_tiny.yaml"


def test_the_example_is_what_its_comments_say():
    config = load_config(TINY)
    assert config.has_vision and config.schedule.planner == "ldt_2lap_1f1b"
    assert (config.lap_layers.vit, config.lap_layers.llm) == ((1, 1, 1, 1), (1, 1, 1, 1))
    assert [stage.ranks for stage in config.layout.stages] == [(0,), (1,), (2,), (0,), (1,), (2,), (0,)]
    assert mrope_section(config) == [4, 6, 6]
    assert shared_fingerprint(config)["layers"] == {"vit": [1, 1, 1, 1], "llm": [1, 1, 1, 1]}


def test_defaults_follow_from_the_model(tmp_path):
    (tmp_path / "run.yaml").write_text("vision: {num_layers: 4, hidden_size: 32}\nmodel: {hidden_size: 256}\n")
    config = load_config(tmp_path / "run.yaml")
    assert config.schedule.planner == "ldt_2lap_1f1b" and config.vision.ffn_hidden_size == 128
    assert mrope_section(config) == [8, 12, 12]
    assert load_config(tmp_path / "run.yaml", ["schedule.planner=auto"]).schedule.planner == "auto"


def test_frozen_parts_are_frozen_stages_of_the_layout():
    config = load_config(TINY, ["vision.frozen=[vit]"])
    assert [stage.frozen for stage in config.layout.stages] == [True] * 3 + [False] * 4
    assert [config.layout.has_backward(stage) for stage in range(7)] == [False] * 3 + [True] * 4


def test_sites_of_which_one_reads_no_weights_do_not_agree():
    config = load_config(TINY)
    read = config.model_copy(update={"model": config.model.model_copy(update={"hf": "somewhere"})})
    elsewhere = config.model_copy(update={"model": config.model.model_copy(update={"hf": "another"})})
    assert shared_fingerprint(read) == shared_fingerprint(elsewhere) != shared_fingerprint(config)


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ("{vit: [1, 1, 1, 1], llm: [1, 1, 1, 1]}", None),
        ("{vit: [1, 1, 1, 1], llm: [0, 1, 2, 1]}", "between the embedding of tokens and the link"),
        (
            "{vit: [0, 2, 1, 1], llm: [0, 1, 2, 1]}",
            "between the patch embedding or the embedding of tokens and the link",
        ),
    ],
)
def test_the_first_screen_warns_of_what_crosses_bare(layers, said):
    console = Console(width=200, file=io.StringIO())
    console.print(first_screen(describe_run(load_config(TINY, [f"layers={layers}"]), 263)))
    shown = console.file.getvalue()
    assert (said in shown) if said else "beware" not in shown


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "layers={vit: [1, 1, 2, 1], llm: [0, 1, 2, 1]}",
            r"vit: .*add up to 1 \+ 1 \+ 2 \+ 1 = 5, but the model has 4",
        ),
        ("layers=[1, 1, 1, 1]", "needs the layers of both laps"),
        ("schedule.planner=ldt_1f1b", "goes round the U once"),
        ("vision.num_attention_heads=5", r"vision.hidden_size 64 / vision.num_attention_heads 5 .*multiple of 4"),
        ("vision.window_size=27", "vision.window_size holds no token"),
        ("vision.full_attention_layers=[1, 4]", r"vision.full_attention_layers \[4\] do not exist"),
        (
            "vision.min_pixels=60000",
            "vision.min_pixels 60000 and vision.max_pixels 50176: 0 < min_pixels <= max_pixels",
        ),
        ("vision.max_pixels=783", "784 <= max_pixels"),
        ("model.mrope_section=[4, 6, 5]", r"model.mrope_section \[4, 6, 5\] must be three numbers .* 16"),
        ("model.position_embedding=learned_absolute", "rope in three directions"),
        ("sites.cloud.sequence_parallel=true", "sites.cloud.sequence_parallel: a vision-language model"),
        ("vision.frozen=[vit, projector, language]", "nothing would be trained"),
        ("vision.frozen=[head]", "vision.frozen"),
        (
            "sites.cloud.tensor_parallel=8",
            "vision.num_attention_heads 4 is not a multiple of sites.cloud.tensor_parallel 8",
        ),
        ("train.save_hf=out", "model.hf is null"),
        ("vision.num_layers=0", "train.log_tps is for vision-language models"),
        ("vision.num_layers=0", "vision: its keys are for vision-language models"),
        ("model.megatron={qk_layernorm: true}", "model.megatron.qk_layernorm: set model.qk_norm"),
        ("model.qk_norm=true", "model.qk_norm asks for other layers"),
        ("model.head_dim=32", "model.head_dim asks for other layers"),
        ("model.rope_scaling={type: linear, factor: 2}", "model.rope_scaling asks for other layers"),
        ("model.megatron={context_parallel_size: 2}", "model.megatron.context_parallel_size asks for other layers"),
    ],
)
def test_mistakes_are_named(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(TINY, [override])
