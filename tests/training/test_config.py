"""The config: what it accepts, and one clear message for each thing it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron.agreement import differing_keys
from ldt_schedules.topology import Site
from ldt_schedules.training.config import (
    SITE_LOCAL_KEYS,
    TrainConfig,
    load_config,
    shared_fingerprint,
)
from ldt_schedules.training.config_file import keys_of

CONFIGS = Path(__file__).parents[2] / "configs"


def load(tmp_path: Path, text: str, *overrides: str) -> TrainConfig:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return load_config(path, overrides)


def message(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    return str(caught.value)


def test_defaults_make_a_run(tmp_path: Path) -> None:
    config = load(tmp_path, "train:\n")
    assert config.layer_split == (2, 2, 2, 2)
    assert config.num_microbatches == 8
    assert (config.site_processes(Site.EDGE), config.site_processes(Site.CLOUD)) == (1, 2)


@pytest.mark.parametrize("name", ["quickstart.yaml", "two_sites.yaml"])
def test_shipped_configs_load(name: str) -> None:
    load_config(CONFIGS / name)


def test_every_key_is_described() -> None:
    for key in keys_of(TrainConfig):
        model: type = TrainConfig
        *path, leaf = key.split(".")
        for part in path:
            model = model.model_fields[part].annotation
        assert model.model_fields[leaf].description, key


def test_derived_defaults_follow_their_source(tmp_path: Path) -> None:
    model = load(tmp_path, "model: {hidden_size: 96, num_attention_heads: 6}").model
    assert (model.ffn_hidden_size, model.num_query_groups) == (384, 6)


def test_overrides_are_yaml_and_later_ones_win(tmp_path: Path) -> None:
    overrides = (
        "train.lr=1e-3",
        "train.iterations=3",
        "train.iterations=5",
        "layers=Et|t*3|t*3|tL",
        "data.path=a=b.txt",
    )
    config = load(tmp_path, "train: {lr: 0.5, min_lr: 0}\ndata:\n", *overrides)
    assert (config.train.lr, config.train.iterations, config.data.path) == (1e-3, 5, "a=b.txt")
    assert config.layer_split == (1, 3, 3, 1)


def test_edge_alone(tmp_path: Path) -> None:
    config = load(tmp_path, "layers: 8\nsites: {cloud: {pipeline_ranks: 0, tensor_parallel: 2}}")
    assert (config.layer_split, config.num_pipeline_ranks, config.site_processes(Site.CLOUD)) == ((8,), 1, 0)


@pytest.mark.parametrize(
    ("text", "overrides", "parts"),
    [
        (
            "train: {itertions: 5}",
            (),
            ["unknown key train.itertions", "did you mean train.iterations?", "global_batch_size"],
        ),
        ("iterations: 5", (), ["unknown key iterations", "did you mean train.iterations?"]),
        (
            "modle: {}",
            (),
            ["unknown key modle", "did you mean model?", "allowed at the top: model, layers, vision, sites"],
        ),
        ("train: {}", ("sites.cloud.pipeline_rank=2",), ["did you mean sites.cloud.pipeline_ranks?"]),
        ("train: {iterations: '5'}", (), ["train.iterations: given '5'", "must be a valid integer", "optimizer steps"]),
        ("train: {seed: true}", (), ["train.seed: given True", "must be a valid integer"]),
        ("train: {lr: fast}", (), ["train.lr: given 'fast'", "must be a valid number"]),
        ("train: {iterations: 0}", (), ["train.iterations: given 0", "greater than or equal to 1"]),
        ("train: {optimizer: adamw}", (), ["train.optimizer: given 'adamw'", "'adam' or 'sgd'"]),
        ("schedule: {planner: zb}", (), ["schedule.planner: given 'zb'", "it must be ldt_1f1b or gpipe"]),
        ("model: 5", (), ["model: given 5", "a section with the keys num_layers, hidden_size"]),
        ("link: {address: nowhere}", (), ["link.address: given 'nowhere'", "HOST:PORT"]),
        ("link: {address: 'a:70000'}", (), ["link.address: given 'a:70000'", "0 to 65535"]),
        ("1: 2", (), ["1 is not a key"]),
        ("train:\n  - a\n b: c", (), ["line 3"]),
        ("train: {lr: 1, lr: 2}", (), ["line 1", "'lr' appears twice"]),
        ("", (), ["holds nothing"]),
        ("- 1", (), ["holds a list"]),
        ("train: {}", ("train.iterations",), ["not of the form section.key=value"]),
        ("train: {}", ("train.lr=[",), ["override 'train.lr=['", "not YAML"]),
        ("train: {lr: 1}", ("train.lr.x=1",), ["train.lr is a value, not a section"]),
        ("layers: [2, 4, 4, 2]", (), ["= 12, but the model has 8 layers", "take away 4", "model.num_layers"]),
        ("layers: [1, 3, 3]", (), ["sites.cloud.pipeline_ranks is 2, but layers [1, 3, 3] have 1 cloud stage"]),
        ("layers: Et|tx|t|tL", (), ["position 5: unknown character 'x'"]),
        ("layers: 2.5", (), ["layers 2.5"]),
        ("layers: {a: 1}", (), ["layers {'a': 1}"]),
        ("layers: [1, 6, 1]\nsites: {cloud: {pipeline_ranks: 0}}", (), ["1 pipeline ranks have 1"]),
        (
            "sites: {edge: {data_parallel: 2}, cloud: {data_parallel: 3}}\ntrain: {global_batch_size: 24}",
            (),
            ["sites.cloud.data_parallel 3 is not a multiple of sites.edge.data_parallel 2", "(2 or 4 would do)"],
        ),
        (
            "sites: {cloud: {tensor_parallel: 3}}\nmodel: {num_attention_heads: 4, ffn_hidden_size: 384}",
            (),
            ["model.num_attention_heads 4 is not a multiple of sites.cloud.tensor_parallel 3", "(3 or 6 would do)"],
        ),
        (
            "sites: {cloud: {tensor_parallel: 4, sequence_parallel: true}}\nmodel: {seq_length: 130}",
            (),
            ["model.seq_length 130 is not a multiple of sites.cloud.tensor_parallel 4", "(128 or 132 would do)"],
        ),
        (
            "sites: {cloud: {data_parallel: 3}}",
            ("train.global_batch_size=16",),
            ["train.global_batch_size 16", "x sites.cloud.data_parallel 3 = 12", "(12 or 24 would do)"],
        ),
        ("model: {megatron: {sequence_parallel: true}}", (), ["set sites.edge.sequence_parallel"]),
        ("train: {global_batch_size: 30}", (), ["30 is not a multiple of", "= 4", "28 or 32"]),
        ("train: {global_batch_size: 2}", (), ["2 is not a multiple of", "(4 would do)"]),
        ("model: {hidden_size: 130}", (), ["model.hidden_size 130", "model.num_attention_heads 4", "128 or 132"]),
        ("model: {num_query_groups: 3}", (), ["model.num_attention_heads 4", "model.num_query_groups 3"]),
        (
            "model: {num_attention_heads: 3, hidden_size: 96}\n"
            "sites: {edge: {tensor_parallel: 2}, cloud: {tensor_parallel: 2}}",
            (),
            ["model.num_attention_heads 3 is not a multiple of sites.edge.tensor_parallel 2"],
        ),
        ("model: {hidden_size: 12, num_attention_heads: 4}", (), ["rope needs an even head width"]),
        (
            "data: {validation_fraction: 0.0}",
            (),
            ["train.eval_interval 50", "data.validation_fraction 0", "train.eval_interval=0"],
        ),
        ("train: {min_lr: 1.0}", (), ["train.min_lr 1 is above train.lr"]),
    ],
)
def test_bad_configs(tmp_path: Path, text: str, overrides: tuple[str, ...], parts: list[str]) -> None:
    said = message(tmp_path, text, *overrides)
    for part in parts:
        assert part in said, said


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    said = message(tmp_path, "train: {itertions: 5, lr: fast}\nmodel: {num_layer: 3}")
    assert said.count("\n") == 3
    assert "train.itertions" in said and "train.lr" in said and "model.num_layer" in said


def test_missing_and_binary_files(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text("train: {}")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="does not exist; did you mean .*quickstart.yaml"):
        load_config(tmp_path / "quikstart.yaml")
    with pytest.raises(ConfigError, match="not text"):
        load_config(tmp_path / "binary.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


def test_fingerprint_leaves_local_keys_out(tmp_path: Path) -> None:
    edge = load(
        tmp_path, "layers: [1, 3, 3, 1]", "data.path=secret.txt", "train.output_dir=a", "link.address=0.0.0.0:99"
    )
    cloud = load(tmp_path, "layers: Et|t*3|t*3|tL", "train.threads=4", "train.recompute=full")
    assert shared_fingerprint(edge) == shared_fingerprint(cloud)
    assert "secret" not in str(shared_fingerprint(edge))


def test_megatron_fields_are_compared_as_one_value(tmp_path: Path) -> None:
    plain, more = (
        shared_fingerprint(load(tmp_path, text))
        for text in ("train:", "model: {megatron: {fp32_residual_connection: true}}")
    )
    assert differing_keys(plain, more) == ["model.megatron: edge {}, cloud {'fp32_residual_connection': True}"]


def test_site_local_keys_exist() -> None:
    assert set(SITE_LOCAL_KEYS) <= set(keys_of(TrainConfig))


def test_every_other_key_is_compared(tmp_path: Path) -> None:
    assert set(shared_fingerprint(load(tmp_path, "train:"))) == set(keys_of(TrainConfig)) - set(SITE_LOCAL_KEYS)


def test_differing_keys_name_both_values(tmp_path: Path) -> None:
    edge = shared_fingerprint(load(tmp_path, "train: {lr: 0.001}"))
    cloud = shared_fingerprint(load(tmp_path, "train: {lr: 0.002}\nlayers: [1, 3, 3, 1]"))
    lines = ["layers: edge [2, 2, 2, 2], cloud [1, 3, 3, 1]", "train.lr: edge 0.001, cloud 0.002"]
    assert differing_keys(edge, cloud) == lines
    assert differing_keys(edge, edge) == []


def test_key_of_one_version_only() -> None:
    assert differing_keys({"a": 1}, {}) == ["a: edge 1, cloud (key unknown)"]
