"""Heads of a width of their own, and scaled rotary angles: what follows from the keys, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldt_schedules.errors import ConfigError
from ldt_schedules.training.config import load_config
from ldt_schedules.training.sections import ModelSection

LLAMA3 = "type: llama3, factor: 8, low_freq_factor: 1, high_freq_factor: 4, original_max_position_embeddings: 64"


def test_widths() -> None:
    usual = ModelSection(hidden_size=64, num_attention_heads=4, num_query_groups=2)
    assert (usual.head_width, usual.query_width, usual.kv_width, usual.scaling) == (16, 64, 32, None)
    wide = ModelSection(hidden_size=64, num_attention_heads=4, num_query_groups=2, head_dim=24)
    assert (wide.head_width, wide.query_width, wide.kv_width) == (24, 96, 48)


def test_scaling_holds_what_is_set(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"model: {{rope_scaling: {{{LLAMA3}}}}}\n")
    assert load_config(tmp_path / "run.yaml").model.scaling == {
        "type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("head_dim: 7", "model.position_embedding rope needs an even head width, but model.head_dim is 7"),
        ("hidden_size: 36, num_attention_heads: 4", "model.hidden_size 36 / model.num_attention_heads 4 = 9"),
        ("megatron: {kv_channels: 8}", "model.megatron.kv_channels: set model.head_dim"),
        ("megatron: {qk_layernorm: true}", "model.megatron.qk_layernorm: set model.qk_norm"),
        (
            "rope_scaling: {type: dynamic}",
            "model.rope_scaling.type: given 'dynamic'; it must be 'linear', 'llama3' or 'yarn'",
        ),
        ("rope_scaling: {factor: 2}", "model.rope_scaling.type"),
        ("rope_scaling: {type: linear}", "rope_scaling of type linear needs factor"),
        ("rope_scaling: {type: linear, factor: 2, beta_fast: 3}", "rope_scaling of type linear has no beta_fast"),
        ("rope_scaling: {type: yarn, factor: 2}", "of type yarn needs original_max_position_embeddings"),
        ("rope_scaling: {type: linear, factor: 0.5}", "model.rope_scaling.factor: given 0.5"),
        ("rope_scaling: {type: linear, faktor: 2}", r"unknown key model.rope_scaling.faktor; did you mean .*factor"),
        (
            f"rope_scaling: {{{LLAMA3.replace('high_freq_factor: 4', 'high_freq_factor: 1')}}}",
            "other than low_freq_factor",
        ),
        (
            "rope_scaling: {type: linear, factor: 2}, position_embedding: learned_absolute",
            "learned_absolute has no angles",
        ),
    ],
)
def test_mistakes_are_named(tmp_path: Path, model: str, said: str) -> None:
    (tmp_path / "run.yaml").write_text(f"model: {{{model}}}\n")
    with pytest.raises(ConfigError, match=said):
        load_config(tmp_path / "run.yaml")


def test_heads_need_not_divide_the_stream(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "model: {hidden_size: 100, num_attention_heads: 3, num_query_groups: 1, head_dim: 8}\n"
    )
    assert load_config(tmp_path / "run.yaml").model.query_width == 24
