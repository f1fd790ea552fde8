"""What a site's directory says of itself: `ldt.json`, and the file that names the newest step."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron.checkpoints.site_directory import (
    LATEST,
    MANIFEST,
    FileInfo,
    Manifest,
    newest_step,
    problems_of,
    publish,
    read_manifest,
    step_name,
    steps,
)
from tests.fuzz.mutations import as_text, broken_bytes, broken_value, everything_once
from tests.fuzz.reading import inputs, read, seeds, show

GOOD = Manifest(
    site="edge", iteration=5, run="run", sizes={"world": 1, "tensor": 1}, consumed_samples=40,
    settings={"model.num_layers": 8, "layers": [1, 3], "train.lr": 0.1}, versions={"torch": "2"},
    files={"common.pt": FileInfo(3, "ab" * 32)},
)  # fmt: skip


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    step = tmp_path_factory.mktemp("checkpoints") / step_name(5)
    step.mkdir()
    return step


def judge(step: Path, content: bytes) -> Manifest | None:
    show(content)
    (step / MANIFEST).write_bytes(content)
    manifest = read(read_manifest, step, "edge")
    if manifest is not None:
        problems_of(step, manifest.files.items())
        (step / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1))
        again = read_manifest(step, "edge")
        assert json.dumps(asdict(again)) == json.dumps(asdict(manifest))
    return manifest


def test_the_good_one_is_accepted(step: Path, tmp_path: Path) -> None:
    assert judge(step, json.dumps(asdict(GOOD)).encode()) == GOOD
    (tmp_path / "part").mkdir()
    assert read_manifest(publish(tmp_path / "part", GOOD)) == GOOD
    assert newest_step(tmp_path) == tmp_path / step_name(5) and steps(tmp_path) == [5]


def test_every_type_at_every_place(step: Path) -> None:
    for value in everything_once(asdict(GOOD)):
        judge(step, as_text(value).encode())


@inputs(500)
@given(seed=seeds)
def test_manifests_with_slips(step: Path, seed: int) -> None:
    rng = random.Random(seed)
    if rng.random() < 0.5:
        judge(step, as_text(broken_value(asdict(GOOD), rng)).encode())
    else:
        judge(step, broken_bytes(as_text(asdict(GOOD)).encode(), rng))


@inputs(200)
@given(content=st.binary(max_size=30))
@example(content=b"[" * 100_000)
@example(content=b'{"a":' * 100_000)
def test_any_bytes(step: Path, content: bytes) -> None:
    judge(step, content)


def test_a_directory_in_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).mkdir()
    with pytest.raises(ConfigError, match=r"ldt\.json cannot be read"):
        read_manifest(tmp_path)


@inputs(400)
@given(
    content=st.one_of(
        st.binary(max_size=20), st.text(max_size=8).map(str.encode), st.integers().map(lambda n: b"%d" % n)
    )
)
@example(content=b"9" * 5000)
@example(content="٣".encode())
@example(content="²".encode())
@example(content=b"../../etc")
@example(content=b"release\n")
def test_the_newest_step(step: Path, content: bytes) -> None:
    (step.parent / LATEST).write_bytes(content)
    found = read(newest_step, step.parent)
    if found is not None:
        assert found.parent == step.parent and not found.is_file()
        assert found.name == "release" or found.name == step_name(int(content))
