"""What fuzzing found, one test a defect: each says what went wrong before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ldt_schedules.cli import problem_input
from ldt_schedules.comm.message_header import MessageHeader
from ldt_schedules.errors import ConfigError, LdtError
from ldt_schedules.megatron.checkpoints.site_directory import LATEST, MANIFEST, newest_step, read_manifest, steps
from ldt_schedules.planning import Layout, ScheduleError, plan, read_table, write_table
from ldt_schedules.planning.formats import problem_json
from ldt_schedules.planning.layout import MAX_MICROBATCHES, MAX_RANKS
from ldt_schedules.runtime.step_header import StepHeader
from ldt_schedules.training.chat.samples import read_samples
from ldt_schedules.training.config import load_config
from ldt_schedules.training.corpus import documents
from ldt_schedules.training.data import check_data
from ldt_schedules.training.data_format import holds_messages

TABLE = json.loads(write_table(plan("gpipe", Layout.u(2), 1), "json"))
PROBLEM = {"ranks": 2, "microbatches": 2, "stages": [{"rank": 0, "f": 1, "b": 2}, {"rank": 1, "f": 1, "b": 2}]}


def refused(read: Callable[[], Any], kind: type[Exception], *words: str) -> None:
    with pytest.raises(kind) as caught:
        read()
    assert all(word in str(caught.value) for word in words), str(caught.value)


# Tables and problems --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ['{"a": ' + "[" * 100_000, '{"a": ' * 100_000, '{"a": ' + "[" * 40 + "]" * 40 + "}"])
def test_lists_in_lists(text: str) -> None:
    """RecursionError; and there are depths that Python can read, but not show in a message."""
    refused(lambda: read_table(text), ScheduleError, "nested deeper than")


def test_as_many_ranks_as_somebody_writes() -> None:
    """A set with a name for each rank: no end, and no memory."""
    refused(lambda: read_table(json.dumps({**TABLE, "num_ranks": 10**12})), ScheduleError, "at most 10000 ranks")
    refused(lambda: problem_json.loads(json.dumps({**PROBLEM, "ranks": 10**12})), ScheduleError, "at most 10000 ranks")
    for ranks, domains in ((10**12, 1), (2, 10**12)):
        refused(lambda r=ranks, d=domains: Layout.u(r, d), ScheduleError, f"at most {MAX_RANKS} ranks")
        refused(lambda r=ranks, d=domains: Layout.laps(r, 2, d), ScheduleError, f"at most {MAX_RANKS} ranks")
    refused(lambda: problem_input.from_numbers(2, 2, 1, 10**12, 0.0, None, 2.0, 1.0), ScheduleError, "laps")


def test_a_message_about_missing_rows_is_short() -> None:
    """One name for each missing row: a message of sixty thousand characters."""
    with pytest.raises(ScheduleError, match=r"no row for 2, .* and \d+ more; write \[\]") as caught:
        read_table(json.dumps({**TABLE, "num_ranks": MAX_RANKS}))
    assert len(str(caught.value)) < 300


def test_as_many_microbatches_as_somebody_writes() -> None:
    """A loop over all of them for each rank."""
    many = {**PROBLEM, "microbatches": 10**12}
    refused(lambda: problem_json.loads(json.dumps(many)), ScheduleError, f"at most {MAX_MICROBATCHES} microbatches")
    refused(lambda: read_table("0F0,0F999999999\n1F0\n"), ScheduleError, f"at most {MAX_MICROBATCHES} microbatches")


def test_a_line_for_each_rank_of_a_long_chain() -> None:
    """The order of the stages took the square of their number: minutes for a file of blank lines."""
    refused(lambda: read_table("0F0\n" + "\n" * 100_000), ScheduleError, f"at most {MAX_RANKS} ranks")
    layout = Layout.u(MAX_RANKS)
    assert layout.forward_order == tuple(range(MAX_RANKS + 1)) and layout.consumers(3) == (4,)


# Configs --------------------------------------------------------------------------------------------------------------

VALUES = {
    "model: {hidden_size: 0x_}": "'0x_' is no number",
    "model: {hidden_size: " + "9" * 5000 + "}": "is no number",
    "model: {hidden_size: 0x" + "f" * 5000 + "}": "larger than any number",
    "model: {hidden_size: 10000000000000000000000}": "larger than any number",
    "train: {lr: .inf}": "'.inf' is larger than any number",
    "model: {megatron: {a: .nan}}": "or no number",
    "train: {lr: !!float x}": "the tag tag:yaml.org,2002:float has no place here",
    "train: {lr: !!bool x}": "has no place here",
    "train: !!python/object:os.system {}": "has no place here",
    "? [a]\n: 1": "a list cannot be a key",
    "model: " + "[" * 20_000: "nested deeper than",
    "model: {megatron: &a {x: *a}}": "*a stands for a section",
    "train: &a {lr: 1.0}\nmodel: {megatron: {<<: *a}}": "*a stands for a section",
    "sites: {cloud: {pipeline_ranks: 1000000000000}}": "sites.cloud.pipeline_ranks: given 1000000000000; it must be less than",
}


@pytest.mark.parametrize("text", VALUES, ids=range(len(VALUES)))
def test_what_yaml_reads_and_python_does_not(text: str, tmp_path: Path) -> None:
    """ValueError, KeyError, TypeError, RecursionError, MemoryError, or a value that is not equal to itself."""
    (tmp_path / "a.yaml").write_text(text)
    refused(lambda: load_config(tmp_path / "a.yaml"), ConfigError, "a.yaml", VALUES[text])


def test_names_that_no_file_has(tmp_path: Path) -> None:
    """OSError of a name that is too long, ValueError of a NUL character."""
    config = tmp_path / "a.yaml"
    config.write_text("train:\n")
    refused(lambda: load_config(config, [f"model.hf={'x' * 5000}"]), ConfigError, "model.hf: ", "cannot be read")
    refused(
        lambda: load_config(config, ['data.path="a\\0.jsonl"']), ConfigError, "override 'data.path=", "a NUL character"
    )
    long = load_config(config, [f"data.path={'x' * 5000}.jsonl"])
    assert not holds_messages(long)
    refused(lambda: check_data(long), ConfigError, "cannot be read")


def test_a_date_is_text(tmp_path: Path) -> None:
    """`2026-02-31` was a ValueError, and a date was refused where a directory is named by it."""
    for date in ("2026-01-31", "2026-02-31"):
        (tmp_path / "a.yaml").write_text(f"train: {{output_dir: {date}}}")
        assert load_config(tmp_path / "a.yaml").train.output_dir == date


def test_a_name_for_one_value_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: {hidden_size: &width 256, ffn_hidden_size: *width}")
    assert load_config(tmp_path / "a.yaml").model.ffn_hidden_size == 256


# What crosses the link ------------------------------------------------------------------------------------------------

HEADER = StepHeader(3, False, "abc", ((16, 2, 32),) * 2, "bfloat16", told=({}, {})).to_message()
FIELDS = {
    "step": (True, "3", -1, 2**70), "forward_only": (0, None), "table_hash": (None, "x" * 1000),
    "shapes": ([], [[]], [[0]], [[1.0]], [["2"]], 3, [[2**50]], [[2**30, 2**30]], [[1] * 9]),
    "dtype": ("float", "Tensor", "int64", None), "told": ([], [{}], [1, 2], [{1: 2}, {}], "x"), "failure": (1, ""),
    "mistake": (1, None), "agreed": (None, 7), "pixels": ([1],),
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_of_a_step_is_checked_and_named(name: str) -> None:
    """They were taken as they came: a TypeError later, a dtype that is no dtype, room for any shape."""
    for value in FIELDS[name]:
        refused(lambda v=value: StepHeader.from_message({**HEADER, name: v}), LdtError, "the header of a step", name)


def test_a_step_that_lacks_a_field() -> None:
    """KeyError; or a default that the other site never said."""
    for name in HEADER:
        refused(lambda n=name: StepHeader.from_message({k: v for k, v in HEADER.items() if k != n}), LdtError, name)
    for message in (None, [], "step"):
        refused(lambda m=message: StepHeader.from_message(m), LdtError, "all of it")


def test_sites_that_agreed_on_something_else() -> None:
    edge, cloud = (StepHeader(0, False, "abc", ((1,),), "float32", agreed=agreed) for agreed in ("x", "y"))
    edge.require_agreement(edge)
    refused(lambda: edge.require_agreement(cloud), LdtError, "agreed: edge 'x', here 'y'")


def test_a_message_of_another_length() -> None:
    """RuntimeError of a view, or ValueError of too few values."""
    for length in (0, 7, 8, 64):
        refused(
            lambda n=length: MessageHeader.decoded(torch.zeros(n, dtype=torch.uint8)), LdtError, f"received {length}"
        )


def test_a_message_larger_than_any_memory() -> None:
    """The receiver made room for whatever size was written."""
    message = MessageHeader.of(torch.zeros(2, 3), 1, 1).encoded()
    message.view(torch.int64)[6] = 2**62
    refused(lambda: MessageHeader.decoded(message), LdtError, "where the header of a message was expected")


def test_numbers_where_a_message_has_none() -> None:
    """Sizes behind the last dimension, or parts behind the last part, were passed over: what was read was not what came."""
    for place in (10, 40, 163):
        message = MessageHeader.of(torch.zeros(2, 3), 1, 1).encoded()
        message.view(torch.int64)[place] = 5
        refused(lambda m=message: MessageHeader.decoded(m), LdtError, "where the header of a message was expected")


# Checkpoints ----------------------------------------------------------------------------------------------------------

MANIFEST_CONTENT = {"site": "edge", "iteration": 1, "run": "r", "sizes": {"world": 1}, "files": {}}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("iteration", "1"), ("site", ["edge"]), ("sizes", [1]), ("sizes", {"world": "1"}), ("consumed_samples", None),
        ("files", {"a": {"num_bytes": "1", "sha256": 3}}), ("settings", []), ("extra", 1),
    ],
)  # fmt: skip
def test_a_manifest_is_read_by_its_types(name: str, value: object, tmp_path: Path) -> None:
    """Values of any type came through, and failed far from the file."""
    (tmp_path / MANIFEST).write_text(json.dumps({**MANIFEST_CONTENT, name: value}))
    refused(lambda: read_manifest(tmp_path), ConfigError, f"{MANIFEST} is damaged ({name}")


def test_a_manifest_that_is_no_file_or_too_deep(tmp_path: Path) -> None:
    """IsADirectoryError, RecursionError."""
    (tmp_path / "a" / MANIFEST).mkdir(parents=True)
    refused(lambda: read_manifest(tmp_path / "a"), ConfigError, "cannot be read")
    (tmp_path / MANIFEST).write_text("[" * 100_000)
    refused(lambda: read_manifest(tmp_path), ConfigError, "is damaged")


@pytest.mark.parametrize(
    ("content", "word"), [(b"\xff", "cannot be read"), (b"9" * 5000, "no step"), ("٣".encode(), "no step")]
)
def test_the_file_that_names_the_newest_step(content: bytes, word: str, tmp_path: Path) -> None:
    """UnicodeDecodeError, ValueError, and Arabic digits that named a directory in ours."""
    (tmp_path / LATEST).write_bytes(content)
    refused(lambda: newest_step(tmp_path), ConfigError, word)


def test_directories_named_in_other_digits(tmp_path: Path) -> None:
    """`iter_٠٠٠٠٠٠٣` counted as step 3, which then was not there."""
    step = tmp_path / "iter_٠٠٠٠٠٠٣"
    step.mkdir()
    (step / MANIFEST).write_text("{}")
    assert steps(tmp_path) == []


# Data -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "word"),
    [
        ({"type": "image", "image": "x" * 5000}, "is no file"),
        ({"type": "video", "video": ["a.png"], "fps": 10**400}, "messages[0].content[0].fps"),
    ],
)
def test_pictures_and_rates_beyond_measure(part: dict[str, Any], word: str, tmp_path: Path) -> None:
    """OSError for a name that no file system has, OverflowError for a rate that no float holds."""
    messages = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "b"}]
    (tmp_path / "a.png").touch()
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}))
    refused(lambda: read_samples(tmp_path / "a.jsonl"), ConfigError, "line 1: ", word)


def test_half_a_character_in_a_text(tmp_path: Path) -> None:
    """UnicodeEncodeError of the tokenizer, without file and line."""
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "\\ud800"}')
    refused(lambda: list(documents(str(tmp_path / "a.jsonl"))), ConfigError, "a.jsonl, line 2", "surrogate")
