"""Lines of .jsonl files: a ConfigError with the file and the line, or a sample that can be used."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ldt_schedules.errors import ConfigError
from ldt_schedules.training.chat.samples import read_samples
from ldt_schedules.training.chat.writing import open_chat
from ldt_schedules.training.config import TrainConfig
from ldt_schedules.training.corpus import check_text_file, documents
from ldt_schedules.training.data import read_corpus
from ldt_schedules.training.data_format import holds_messages
from ldt_schedules.training.tokenizer import ByteTokenizer
from tests.fuzz.mutations import broken_bytes, broken_text, broken_value, everything_once
from tests.fuzz.reading import inputs, read, seeds, show

TALK = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": "a.png"},
                {"type": "video", "video": ["a.png", "a.png"], "fps": 2},
                {"type": "text", "text": "Which?"},
            ],
        },
        {"role": "assistant", "content": "March"},
    ],
    "id": 7,
}
TEXT = {"text": "Ein Satz.", "id": 1}
GOOD_TALK = {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "a.png").write_bytes(b"")
    return folder / "lines.jsonl"


def line_of(value: object) -> bytes:
    return json.dumps(value).encode()


def judge_talk(file: Path, line: bytes) -> None:
    """As the second of three lines."""
    show(line)
    line = line.replace(b"\n", b" ")
    file.write_bytes(b"\n".join((line_of(GOOD_TALK), line, line_of(GOOD_TALK))))
    bad: list[ConfigError] = []
    for pictures in (True, False):
        samples = read_samples(file, pictures=pictures, bad=bad.append)
        assert len(samples) + len(bad) == (3 if line.strip() else 2)
        assert all(f"{file}, line 2: " in str(error) and len(str(error)) < 50_000 for error in bad)
        if pictures:
            again = [one for one in samples if one.line == 2]
        bad.clear()
    chat = open_chat("bytes")
    for sample in again:
        if not sample.vision:
            assert chat.write(sample.messages).ids.size


def judge_text(file: Path, line: bytes) -> None:
    show(line)
    file.write_bytes(b"\n".join((line_of(TEXT), line, line_of(TEXT))))
    try:
        found = list(documents(str(file)))
        corpus = read_corpus(str(file), ByteTokenizer())
    except ConfigError as error:
        assert str(file) in str(error) and "line " in str(error)
        return
    rest = [text for text in found if text != TEXT["text"]]
    again = b"\n".join(line_of({"text": text}) for text in found)
    file.write_bytes(again)
    assert list(documents(str(file))) == found and len(corpus.tokens) >= len(rest)
    assert np.array_equal(read_corpus(str(file), ByteTokenizer()).tokens, corpus.tokens)


def test_the_good_ones_are_accepted(file: Path) -> None:
    judge_talk(file, line_of(TALK))
    file.write_bytes(line_of(TALK))
    assert len(read_samples(file)) == 1
    judge_text(file, line_of({"text": "x"}))


def test_every_type_at_every_place(file: Path) -> None:
    for value in everything_once(TALK):
        judge_talk(file, line_of(value))
    for value in everything_once(TEXT):
        judge_text(file, line_of(value))


@inputs(600)
@given(seed=seeds)
def test_talks_with_slips(file: Path, seed: int) -> None:
    rng = random.Random(seed)
    how = rng.randrange(3)
    if how == 0:
        judge_talk(file, line_of(broken_value(TALK, rng)))
    elif how == 1:
        judge_talk(file, broken_text(json.dumps(TALK), rng).encode("utf-8", "surrogatepass"))
    else:
        judge_talk(file, broken_bytes(line_of(TALK), rng))


@inputs(300)
@given(
    content=st.one_of(
        st.binary(max_size=40), st.text(max_size=30).map(lambda text: json.dumps({"text": text}).encode())
    )
)
@example(content=b"[" * 100_000)
@example(content=b'{"text": "\\ud800"}')
@example(content=b'{"text": 1e999}')
def test_any_line(file: Path, content: bytes) -> None:
    judge_text(file, content)
    judge_talk(file, content)


@inputs(300)
@given(content=st.binary(max_size=40))
@example(content=b"")
@example(content=b"\xff\xfe{\x00}\x00")
def test_any_first_line(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    config = TrainConfig.model_validate({"data": {"path": str(file)}})
    read(holds_messages, config)
    read(check_text_file, file)
