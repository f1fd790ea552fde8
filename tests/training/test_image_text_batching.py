"""Which sample comes when, on which replica, and what a microbatch of conversations looks like."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron.vision_language.mrope import mrope_positions
from ldt_schedules.training.chat.samples import Image, Message, Part, Sample, Video
from ldt_schedules.training.chat.writing import open_chat
from ldt_schedules.training.image_text.batching import (
    Dealing,
    ImageTextDataset,
    PaddingSide,
    batches,
    collate,
    is_padding,
    open_image_text,
    token_counts,
)
from ldt_schedules.training.image_text.dealing import cost, given_order
from ldt_schedules.training.image_text.pixels import Pixels
from ldt_schedules.training.image_text.preparing import BadSample, Preparing

SEQ = 80
COUNT = 30
PIXELS = Pixels(patch=4, temporal_patch=2, merge=2, min_pixels=64, max_pixels=64 * 16)


CHAT = open_chat("bytes")


def positions(ids: torch.Tensor, grids: torch.Tensor, segments: torch.Tensor, seconds: list[float]) -> torch.Tensor:
    return mrope_positions(
        ids,
        grids,
        segments,
        is_padding(segments),
        image_token=CHAT.vision.image,
        video_token=CHAT.vision.video,
        merge_size=PIXELS.merge,
        seconds_per_grid=seconds,
    )


def chat_of(number: int, *pictures: Path) -> tuple[Message, ...]:
    """A conversation that says which sample it is, with its pictures before the text."""
    parts: tuple[Part, ...] = (*(Image(file) for file in pictures), f"s{number:02d}")
    return Message("user", parts), Message("assistant", ("x" * (number % 5 + 1),))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    files = [folder / f"{side}.png" for side in (1, 2, 3, 4)]
    for side, file in enumerate(files, 1):
        noise = np.random.RandomState(side).randint(0, 256, (8 * side, 8 * side, 3), dtype=np.uint8)
        Pillow.fromarray(noise).save(file)
    return files


def dataset(pictures: list[Path], *, count: int = COUNT, validation: int = 6, **more: Any) -> ImageTextDataset:
    """Sample n has a picture of side n mod 5 tokens; none for 0."""
    samples = tuple(
        Sample(chat_of(n, *(pictures[n % 5 - 1 : n % 5] if n % 5 else ())), Path("d.jsonl"), n + 1)
        for n in range(count)
    )
    return ImageTextDataset(samples, validation, Preparing(CHAT, PIXELS, SEQ), **more)


def numbers(batch: dict[str, torch.Tensor]) -> list[int]:
    """Which samples are in a microbatch, from what they say."""
    rows = (bytes(value for value in row if value < 256) for row in batch["input_ids"].tolist())
    return [int(row.removeprefix(b"user\ns")[:2]) for row in rows]


def take(data: ImageTextDataset, count: int, dealing: Dealing, **more: Any) -> list[list[int]]:
    stream = batches(data, dealing, positions, **{"seed": 3, **more})
    return [numbers(batch) for batch in itertools.islice(stream, count)]


def flat(groups: list[list[int]]) -> list[int]:
    return [number for group in groups for number in group]


def test_an_epoch_sees_every_sample_once(pictures: list[Path]) -> None:
    data = dataset(pictures)
    epochs = [flat(take(data, 12, Dealing(2), consumed_samples=24 * epoch)) for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(24))
    assert epochs[0] != epochs[1]
    assert sorted(flat(take(data, 3, Dealing(2), split="validation"))) == list(range(24, 30))


def test_the_order_is_that_of_text(pictures: list[Path]) -> None:
    """The same positions and seed give the same samples as `training/data.py`; a change would spoil resumed runs."""
    from ldt_schedules.training.data import sample_index

    assert flat(take(dataset(pictures), 10, Dealing(3), seed=9)) == [sample_index(i, 24, 9) for i in range(30)]


@pytest.mark.parametrize("balance", [False, True])
def test_layouts_and_resumption_see_the_same_global_batches(pictures: list[Path], balance: bool) -> None:
    data, size = dataset(pictures), 12
    alone = flat(take(data, 6, Dealing(6, 1, 2)))
    for micro, replicas, microbatches in itertools.product((1, 2, 3, 6), (1, 2, 3), (1, 2, 4)):
        if micro * replicas * microbatches != size:
            continue
        dealing = Dealing(micro, replicas, microbatches, encoder_dp_balance=balance)
        streams = [take(data, 3 * microbatches, dealing, data_rank=rank) for rank in range(replicas)]
        for step in range(3):
            part = slice(step * microbatches, (step + 1) * microbatches)
            seen = flat([group for stream in streams for group in stream[part]])
            assert sorted(seen) == sorted(alone[step * size : (step + 1) * size])
        resumed = take(data, microbatches, dealing, data_rank=replicas - 1, consumed_samples=size)
        assert resumed == streams[-1][microbatches : 2 * microbatches]


def test_balanced_replicas_have_less_to_do(pictures: list[Path]) -> None:
    data, dealing = dataset(pictures), Dealing(2, 3, 2, encoder_dp_balance=True)
    streams = [
        list(itertools.islice(batches(data, dealing, positions, seed=3, data_rank=rank), 8)) for rank in range(3)
    ]
    measured = [len(batch["pixel_values"]) for stream in streams for batch in stream]
    dealt = sum(max(len(stream[m]["pixel_values"]) for stream in streams) for m in range(8))
    order = flat(take(data, 8, Dealing(6)))
    loads = [data.preparing.measure(data.samples[number]).patches for number in order]
    assert sum(measured) == sum(loads)
    assert dealt < sum(cost(given_order(12, 3, 2), loads[start : start + 12]) for start in range(0, 48, 12))


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_microbatch(pictures: list[Path], side: PaddingSide) -> None:
    data = dataset(pictures)
    samples = [data.preparing.prepare(data.samples[n]) for n in (4, 0, 13)]
    batch = collate(samples, data.preparing, positions, padding_side=side)
    patches = 64 + 36
    assert {name: (tuple(value.shape), value.dtype) for name, value in batch.items()} == {
        "input_ids": ((3, SEQ), torch.int64),
        "labels": ((3, SEQ), torch.int64),
        "loss_mask": ((3, SEQ), torch.float32),
        "segments": ((3, SEQ), torch.int64),
        "position_ids": ((3, 3, SEQ), torch.int64),
        "pixel_values": ((patches, 96), torch.float32),
        "grids": ((2, 3), torch.int64),
    }
    assert batch["grids"].tolist() == [[1, 8, 8], [1, 6, 6]]
    assert np.array_equal(batch["pixel_values"][:64].numpy(), samples[0].pixel_values)
    for row, sample in enumerate(samples):
        length = len(sample.ids)
        real = slice(0, length) if side == "right" else slice(SEQ - length, SEQ)
        segments = batch["segments"][row]
        assert (segments[real] == 1).all()
        assert int((segments == 1).sum()) == length
        assert (segments.diff() >= 0).all()
        assert batch["input_ids"][row, real].tolist() == sample.ids.tolist()
        assert (batch["input_ids"][row][segments != 1] == data.preparing.chat.pad).all()
        assert batch["labels"][row, real].tolist() == [*sample.ids[1:], data.preparing.chat.pad]
        learned = batch["labels"][row][batch["loss_mask"][row] == 1]
        assert learned.tolist() == sample.ids[sample.learned].tolist()
        place = batch["position_ids"][:, row]
        assert (place[:, segments != 1] == 0).all()
        # Text counts on; an image of n x n tokens takes n of the count.
        side_in_tokens = (4, 0, 3)[row]
        last = length - 1 - side_in_tokens**2 + side_in_tokens
        assert place[:, real][:, [0, -1]].tolist() == [[0, last]] * 3


def test_a_videos_time_counts_in_its_seconds(pictures: list[Path]) -> None:
    """Two rows of a grid are 2 frames apart, at 1 frame a second 2 s, at 2 tokens a second 4 positions."""
    video, image = Video((pictures[0],) * 5, 1.0), Image(pictures[1])
    sample = Sample((Message("user", (image, video)), Message("assistant", ("x",))), Path("d.jsonl"), 1)
    preparing = Preparing(CHAT, PIXELS, SEQ)
    batch = collate([preparing.prepare(sample)], preparing, positions)
    assert batch["grids"].tolist() == [[1, 4, 4], [3, 2, 2]]
    times = batch["position_ids"][0][batch["input_ids"] == CHAT.vision.video]
    assert (times - times[0]).tolist() == [0, 4, 8]


def test_a_full_row_has_no_padding(pictures: list[Path]) -> None:
    data = dataset(pictures)
    sample = data.preparing.prepare(data.samples[3])
    full = Preparing(data.preparing.chat, PIXELS, len(sample.ids))
    left, right = collate([sample], full, positions, padding_side="left"), collate([sample], full, positions)
    assert (left["segments"] == 1).all()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert left["loss_mask"][0, -1] == 0


def test_a_microbatch_without_pictures(pictures: list[Path]) -> None:
    data = dataset(pictures)
    batch = collate([data.preparing.prepare(data.samples[n]) for n in (0, 5)], data.preparing, positions)
    assert (batch["pixel_values"].shape, batch["grids"].shape) == ((0, 96), (0, 3))


def test_token_counts(pictures: list[Path]) -> None:
    data = dataset(pictures)
    chosen = (4, 0, 13)
    samples = [data.preparing.prepare(data.samples[n]) for n in chosen]
    sides: tuple[PaddingSide, ...] = ("left", "right")
    for side in sides:
        batch = collate(samples, data.preparing, positions, padding_side=side)
        counts = token_counts(batch, data.preparing.chat.vision)
        assert counts.real.tolist() == [len(sample.ids) for sample in samples]
        assert counts.image.tolist() == [16, 0, 9]
        assert counts.learned.tolist() == [n % 5 + 2 for n in chosen]


def with_bad(pictures: list[Path], bad: set[int], folder: Path, **more: Any) -> ImageTextDataset:
    """As `dataset`, but some samples are too long, and the odd ones of them have a picture that cannot be decoded."""
    data = dataset(pictures, **more)
    whole = pictures[3].read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    samples = list(data.samples)
    for n in bad:
        messages = chat_of(n, folder / "cut.png") if n % 2 else (Message("user", ("y" * SEQ,)), samples[n].messages[1])
        samples[n] = Sample(messages, Path("d.jsonl"), n + 1)
    return ImageTextDataset(tuple(samples), data.num_validation, data.preparing, data.on_bad_sample)


def test_a_bad_sample_stops_the_run(pictures: list[Path], tmp_path: Path) -> None:
    with pytest.raises(BadSample, match=r"d\.jsonl, line 8: .*cut\.png cannot be decoded"):
        take(with_bad(pictures, {7}, tmp_path), 24, Dealing(1))
    with pytest.raises(BadSample, match=r"d\.jsonl, line 9 has a text of"):
        take(with_bad(pictures, {8}, tmp_path), 24, Dealing(1))


def test_a_skipped_sample_changes_no_other_position(pictures: list[Path], tmp_path: Path) -> None:
    good = flat(take(dataset(pictures), 48, Dealing(1)))
    bad = {7, 8, good[10], good[11]}
    data = with_bad(pictures, bad, tmp_path, on_bad_sample="skip")
    with pytest.warns(UserWarning, match=r"sample skipped \(\d so far\): data\.path d\.jsonl, line"):
        seen = flat(take(data, 48, Dealing(1)))
    assert set(data.skipped) == bad
    wanted = [next(n for n in itertools.chain(good[place:], good) if n not in bad) for place in range(48)]
    assert seen == wanted
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # each is told once
        assert flat(take(data, 48, Dealing(1))) == seen


def test_replicas_agree_about_bad_samples_that_they_have_not_seen(pictures: list[Path], tmp_path: Path) -> None:
    """A replica that has found a broken picture measures it as before: else it would deal otherwise than the others."""
    bad = {3, 8, 13, 14}
    dealing = Dealing(2, 2, 3, encoder_dp_balance=True)
    alone = with_bad(pictures, bad, tmp_path, on_bad_sample="skip")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = flat(take(alone, 8, Dealing(12)))
        streams = []
        for rank in range(2):
            data = with_bad(pictures, bad, tmp_path, on_bad_sample="skip")
            streams.append(take(data, 24, dealing, data_rank=rank))
    for step in range(8):
        seen = flat([group for stream in streams for group in stream[3 * step : 3 * step + 3]])
        assert sorted(seen) == sorted(wanted[12 * step : 12 * step + 12])


def test_nothing_but_bad_samples(pictures: list[Path], tmp_path: Path) -> None:
    data = with_bad(pictures, set(range(24)), tmp_path, on_bad_sample="skip")
    with (
        pytest.warns(UserWarning),
        pytest.raises(ConfigError, match=r"^24 train samples in a row cannot be used; the first"),
    ):
        take(data, 1, Dealing(1))


def test_opening(tmp_path: Path) -> None:
    line = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    file = tmp_path / "d.jsonl"
    preparing = Preparing(CHAT, PIXELS, SEQ)

    def opened(lines: int, fraction: float) -> ImageTextDataset:
        file.write_text(line * lines)
        return open_image_text(str(file), preparing, charts_folder=tmp_path, validation_fraction=fraction)

    data = opened(20, 0.1)
    assert (data.num_samples("train"), data.num_samples("validation")) == (18, 2)
    assert opened(1, 0.0).num_samples("train") == 1
    with pytest.raises(ConfigError, match=r"has 1 sample.*set data\.validation_fraction=0"):
        opened(1, 0.1)
    with pytest.raises(ConfigError, match=r"there is no validation data"):
        next(batches(opened(1, 0.0), Dealing(1), positions, seed=1, split="validation"))


def test_the_default_charts_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They need 192 tokens at most with bytes, at the default bounds of the pixels."""
    from ldt_schedules.training.image_text import charts

    monkeypatch.setattr(charts, "DEFAULT_COUNT", 24)
    preparing = Preparing(open_chat("bytes"), Pixels(min_pixels=3136, max_pixels=50_176), 192)
    data = open_image_text(None, preparing, charts_folder=tmp_path, validation_fraction=0.2)
    assert (data.num_samples("train"), data.num_samples("validation")) == (19, 5)
    for sample in data.samples:
        preparing.prepare(sample)
