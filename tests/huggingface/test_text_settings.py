"""config.json of text models in our config keys: against transformers, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron.huggingface.architectures import architecture_of
from ldt_schedules.megatron.huggingface.directory import SINGLE, open_directory
from ldt_schedules.megatron.huggingface.sizes import Sizes
from ldt_schedules.training.config import load_config, shared_fingerprint
from tests.huggingface.test_round_trip import rewrite
from tests.huggingface.text import ARCHITECTURES, make
from tests.huggingface.tiny import contents

QWEN2_5: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3: dict[str, Any] = {
    **QWEN2_5,
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_window_layers": 28,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rope_scaling": None,
    "sliding_window": None,
}
LLAMA3: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}
PUBLISHED = {"Qwen2": QWEN2_5, "Qwen3": QWEN3, "Llama": LLAMA3}
"""Of the sizes of published models: Qwen2.5 0.5B, Qwen3 0.6B, Llama 3.2 1B."""


def settings(config: dict[str, Any]) -> dict[str, Any]:
    return architecture_of(config).settings(config)


def test_published() -> None:
    assert settings(LLAMA3) == {
        "vocab_size": 128256,
        "model": {
            "num_layers": 16,
            "hidden_size": 2048,
            "ffn_hidden_size": 8192,
            "num_attention_heads": 32,
            "num_query_groups": 8,
            "tie_embeddings": True,
            "normalization": "RMSNorm",
            "activation": "swiglu",
            "linear_bias": False,
            "qkv_bias": False,
            "norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "head_dim": 64,
            "qk_norm": False,
            "position_embedding": "rope",
            "rope_scaling": {
                "type": "llama3",
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
            },
        },
    }
    two, three = settings(QWEN2_5)["model"], settings(QWEN3)["model"]
    assert (two["qkv_bias"], two["qk_norm"], two["head_dim"], two["rope_scaling"]) == (True, False, 64, None)
    assert (three["qkv_bias"], three["qk_norm"], three["head_dim"], three["rope_theta"]) == (False, True, 128, 1e6)
    sizes = Sizes.of(settings(QWEN3))
    assert (sizes.head_dim, sizes.query_size, sizes.key_size, sizes.vision) == (128, 2048, 1024, None)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_as_transformers_saves_it(tmp_path: Path, name: str) -> None:
    """The same file read and written by transformers: `rope_parameters`, `layer_types`, keys left out."""
    import transformers

    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    getattr(transformers, f"{name}Config").from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "rope_parameters" in again
    assert settings(again) == settings(PUBLISHED[name])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_defaults_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    import transformers

    bare = {"architectures": [f"{name}ForCausalLM"]}
    getattr(transformers, f"{name}Config")(**bare).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert len(saved) > 15
    assert settings(bare) == settings(saved)


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
WINDOWS = {"use_sliding_window": True, "max_window_layers": 3}


@pytest.mark.parametrize(
    ("changes", "scaling"),
    [
        ({"rope_scaling": {**YARN, "beta_fast": 16}}, {**YARN, "beta_fast": 16.0}),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, {**YARN, "factor": 2.0}),  # max_position_embeddings
        (
            {"rope_scaling": {**YARN}, "original_max_position_embeddings": 99},
            {**YARN, "original_max_position_embeddings": 99},
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 1e6}},
            {"type": "linear", "factor": 2.0},
        ),
        ({"rope_scaling": {"rope_type": "default"}}, None),
    ],
)
def test_rotary_angles(changes: dict[str, Any], scaling: dict[str, Any] | None) -> None:
    found = settings({**QWEN2_5, **changes})["model"]
    assert (found["rope_scaling"], found["rope_theta"]) == (scaling, 1e6)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (
        "Llama",
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        r"rope scaling 'dynamic' \(allowed: default, linear, llama3",
    ),
    ("Llama", {"rope_scaling": {"rope_type": "longrope"}}, "rope scaling 'longrope'"),
    (
        "Llama",
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        "'llama3' without high_freq_factor; .* low_freq_factor",
    ),
    ("Llama", {"rope_scaling": {"rope_type": "linear"}}, "rope scaling 'linear' without factor"),
    (
        "Llama",
        {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}},
        r"mscale .* \(allowed: attention_factor",
    ),
    ("Llama", {"rope_scaling": {**YARN, "truncate": False}}, "truncate false of rope scaling 'yarn'"),
    ("Llama", {"rope_parameters": {"full_attention": {}}, "rope_scaling": None}, "angles of several kinds of layers"),
    ("Llama", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor 0.5 \(allowed: 1\)"),
    ("Llama", {"rope_scaling": {**YARN, "partial_rotary_factor": 0.25}}, "partial_rotary_factor 0.25"),
    ("Llama", {"attention_bias": True, "mlp_bias": True}, r"attention_bias true \(allowed: false\); mlp_bias true"),
    ("Llama", {"pretraining_tp": 2}, r"pretraining_tp 2 \(allowed: 1"),
    ("Llama", {"hidden_act": "gelu"}, r"hidden_act 'gelu' of the language model \(allowed: silu\)"),
    ("Llama", {"quantization_config": {"bits": 4}}, "quantization_config: quantized weights"),
    ("Llama", {"is_causal": False}, r"is_causal false \(allowed: true\)"),
    ("Qwen3", {"attention_bias": True}, r"attention_bias true \(allowed: false\)"),
    ("Qwen3", {"attention_dropout": 0.1}, r"attention_dropout 0.1 \(allowed: 0\)"),
    ("Qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "use_sliding_window"),
    ("Qwen2", {**WINDOWS}, "use_sliding_window"),
    ("Qwen2", {**WINDOWS, "rope_scaling": {"type": "su"}}, "use_sliding_window .*; rope scaling 'su'"),
]


@pytest.mark.parametrize(("name", "changes", "said"), REFUSED)
def test_what_the_model_cannot_do(name: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"config.json asks for what this model cannot do: .*{said}"):
        settings({**PUBLISHED[name], **changes})


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Qwen2", {"use_sliding_window": True, "max_window_layers": 24}),
        ("Qwen2", {**WINDOWS, "sliding_window": None}),
        ("Qwen2", {"head_dim": None}),
        ("Llama", {"head_dim": None}),
        ("Qwen3", {"layer_types": ["full_attention"] * 28}),
    ],
)
def test_what_changes_nothing(name: str, changes: dict[str, Any]) -> None:
    assert settings({**PUBLISHED[name], **changes}) == settings(PUBLISHED[name])


@pytest.mark.parametrize(("given", "groups"), [({"num_key_value_heads": None}, 14), ({}, 2)])
def test_key_heads_that_are_null_are_as_many_as_heads(given: dict[str, Any], groups: int) -> None:
    assert settings({**QWEN2_5, **given})["model"]["num_query_groups"] == groups


def test_an_unknown_architecture_names_the_known_ones() -> None:
    known = "LlamaForCausalLM, Qwen2ForCausalLM, Qwen2_5_VLForConditionalGeneration, Qwen3ForCausalLM"
    with pytest.raises(ConfigError, match=f"the architecture 'MistralForCausalLM'; known are {known}. Another"):
        architecture_of({"architectures": ["MistralForCausalLM"]})


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("hf") / "hf", "Qwen3", rope="yarn")


def test_sizes_come_from_the_directory_and_may_not_be_contradicted(tmp_path: Path, directory: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train: {micro_batch_size: 1, global_batch_size: 2}\n")
    hf = f"model.hf={directory}"
    config = load_config(path, [hf])
    model = config.model
    assert (model.head_width, model.query_width, model.kv_width, model.qk_norm) == (12, 48, 24, True)
    assert model.scaling == {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert not config.has_vision
    shared = shared_fingerprint(config)
    assert shared["model.rope_scaling"]["factor"] == 4.0 and shared["model.head_dim"] == 12
    assert load_config(path, [hf, "model.head_dim=12", "model.num_layers=4", "vision.num_layers=0"]) == config
    for override, said in (
        ("model.head_dim=8", "model.head_dim is 8, but .*config.json says 12; leave it out"),
        ("model.qk_norm=false", "model.qk_norm is False, but .*config.json says True"),
        ("model.rope_scaling={type: linear, factor: 2}", "model.rope_scaling is .*linear.*, but .*yarn"),
        ("model.position_embedding=learned_absolute", "position_embedding is 'learned_absolute', but .* 'rope'"),
        ("vision.num_layers=2", "vision.num_layers is 2, but .*config.json says 0"),
        ("vision.patch_size=7", "vision: its keys are for vision-language models"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_config(path, [hf, override])


def test_tensors_that_do_not_fit_are_listed(tmp_path: Path, directory: Path) -> None:
    copy = shutil.copytree(directory, tmp_path / "hf")
    changes: dict[str, Any] = {
        "model.layers.1.self_attn.k_norm.weight": None,
        "model.layers.2.self_attn.q_norm.weight": torch.zeros(13),
        "model.layers.0.self_attn.q_proj.bias": torch.zeros(48),
    }
    assert SINGLE in {path.name for path in copy.iterdir()} and len(contents(copy)) == 47
    rewrite(copy, changes)
    opened = open_directory(copy)
    with pytest.raises(ConfigError) as raised:
        opened.pairs(Sizes.of(opened.settings))
    assert str(raised.value).splitlines()[1:-1] == [
        "  model.layers.1.self_attn.k_norm.weight: missing",
        "  model.layers.0.self_attn.q_proj.bias: not a tensor of this model",
        "  model.layers.2.self_attn.q_norm.weight: [13], the model has [12]",
    ]
