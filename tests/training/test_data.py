"""Data: which sample comes when, and every way in which a file cannot be trained on."""

from __future__ import annotations

import builtins
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ldt_schedules.errors import ConfigError
from ldt_schedules.training import corpus as corpus_module
from ldt_schedules.training.config import TrainConfig
from ldt_schedules.training.data import (
    Corpus,
    batches,
    check_data,
    cut,
    open_dataset,
    read_corpus,
    sample_index,
)
from ldt_schedules.training.tokenizer import ByteTokenizer, open_tokenizer


def config(
    path: Path | None = None, *, seq: int = 8, micro: int = 2, data_parallel: int = 1, fraction: float = 0.2
) -> TrainConfig:
    site = {"data_parallel": data_parallel}
    return TrainConfig.model_validate(
        {
            "model": {"seq_length": seq},
            "sites": {"edge": site, "cloud": site},
            "data": {"path": None if path is None else str(path), "validation_fraction": fraction},
            "train": {"micro_batch_size": micro, "global_batch_size": 4, "eval_interval": 0},
        }
    )


def counting_corpus(tokens: int) -> Corpus:
    return Corpus(np.arange(tokens, dtype=np.uint16), vocab_size=tokens, eod=0)


def test_text_file_is_mapped_byte_by_byte(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("grün\n" * 40, encoding="utf-8")
    corpus = read_corpus(str(file), ByteTokenizer())
    assert isinstance(corpus.tokens, np.memmap)
    assert bytes(corpus.tokens) == file.read_bytes()


def test_jsonl_documents_end_with_eod(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "ab"}\n\n{"text": "c", "id": 3}\n')
    assert read_corpus(str(file), ByteTokenizer()).tokens.tolist() == [97, 98, 256, 99, 256]


def test_default_corpus_is_the_same_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "STDLIB_MAX_BYTES", 200_000)
    first, second = (read_corpus(None, ByteTokenizer()) for _ in range(2))
    assert np.array_equal(first.tokens, second.tokens)
    assert 100_000 < len(first.tokens) < 210_000
    assert 2.5 < first.unigram_entropy() < 4.0


def test_unigram_entropy() -> None:
    corpus = Corpus(np.array([0, 1, 2, 3] * 5, dtype=np.uint8), vocab_size=257, eod=256)
    assert corpus.unigram_entropy() == pytest.approx(math.log(4))


def test_samples_overlap_by_the_label_only() -> None:
    dataset = cut(counting_corpus(101), 10, 0.2)
    assert (dataset.num_train, dataset.num_validation) == (8, 2)
    assert dataset.sample("train", 1).tolist() == list(range(10, 21))
    assert dataset.sample("validation", 1).tolist() == list(range(90, 101))


def test_batch_has_megatrons_shapes() -> None:
    batch = next(batches(cut(counting_corpus(101), 10, 0.2), config(seq=10)))
    assert {k: (tuple(v.shape), v.dtype) for k, v in batch.items()} == {
        "tokens": ((2, 10), torch.int64),
        "labels": ((2, 10), torch.int64),
        "loss_mask": ((2, 10), torch.float32),
        "position_ids": ((2, 10), torch.int64),
    }
    assert torch.equal(batch["labels"], batch["tokens"] + 1)
    assert all(tensor.is_contiguous() for tensor in batch.values())


def test_an_epoch_sees_every_sample_once_in_another_order_each_time() -> None:
    epochs = [[sample_index(epoch * 50 + i, 50, seed=7) for i in range(50)] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(50))
    assert epochs[0] != epochs[1] != list(range(50))
    assert epochs[0] != [sample_index(i, 50, seed=8) for i in range(50)]


def test_order_is_frozen() -> None:
    # A change here would make resumed runs see other samples than the run they resume.
    assert [sample_index(i, 10, seed=1234) for i in range(10)] == [3, 8, 6, 4, 9, 1, 5, 2, 0, 7]


def take(dataset: object, count: int, settings: TrainConfig, **more: int) -> list[list[int]]:
    stream = batches(dataset, settings, **more)  # type: ignore[arg-type]
    return [row for batch in itertools.islice(stream, count) for row in batch["tokens"].tolist()]


def test_resuming_by_consumed_samples() -> None:
    dataset, settings = cut(counting_corpus(201), 8, 0.2), config()
    assert take(dataset, 20, settings)[8:] == take(dataset, 16, settings, consumed_samples=8)


def test_layouts_of_one_run_see_the_same_global_batches() -> None:
    dataset = cut(counting_corpus(201), 8, 0.2)
    alone = take(dataset, 2, config())
    replicas = [take(dataset, 1, config(data_parallel=2), data_rank=rank) for rank in range(2)]
    assert sorted(alone) == sorted(row for rows in replicas for row in rows)


def test_validation_is_apart_and_repeats() -> None:
    dataset, settings = cut(counting_corpus(201), 8, 0.2), config()
    first, second = ([*itertools.islice(batches(dataset, settings, split="validation"), 3)] for _ in range(2))
    assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(first, second, strict=True))
    assert min(int(batch["tokens"].min()) for batch in first) >= dataset.num_train * 8


def test_no_validation_split() -> None:
    with pytest.raises(ConfigError, match=r"data.validation_fraction above 0 or train.eval_interval=0"):
        next(batches(cut(counting_corpus(50), 8, 0.0), config(fraction=0.0), split="validation"))


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("none.txt", None, ["does not exist"]),
        ("empty.txt", b"", ["is empty"]),
        ("blank.txt", b" \n\t\n" * 50, ["nothing but white space"]),
        ("nul.txt", b"ab\ncd\n\0\n", ["not text", "NUL byte in line 3"]),
        ("latin.txt", b"ab\ncaf\xe9 \n", ["not text", "no UTF-8 in line 2"]),
        ("cut.txt", b"ab\ncaf\xc3", ["not text", "half a character", "line 2"]),
        ("short.txt", b"abc", ["3 tokens", "model.seq_length 8 take 17", "lower model.seq_length"]),
        ("empty.jsonl", b"", ["is empty"]),
        ("blank.jsonl", b"\n\n", ["holds no document"]),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', ["line 2: not JSON"]),
        ("untexted.jsonl", b'{"text": "a"}\n\n{"body": "a"}\n', ["line 3", "keys body", '"text"']),
        ("number.jsonl", b'{"text": 5}\n', ["line 1", '"text"']),
        ("list.jsonl", b"[1]\n", ["line 1: no object"]),
        ("binary.jsonl", b"\x80\x81\n", ["not text", "line 1"]),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes | None, parts: list[str]) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        open_dataset(config(file))
    for part in [name, *parts]:
        assert part in str(caught.value)


def test_directory_as_data(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a directory"):
        open_dataset(config(tmp_path))


def test_bad_bytes_are_found_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "_BLOCK_BYTES", 4)
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text("aaa\u00fc\n\u20ac\n" * 20, encoding="utf-8")  # characters that lie across blocks
    bad.write_bytes(b"abc\n" * 5 + b"\xc3(")
    corpus_module.check_text_file(good)
    with pytest.raises(ConfigError, match="line 6"):
        corpus_module.check_text_file(bad)


def test_quick_check_finds_the_usual_mistakes(tmp_path: Path) -> None:
    check_data(config())
    good, bad = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    good.write_text(json.dumps({"text": "a"}))
    bad.write_text("{}")
    check_data(config(good))
    for file in (bad, tmp_path / "gone.txt"):
        with pytest.raises(ConfigError):
            check_data(config(file))


def test_transformers_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_transformers(name: str, *args: object, **kwargs: object) -> object:
        if name == "transformers":
            raise ImportError(name)
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without_transformers)
    with pytest.raises(ConfigError, match=r"needs the package transformers.*pip install.*data.tokenizer=bytes"):
        open_tokenizer("gpt2")


def test_hugging_face_tokenizer_from_a_directory(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eod>": 0, "a": 1, "b": 2, "?": 3}, unk_token="?"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eod>").save_pretrained(tmp_path)
    tokenizer = open_tokenizer(str(tmp_path))
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.encode("a b b").tolist()) == (4, 0, [1, 2, 2])
    with pytest.raises(ConfigError, match="not a directory or name of a Hugging Face tokenizer"):
        open_tokenizer(str(tmp_path / "nothing"))
