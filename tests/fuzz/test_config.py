"""Configs and overrides: a ConfigError with a line for each mistake, or a config that both sites read alike."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from ldt_schedules.training.config import TrainConfig, load_config, shared_fingerprint
from ldt_schedules.training.config_file import keys_of
from tests.fuzz.mutations import OTHERS, as_text, broken_bytes, broken_text, broken_value, other_value
from tests.fuzz.reading import inputs, read, seeds, show

TEXT = """\
model:
  num_layers: 8
  hidden_size: 128
  dropout: 0.0
  megatron: {window_size: [8, 0]}
layers: [1, 3, 3, 1]
sites: {edge: {tensor_parallel: 1}, cloud: {pipeline_ranks: 2}}
train: {iterations: 200, lr: 2e-3, resume: auto, trace_iterations: 3, eval_interval: 0}
link: {address: "127.0.0.1:0", timeout_s: 60}
"""
WITH_VISION = """\
vision: {num_layers: 8, hidden_size: 64, full_attention_layers: [3, 7], frozen: [vit]}
layers: {vit: [1, 3, 3, 1], llm: "Et*0|t*4|t*4|L"}
model: {num_layers: 8, mrope_section: [4, 6, 6], rope_scaling: null}
"""
WORDS = (
    "&a", "*a", "<<: *a", "!!python/object:os.system", "!!python/name:os.system", "!!int", "!!bool", "!!float",
    "!!timestamp", "!!binary", "!!set", "!!omap", "!!null", "!", "!x", "? ", "- ", ": ", "{", "[", "]", "}", "|", ">", "'",
    '"', "#", "---", "...", "%YAML 9.9", "0x_", "0b_", "0x" + "f" * 5000, "9" * 5000, "1:60:60", "2001-99-99", "2001-01-01",
    ".inf", "-.inf", ".nan", "1e999", "1_e5", "+٣e5", "=", "~", "yes", "\t", "\x00", "\ufeff", '"\\ud800"', "[" * 60,
    "\n", "null", "10000000000000000000000", "-1", "0", "x",
)  # fmt: skip


@cache
def contents() -> list[object]:
    return [yaml.safe_load(text) for text in (TEXT, WITH_VISION)]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("configs") / "run.yaml"


def judge(file: Path, content: str | bytes, *overrides: str) -> TrainConfig | None:
    """Load it; of a config that is accepted, what the run does with it before it starts."""
    show((content, overrides))
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    config = read(load_config, file, overrides)
    if config is not None:
        config.layer_split if not config.has_vision else config.lap_layers  # noqa: B018
        assert json.loads(json.dumps(shared_fingerprint(config))) == shared_fingerprint(config)
        file.write_text(as_text(config.model_dump(mode="json")), encoding="utf-8")
        assert load_config(file) == config
    return config


def broken_yaml(text: str, rng: random.Random) -> str:
    for _ in range(rng.randint(1, 2)):
        place = rng.randint(0, len(text))
        text = text[:place] + rng.choice(WORDS) + text[place + rng.randrange(3) :]
    return text


def test_the_good_ones_are_accepted(file: Path) -> None:
    assert judge(file, TEXT) is not None and judge(file, WITH_VISION) is not None


@inputs(500)
@given(seed=seeds)
def test_texts_with_slips(file: Path, seed: int) -> None:
    rng = random.Random(seed)
    text = rng.choice((TEXT, WITH_VISION))
    judge(file, broken_yaml(text, rng) if rng.random() < 0.7 else broken_text(text, rng))


@inputs(400)
@given(seed=seeds)
def test_other_values(file: Path, seed: int) -> None:
    rng = random.Random(seed)
    judge(file, as_text(broken_value(rng.choice(contents()), rng)))  # JSON is YAML


@inputs(200)
@given(content=st.one_of(st.binary(max_size=40), st.text(max_size=40).map(lambda text: text.encode())))
@example(content=b"")
@example(content=b"\xff\xfe\x00")
@example(content=b"[" * 20_000)
@example(content=b"a: " + b"{a: " * 20_000)
@example(content=b"- " * 20_000)
def test_any_bytes(file: Path, content: bytes) -> None:
    judge(file, content)


@inputs(100)
@given(seed=seeds)
def test_files_with_bad_bytes(file: Path, seed: int) -> None:
    judge(file, broken_bytes(TEXT.encode(), random.Random(seed)))


@inputs(400)
@given(seed=seeds)
def test_overrides(file: Path, seed: int) -> None:
    rng = random.Random(seed)
    keys = list(keys_of(TrainConfig))
    key = (
        rng.choice(keys)
        if rng.random() < 0.9
        else rng.choice(("", ".", "a.b", "model", "\udc80", "model.hf.x", "x" * 5000))
    )
    value = rng.choice(WORDS) if rng.random() < 0.5 else yaml.safe_dump(other_value(rng), default_flow_style=True)
    judge(file, "train:\n", f"{key}={value}")


def test_every_key_with_every_value(file: Path) -> None:
    """Not by chance: all sections together, so that their mistakes are told together."""
    for value in OTHERS:
        text = (
            yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
            .removesuffix("...\n")
            .strip()
        )
        judge(file, "train:\n", *(f"{key}={text}" for key in keys_of(TrainConfig)))


@pytest.mark.parametrize(
    "line",
    ["  a{0}: &a{0} [{1}]", "  a{0}: &a{0} {{{2}}}", "  a{0}: &a{0} {{<<: [{1}], k{0}: 1}}"],
    ids=("lists", "maps", "merged"),
)
def test_laughter(file: Path, line: str) -> None:
    """Each name stands for ten of the name before: ten lines for 10^9 values."""
    lines = ["model:", "  a0: &a0 {x: 1}"]
    for number in range(1, 10):
        names = [f"*a{number - 1}"] * 10
        pairs = ", ".join(f"k{i}: {name}" for i, name in enumerate(names))
        lines.append(line.format(number, ", ".join(names), pairs))
    judge(file, "\n".join(lines))
    judge(file, "model: {megatron: &a {x: *a}}")
    judge(file, "model: &a [*a]")
