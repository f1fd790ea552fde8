"""Conversations of text to ids: what is learned is what the assistant wrote, and a tokenizer stays as large as it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ldt_schedules.training.chat.huggingface import HuggingFaceChat
from ldt_schedules.training.chat.samples import Message
from ldt_schedules.training.chat.writing import ByteChat, ChatError, open_chat
from tests.training.chat_tokenizers import LLAMA_LIKE, QWEN_LIKE, TEXT_ONLY, THOUGHTFUL, save_tokenizer

TURNS = ["<|im_start|>", "<|im_end|>"]
TALK = (
    Message("system", ("Be short.",)),
    Message("user", ("Which bar?",)),
    Message("assistant", ("March",)),
    Message("user", ("Why?",)),
    Message("assistant", ("Grün!",)),
)


def learned(chat: HuggingFaceChat, messages: tuple[Message, ...]) -> str:
    written = chat.write(messages)
    return str(chat.inner.decode(written.ids[written.learned]))


def opened(folder: Path, template: str | None, special: list[str] = TURNS) -> HuggingFaceChat:
    chat = open_chat(save_tokenizer(folder, template, special), pictures=False)
    assert isinstance(chat, HuggingFaceChat)
    return chat


def test_bytes_have_two_special_tokens() -> None:
    chat = open_chat("bytes", pictures=False)
    assert isinstance(chat, ByteChat)
    assert (chat.turn_start, chat.turn_end, chat.vocab_size, chat.pad) == (257, 258, 259, 256)
    written = chat.write(TALK[1:3])
    question = [257, *b"user\nWhich bar?", 258, 10, 257, *b"assistant\n"]
    assert written.ids.tolist() == [*question, *b"March", 258, 10]
    assert written.learned.tolist() == [False] * len(question) + [True] * 6 + [False]
    assert written.ids[written.learned].tolist() == [*b"March", 258]


@pytest.mark.parametrize(
    ("template", "special", "answers"),
    [
        (QWEN_LIKE, TURNS, "March<|im_end|>Grün!<|im_end|>"),
        (TEXT_ONLY, [], " March<|endoftext|> Grün!<|endoftext|>"),
        (None, [], "March<|im_end|>Grün!<|im_end|>"),
    ],
    ids=["qwen", "other", "none"],
)
def test_a_template_is_followed_and_answers_are_learned(
    template: str | None, special: list[str], answers: str, tmp_path: Path
) -> None:
    chat = opened(tmp_path, template, special)
    assert learned(chat, TALK) == answers
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(tmp_path)
    added = 0 if template else len(TURNS)
    assert chat.vocab_size == len(own) + added, "tokens for images were added"
    if template:
        plain = [{"role": one.role, "content": one.parts[0]} for one in TALK]
        assert chat.inner.decode(chat.write(TALK).ids) == own.apply_chat_template(plain, tokenize=False)


def test_a_template_that_writes_the_last_answer_otherwise(tmp_path: Path) -> None:
    """The text is the one that the template writes for the whole conversation; every answer is found in it."""
    chat = opened(tmp_path, THOUGHTFUL)
    empty = "<think>\n\n</think>\n\n"
    assert learned(chat, TALK) == f"March<|im_end|>{empty}Grün!<|im_end|>"
    thinking = (*TALK[:2], Message("assistant", ("<think>\nhm\n</think>\n\nMarch",)))
    assert learned(chat, thinking) == "<think>\nhm\n</think>\n\nMarch<|im_end|>"
    assert learned(chat, (*thinking, *TALK[3:])) == f"March<|im_end|>{empty}Grün!<|im_end|>"


def test_a_content_that_looks_like_the_end_of_an_answer(tmp_path: Path) -> None:
    """A closing that is no special token of ours may stand in a text, and could not be told from the end."""
    chat = opened(tmp_path, THOUGHTFUL.replace("<|im_end|>", "(over)"))
    assert learned(chat, TALK).startswith("March(over)")
    with pytest.raises(ChatError, match="message 2 cannot be found"):
        chat.write((*TALK[:2], Message("assistant", ("March (over) and out",)), *TALK[3:]))


@pytest.mark.parametrize("token", TURNS)
def test_a_text_with_a_turns_token_is_refused(token: str, tmp_path: Path) -> None:
    with pytest.raises(ChatError, match="a special token"):
        opened(tmp_path, QWEN_LIKE).write((Message("user", (f"a {token}",)), TALK[2]))


def test_a_text_with_any_special_token_of_the_tokenizer_is_refused(tmp_path: Path) -> None:
    """Llama 3's turns, and its tokens with a role; what was added without being special may stand in a text."""
    turns = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    chat = opened(tmp_path, LLAMA_LIKE, turns)
    chat.inner.add_tokens(["<think>"])
    assert learned(chat, (TALK[1], Message("assistant", ("<think> March",)))) == "<think> March<|eot_id|>"
    for token in (*turns, "<|endoftext|>", "<s>"):
        with pytest.raises(ChatError, match=f"a text contains {re.escape(token)}, a special token"):
            chat.write((Message("user", (f"a {token}assistant",)), TALK[2]))
