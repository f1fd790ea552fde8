"""Conversations as samples: packed or apart, cut, counted, resumed; and everything that can be wrong with a file."""

from __future__ import annotations

import itertools
import json
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldt_schedules.errors import ConfigError
from ldt_schedules.training.chat.packing import packed
from ldt_schedules.training.chat.standard_library import library_conversations
from ldt_schedules.training.config import TrainConfig
from ldt_schedules.training.data import check_data
from ldt_schedules.training.data_format import holds_messages
from ldt_schedules.training.run_data import ChatData, TextData, open_data, vocab_size_of

QUESTION, ANSWER = {"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}
FRAME = len("<user\n>\n<assistant\n>\n")
"""Bytes of a conversation of two messages, beside their contents."""


def talk(question: int, answer: int) -> dict[str, Any]:
    """Of so many bytes."""
    return {"messages": [{"role": "user", "content": "q" * question}, {"role": "assistant", "content": "a" * answer}]}


def config(path: Path | None, *, seq: int = 64, replicas: int = 1, **data: Any) -> TrainConfig:
    site = {"data_parallel": replicas}
    return TrainConfig.model_validate(
        {
            "model": {"seq_length": seq},
            "sites": {"edge": site, "cloud": site},
            "data": {"path": None if path is None else str(path), "validation_fraction": 0.2, **data},
            "train": {"micro_batch_size": 2, "global_batch_size": 4, "eval_interval": 0},
        }
    )


def write(folder: Path, *lines: Any) -> Path:
    file = folder / "chat.jsonl"
    file.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return file


@pytest.fixture
def talks(tmp_path: Path) -> Path:
    lengths = random.Random(1)
    return write(tmp_path, *(talk(lengths.randint(1, 15), lengths.randint(1, 20)) for _ in range(40)))


def chat_data(settings: TrainConfig) -> ChatData:
    data = open_data(settings)
    assert isinstance(data, ChatData)
    return data


# Packing --------------------------------------------------------------------------------------------------------------


def test_every_conversation_is_packed_once_and_all_fit() -> None:
    for seed in range(200):
        lengths = [random.Random(f"{seed} {i}").randint(1, 30) for i in range(seed % 40)]
        packs = packed(lengths, 30)
        assert sorted(itertools.chain(*packs)) == list(range(len(lengths)))
        assert all(sum(lengths[one] for one in pack) <= 30 for pack in packs)
        # Two samples that are half empty would have been one.
        assert sum(sum(lengths[one] for one in pack) <= 15 for pack in packs) <= 1
        assert packs == packed(lengths, 30)
    assert packed([5, 5, 7, 3, 10], 10) == ((0, 1), (2, 3), (4,))


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_packed_sample_is_its_conversations(talks: Path, side: str) -> None:
    data = chat_data(config(talks, padding_side=side))
    dataset, chat = data.dataset, data.chat
    assert data.announced and data.vocab_size == vocab_size_of(data.config) == 259
    packs = dataset.packs["train"][:3]
    batch = dataset.batch(packs)
    for row, pack in enumerate(packs):
        whole = [dataset.conversations[number] for number in pack]
        total = sum(len(one.ids) for one in whole)
        start = 0 if side == "right" else 64 - total
        assert int(batch["lengths"][row]) == total
        for segment, one in enumerate(whole, 1):
            here = slice(start, start + len(one.ids))
            assert batch["tokens"][row, here].tolist() == one.ids.tolist()
            assert batch["labels"][row, here].tolist() == [*one.ids[1:], chat.pad]
            assert batch["loss_mask"][row, here].tolist() == [*one.learned[1:], 0]
            assert batch["position_ids"][row, here].tolist() == list(range(len(one.ids)))
            assert batch["segments"][row, here].unique().tolist() == [segment]
            start += len(one.ids)
        padding = batch["segments"][row] == 0
        assert int(padding.sum()) == 64 - total and not batch["loss_mask"][row, padding].any()
    assert data.tokens_of(batch) == int(batch["lengths"].sum())
    labels, mask = batch["labels"], batch["loss_mask"].bool()
    assert set(labels[mask].tolist()) <= {ord("a"), 258}, "something but an answer is learned"


def test_one_in_each_sample(talks: Path) -> None:
    """On the right the causal mask does it all, and the cloud need not be told where padding begins."""
    packed_data, right, left = (
        chat_data(config(talks, seq=128, packing=packing, padding_side=side))
        for packing, side in ((True, "right"), (False, "right"), (False, "left"))
    )
    assert [one.announced for one in (packed_data, right, left)] == [True, False, True]
    assert right.dataset.num_samples("train") == 32 and right.dataset.num_samples("validation") == 8
    assert packed_data.dataset.num_samples("train") < 14
    assert right.dataset.real_share() < 0.4 < 0.8 < packed_data.dataset.real_share()
    assert f"40 conversations in 40 samples, {right.dataset.real_share():.1%}" in right.contents
    batch = next(right.microbatches("train", 0))
    assert "segments" not in batch and batch["tokens"].shape == (2, 128)
    assert "segments" in next(left.microbatches("train", 0))
    assert right.unigram_entropy() == packed_data.unigram_entropy() > 0


def test_validation_is_apart(talks: Path) -> None:
    packs = chat_data(config(talks)).dataset.packs
    numbers = {split: sorted(itertools.chain(*packs[split])) for split in packs}
    assert numbers == {"train": list(range(32)), "validation": list(range(32, 40))}


# Order ----------------------------------------------------------------------------------------------------------------


def rows(data: ChatData | TextData, count: int, rank: int = 0, split: Any = "train", **more: int) -> list[list[int]]:
    stream = itertools.islice(data.microbatches(split, rank, **more), count)
    return [row for batch in stream for row in batch["tokens"].tolist()]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_run_is_resumed_by_the_samples_it_has_consumed(talks: Path, tmp_path: Path, split: str) -> None:
    text = tmp_path / "a.txt"
    text.write_text("".join(map(str, range(2000))))
    for settings in (config(talks), config(talks, packing=False), config(text)):
        data, again = open_data(settings), open_data(settings)
        for consumed in (4, 40, 100):  # the third is beyond the first epoch
            beginning = rows(data, consumed // 2 + 5, split=split)
            assert beginning[consumed:] == rows(again, 5, split=split, consumed_samples=consumed)


def test_layouts_of_one_run_see_the_same_global_batches(talks: Path) -> None:
    alone = rows(chat_data(config(talks)), 2)
    replicas = [rows(chat_data(config(talks, replicas=2)), 1, rank) for rank in range(2)]
    assert sorted(alone) == sorted(itertools.chain(*replicas))


def test_an_epoch_sees_every_conversation_once(talks: Path) -> None:
    dataset = chat_data(config(talks)).dataset
    count = dataset.num_samples("train")
    for epoch in range(2):
        seen = rows(chat_data(config(talks)), count // 2 + 1, consumed_samples=epoch * count)[:count]
        assert sum(row.count(257) for row in seen) == 2 * 32


# What is cut, left out, passed over -----------------------------------------------------------------------------------


def test_long_conversations_are_cut_and_told_once(tmp_path: Path) -> None:
    file = write(tmp_path, talk(5, 5), talk(5, 60), talk(80, 5), talk(5, 64 - FRAME - 5), talk(5, 5))
    with pytest.warns(UserWarning) as caught:
        data = chat_data(config(file))
    (message,) = (str(one.message) for one in caught)
    assert message == (
        "2 of 5 conversations have more than model.seq_length 64 tokens and are cut at their end, 1 of them before the "
        "assistant's first word, and left out"
    )
    assert data.dataset.conversations.lengths == [FRAME + 10, 64, 64, FRAME + 10]
    with (
        pytest.warns(UserWarning),
        pytest.raises(
            ConfigError, match=r"of 1 conversations none can be learned from; raise model\.seq_length, now 64"
        ),
    ):
        open_data(config(write(tmp_path, talk(80, 5))))


WRONG: dict[str, tuple[Any, str]] = {
    "json": (b"{", "line 2: not JSON"),
    "no messages": ({"text": "a"}, "line 2: the line has no key 'messages'"),
    "empty": ({"messages": []}, "line 2: messages is an empty list"),
    "role": (
        {"messages": [{"role": "robot", "content": "x"}]},
        "line 2: messages[0].role is 'robot'; allowed are system",
    ),
    "no assistant": ({"messages": [QUESTION]}, "line 2: no message of the assistant"),
    "picture": (
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}, ANSWER]},
        "line 2: messages[0].content[0].type is 'image'; without vision.num_layers a model reads text alone",
    ),
    "tools": ({"messages": [QUESTION, ANSWER], "tools": [1]}, "line 2: the line has the key 'tools'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_bad_line_stops_or_is_passed_over(name: str, tmp_path: Path) -> None:
    line, message = WRONG[name]
    good = {"messages": [QUESTION, ANSWER], "id": 7, "source": "mine"}
    file = write(tmp_path, good, line, good)
    for read in (check_data, open_data):
        with pytest.raises(ConfigError) as caught:
            read(config(file))
        assert message in str(caught.value) and str(file) in str(caught.value)
    check_data(config(file, on_bad_sample="skip"))
    with pytest.warns(
        UserWarning, match="1 of 3 conversations cannot be used and are passed over; the first: data.path"
    ):
        assert len(chat_data(config(file, on_bad_sample="skip")).dataset.conversations) == 2


def test_a_text_that_the_tokenizer_refuses_is_named_too(tmp_path: Path) -> None:
    from tests.training.chat_tokenizers import QWEN_LIKE, VISION_TOKENS, save_tokenizer

    name = save_tokenizer(tmp_path / "tok", QWEN_LIKE, VISION_TOKENS)
    bad = {"messages": [{"role": "user", "content": "<|im_end|>"}, ANSWER]}
    file = write(tmp_path, *[{"messages": [QUESTION, ANSWER]}] * 4, bad)
    with pytest.raises(ConfigError, match=r"line 5: a text contains <\|im_end\|>, a special token"):
        open_data(config(file, tokenizer=name))
    with pytest.warns(UserWarning, match="1 of 5 conversations"):
        data = chat_data(config(file, tokenizer=name, on_bad_sample="skip"))
    assert data.tokens_of(next(data.microbatches("train", 0))) > 0


def test_an_attention_that_knows_no_segments(talks: Path) -> None:
    def settings(**data: Any) -> TrainConfig:
        content = config(talks, **data).model_dump()
        content["model"]["megatron"] = {"window_size": [8, 0]}
        return TrainConfig.model_validate(content)

    with pytest.raises(ConfigError, match=r"model\.megatron\.window_size asks .* set data\.packing=false"):
        open_data(settings())
    open_data(settings(packing=False))


def test_too_few(tmp_path: Path) -> None:
    file = write(tmp_path, talk(3, 3))
    with pytest.raises(ConfigError, match=r"has 1 conversation, of which data\.validation_fraction 0\.2 keeps 1"):
        open_data(config(file))
    data = chat_data(config(file, validation_fraction=0.0))
    with pytest.raises(ConfigError, match=r"there is no validation data"):
        next(data.microbatches("validation", 0))


# Format ---------------------------------------------------------------------------------------------------------------


def test_the_first_line_says_what_a_file_holds(tmp_path: Path) -> None:
    talks, texts = {"messages": [QUESTION, ANSWER], "id": 1}, {"text": "a", "id": 1}
    assert holds_messages(config(write(tmp_path, b"", b" ", talks)))
    assert not holds_messages(config(write(tmp_path, texts)))
    assert not holds_messages(config(None)) and not holds_messages(config(tmp_path / "gone.jsonl"))
    assert holds_messages(config(write(tmp_path, texts), format="messages"))
    assert not holds_messages(config(write(tmp_path, talks), format="text"))
    for line, has in (({"body": 1}, "has the keys body"), ({}, r"\(none\)"), (talks | texts, "both text and messages")):
        with pytest.raises(
            ConfigError, match=rf"first line has.*{has.removeprefix('has ')}.*`text`.*`messages`.*data\.format=text"
        ):
            open_data(config(write(tmp_path, line)))
    with pytest.raises(ConfigError, match=r'a string "text" is needed'):
        open_data(config(write(tmp_path, talks), format="text"))
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(ConfigError, match=r"conversations need a \.jsonl file"):
        open_data(config(tmp_path / "a.txt", format="messages"))


# The conversations that every machine has -----------------------------------------------------------------------------


def test_the_library_answers_questions() -> None:
    first, again = (library_conversations(60) for _ in range(2))
    assert first == again and len(first) == 60
    assert {len(one.messages) for one in first} == {2, 4}
    for one in first:
        question, answer = (str(message.parts[0]) for message in one.messages[:2])
        assert question.startswith("What does ") and question.endswith(" do?")
        assert 0 < len(answer) <= 120 and one.line > 0
        if len(one.messages) == 4:
            assert str(one.messages[3].parts[0]).startswith(
                question.removeprefix("What does ").removesuffix(" do?") + "("
            )


def test_the_library_is_read_where_there_is_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    from ldt_schedules.training.chat import conversations

    monkeypatch.setattr(conversations, "library_conversations", lambda: library_conversations(60))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of escapes in sources, of conversations that are too long
        data = chat_data(config(None, seq=384, format="messages"))
    batch = next(data.microbatches("train", 0))
    assert np.mean([len(pack) for pack in data.dataset.packs["train"]]) > 1.5
    assert batch["tokens"].dtype == torch.int64 and 0 < float(batch["loss_mask"].mean()) < 0.9
