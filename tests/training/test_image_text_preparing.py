"""Pictures to patches and conversations to ids, against transformers' own image processor and tokenizers."""

from __future__ import annotations

import builtins
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from ldt_schedules.errors import ConfigError
from ldt_schedules.training.chat.huggingface import HuggingFaceChat
from ldt_schedules.training.chat.samples import Image, Message, Sample, Video, read_samples
from ldt_schedules.training.chat.writing import ByteChat, open_chat
from ldt_schedules.training.image_text import pixels as pixels_module
from ldt_schedules.training.image_text.pixels import PictureError, Pixels
from ldt_schedules.training.image_text.preparing import BadSample, Prepared, Preparing
from tests.training.chat_tokenizers import QWEN_LIKE, TEXT_ONLY, VISION_TOKENS, save_tokenizer


def picture(file: Path, width: int, height: int, mode: str = "RGB") -> Path:
    noise = np.random.RandomState(width * 1000 + height).randint(0, 256, (height, width, 3), dtype=np.uint8)
    Pillow.fromarray(noise).convert(mode).save(file)
    return file


@pytest.fixture(scope="module")
def qwen_like(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tokenizer(tmp_path_factory.mktemp("qwen"), QWEN_LIKE, VISION_TOKENS)


def conversation(folder: Path) -> Sample:
    """Two turns, two images of different sizes and a video of three frames."""
    images = [Image(picture(folder / f"{side}.png", side, 60)) for side in (60, 100)]
    frames = tuple(picture(folder / f"f{number}.png", 56, 84) for number in range(3))
    messages = (
        Message("user", (images[0], "and", images[1], "Which bar is the tallest?")),
        Message("assistant", ("March",)),
        Message("user", ("Now ", Video(frames, 4.0))),
        Message("assistant", ("Grün!",)),
    )
    return Sample(messages, folder / "data.jsonl", 7)


# Pixels ---------------------------------------------------------------------------------------------------------------

SIZES = [(28, 28), (14, 14), (29, 57), (100, 60), (200, 130), (640, 480), (700, 33), (3, 200), (1, 1)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("shape", [(14, 2, 2), (4, 2, 2), (7, 1, 3), (14, 3, 1)], ids=str)
def test_patches_are_the_processors_own(size: tuple[int, int], shape: tuple[int, int, int], tmp_path: Path) -> None:
    patch, temporal, merge = shape
    ours = Pixels(patch, temporal, merge, min_pixels=4 * (patch * merge) ** 2, max_pixels=40 * (patch * merge) ** 2)
    file = picture(tmp_path / "a.png", *size)
    processor = pixels_module._reference().processor(
        patch_size=patch,
        temporal_patch_size=temporal,
        merge_size=merge,
        size={"shortest_edge": ours.min_pixels, "longest_edge": ours.max_pixels},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made, grid = ours.patches(Image(file))
    wanted = processor(images=[Pillow.open(file)], return_tensors="np")
    assert np.array_equal(made, wanted["pixel_values"])
    assert [list(grid)] == wanted["image_grid_thw"].tolist()
    assert ours.grid(Image(file)) == grid
    assert made.shape == (grid[0] * grid[1] * grid[2], ours.width)
    assert made.dtype == np.float32
    assert 4 <= ours.tokens(grid) <= 40 or max(size) / min(size) > 60


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_other_kinds_of_pictures_become_coloured(mode: str, tmp_path: Path) -> None:
    file = picture(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"), 56, 56, mode)
    Pillow.open(file).convert("RGB").save(tmp_path / "rgb.png")
    made, _ = Pixels().patches(Image(file))
    assert np.array_equal(made, Pixels().patches(Image(tmp_path / "rgb.png"))[0])


@pytest.mark.parametrize("temporal", [1, 2, 3])
@pytest.mark.parametrize("count", range(1, 8))
def test_a_videos_layers_are_its_frames(count: int, temporal: int, tmp_path: Path) -> None:
    """Layer k of the patches at time t is frame t * T + k; the last is repeated. Undoing the patches gives the frames."""
    ours = Pixels(patch=4, temporal_patch=temporal, merge=2, min_pixels=64, max_pixels=64 * 40)
    sides = 24, 16
    files = tuple(picture(tmp_path / f"{number}.png", *sides) for number in range(count))
    for number, file in enumerate(files):  # different frames, of one size
        Pillow.fromarray(np.random.RandomState(number).randint(0, 256, (16, 24, 3), dtype=np.uint8)).save(file)
    made, grid = ours.patches(Video(files))
    assert grid == ours.grid(Video(files)) == (-(-count // temporal), 4, 6)
    # [t, h / 2, w / 2, 2, 2, C, T, P, P] -> [t, T, C, H, W]
    layers = made.reshape(grid[0], 2, 3, 2, 2, 3, temporal, 4, 4).transpose(0, 6, 5, 1, 3, 7, 2, 4, 8)
    frames = layers.reshape(-1, 3, 16, 24)
    mean, std = (np.array(values).reshape(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    for number, frame in enumerate(frames):
        image = np.asarray(Pillow.open(files[min(number, count - 1)])).transpose(2, 0, 1)
        assert np.abs(frame - (image / 255 - mean) / std).max() < 1e-5
    assert len(frames) == grid[0] * temporal


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def test_a_video_of_one_repeated_frame_is_an_image(tmp_path: Path) -> None:
    file = picture(tmp_path / "a.png", 100, 70)
    image, grid = Pixels().patches(Image(file))
    for count in (1, 2):
        made, video_grid = Pixels().patches(Video((file,) * count))
        assert np.array_equal(made, image)
        assert video_grid == grid


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_video_equals_the_reference_processors(count: int, tmp_path: Path) -> None:
    """Where torchvision is installed, which that one needs. Frames need no resizing, which the two do differently."""
    pytest.importorskip("torchvision", exc_type=ImportError)
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    files = tuple(picture(tmp_path / f"{number}.png", 112, 84) for number in range(count))
    processor = Qwen2VLVideoProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 40})
    frames = np.stack([np.asarray(Pillow.open(file)) for file in files])
    wanted = processor(videos=[frames], return_tensors="pt", cap_pixels_per_frame=False)
    made, grid = Pixels(min_pixels=28 * 28, max_pixels=28 * 28 * 40).patches(Video(files))
    assert wanted["video_grid_thw"].tolist() == [list(grid)]
    assert np.abs(made - wanted["pixel_values_videos"].numpy()).max() < 1e-5


def test_seconds_between_the_rows_of_a_grid(tmp_path: Path) -> None:
    assert Pixels().seconds(Video((tmp_path,), 4.0)) == 0.5
    assert Pixels(temporal_patch=3).seconds(Video((tmp_path,), 1.5)) == 2.0


def test_pictures_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(PictureError, match=r"text\.png is no picture"):
        Pixels().grid(Image(tmp_path / "text.png"))
    with pytest.raises(PictureError, match=r"is 1 x 300 pixels: "):
        Pixels().grid(Image(picture(tmp_path / "thin.png", 1, 300)))
    whole = picture(tmp_path / "whole.png", 90, 90).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    Pixels().grid(Image(tmp_path / "cut.png"))
    with pytest.raises(PictureError, match=r"cut\.png cannot be decoded"):
        Pixels().patches(Image(tmp_path / "cut.png"))
    other = picture(tmp_path / "other.png", 90, 80)
    with pytest.raises(PictureError, match=r"one size.*90 x 90 and .*other\.png is 90 x 80"):
        Pixels().grid(Video((tmp_path / "whole.png", tmp_path / "whole.png", other)))


@pytest.mark.parametrize("bounds", [(0, 9999), (9999, 5000), (1, 783)])
def test_bounds_that_admit_no_picture(bounds: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=r"vision\.min_pixels .* 784 <= max_pixels"):
        Pixels(min_pixels=bounds[0], max_pixels=bounds[1])


@pytest.mark.parametrize(("package", "said"), [("PIL", "pillow"), ("transformers", "transformers")])
def test_a_missing_package_is_named(package: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == package:
            raise ImportError(f"no {package}")
        return real_import(name, *args, **kwargs)

    file = picture(tmp_path / "a.png", 40, 40)
    pixels_module._reference.cache_clear()
    pixels_module._size.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    try:
        with pytest.raises(ConfigError, match=rf"{said}.*pip install 'ldt-schedules\[hf\]'"):
            Pixels().grid(Image(file))
    finally:
        pixels_module._reference.cache_clear()


# Conversations --------------------------------------------------------------------------------------------------------


def test_bytes_are_written_in_our_layout() -> None:
    chat = open_chat("bytes")
    assert isinstance(chat, ByteChat)
    image = Image(Path("a.png"))
    messages = (Message("user", (image, "Ü?")), Message("assistant", ("no",)))
    written = chat.write(messages, [3])
    start, end = chat.turn_start, chat.turn_end
    v = chat.vision
    question = [start, *b"user\n", v.start, v.image, v.image, v.image, v.end, *"Ü?".encode(), end, 10]
    assert written.ids.tolist() == [*question, start, *b"assistant\n", *b"no", end, 10]
    assert written.learned.tolist() == [False] * (len(question) + 11) + [True] * 3 + [False]
    assert sorted([v.image, v.video, v.start, v.end, start, end]) == list(range(257, 263))
    assert (chat.vocab_size, chat.pad) == (263, 256)


def test_given_ids_of_bytes() -> None:
    chat = ByteChat.with_ids(259, None)
    ids = [chat.vision.video, chat.vision.start, chat.vision.end, chat.turn_start, chat.turn_end]
    assert ids == [257, 258, 260, 261, 262]
    assert ByteChat.with_ids(400, 300).vocab_size == 401
    for image, video in ((5, None), (300, 300)):
        with pytest.raises(ConfigError, match=r"two different ids from 257 on"):
            ByteChat.with_ids(image, video)


def reference_ids(tokenizer: str, sample: Sample, counts: list[int]) -> list[int]:
    """As the reference's processor does it: parts through the template, placeholders multiplied in the text."""
    from transformers import AutoTokenizer

    inner = AutoTokenizer.from_pretrained(tokenizer)
    kinds = {Image: {"type": "image"}, Video: {"type": "video"}}
    messages = [
        {"role": m.role, "content": [kinds.get(type(part)) or {"type": "text", "text": part} for part in m.parts]}
        for m in sample.messages
    ]
    text = inner.apply_chat_template(messages, tokenize=False)
    pieces, remaining = [], iter(counts)
    for piece in text.replace("<|video_pad|>", "<|image_pad|>V").split("<|image_pad|>"):
        if pieces:
            token = "<|video_pad|>" if piece.startswith("V") else "<|image_pad|>"
            pieces.append(token * next(remaining) + piece.removeprefix("V"))
        else:
            pieces.append(piece)
    return list(inner("".join(pieces), add_special_tokens=False)["input_ids"])


def test_a_hugging_face_template_is_followed(qwen_like: str, tmp_path: Path) -> None:
    sample, pixels = conversation(tmp_path), Pixels()
    chat = open_chat(qwen_like)
    counts = [pixels.tokens(pixels.grid(part)) for part in sample.vision]
    written = chat.write(sample.messages, counts)
    assert written.ids.tolist() == reference_ids(qwen_like, sample, counts)
    assert isinstance(chat, HuggingFaceChat)
    inner = chat.inner
    assert inner.decode(written.ids[written.learned]) == "March<|im_end|>Grün!<|im_end|>"
    assert chat.vision.image == inner.convert_tokens_to_ids("<|image_pad|>")
    assert (chat.vocab_size, chat.pad) == (len(inner), inner.eos_token_id)


def test_a_template_for_text_alone_gets_images(tmp_path: Path) -> None:
    """Ids that the tokenizer lacks are put behind its own."""
    name = save_tokenizer(tmp_path / "tok", TEXT_ONLY, [])
    chat = open_chat(name)
    assert isinstance(chat, HuggingFaceChat)
    sample = conversation(tmp_path)
    written = chat.write(sample.messages, [2, 3, 4])
    text = chat.inner.decode(written.ids)
    image, video = "<|image_pad|>", "<|video_pad|>"
    assert text == (
        f"<s>[user] <|vision_start|>{image * 2}<|vision_end|>and<|vision_start|>{image * 3}<|vision_end|>"
        "Which bar is the tallest?<|endoftext|>[assistant] March<|endoftext|>"
        f"[user] Now <|vision_start|>{video * 4}<|vision_end|><|endoftext|>[assistant] Grün!<|endoftext|>"
    )
    assert chat.inner.decode(written.ids[written.learned]) == " March<|endoftext|> Grün!<|endoftext|>"
    own = chat.vocab_size - 4
    assert sorted([chat.vision.image, chat.vision.video, chat.vision.start, chat.vision.end]) == list(
        range(own, own + 4)
    )


def test_without_a_template_the_layout_is_ours(tmp_path: Path) -> None:
    chat = open_chat(save_tokenizer(tmp_path / "tok", None, []))
    assert isinstance(chat, HuggingFaceChat)
    sample = conversation(tmp_path)
    written = chat.write(sample.messages, [1, 1, 1])
    by_bytes = open_chat("bytes").write(sample.messages, [1, 1, 1])
    text = chat.inner.decode(written.ids)
    assert text.startswith("<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>and<|vision_start|>")
    assert chat.inner.decode(written.ids[written.learned]) == "March<|im_end|>Grün!<|im_end|>"
    assert int(by_bytes.learned.sum()) == len("MarchGrün!".encode()) + 2
    assert int(written.ids.max()) < chat.vocab_size


def test_given_ids_of_a_hugging_face_tokenizer(qwen_like: str) -> None:
    usual = open_chat(qwen_like)
    swapped = open_chat(qwen_like, image_token=usual.vision.video, video_token=usual.vision.image)
    assert (swapped.vision.image, swapped.vision.video) == (usual.vision.video, usual.vision.image)
    with pytest.raises(ConfigError, match=r"vision\.image_token 99999 is no id of data\.tokenizer"):
        open_chat(qwen_like, image_token=99999)


FORGETFUL = "{% for m in messages %}{% if loop.last %}{{ m['role'] }}: {% endif %}{{ m['content'] }}\n{% endfor %}"
BLIND = "{% for m in messages %}{{ m['role'] }}: {{ m['content'].split('>')[-1] }}\n{% endfor %}"
STRICT = "{{ raise_exception('no conversations today') }}"


@pytest.mark.parametrize(
    ("template", "message"),
    [(FORGETFUL, "writes a conversation otherwise"), (BLIND, "wrote 0 images"), (STRICT, "no conversations today")],
    ids=["forgetful", "blind", "strict"],
)
def test_templates_that_cannot_be_followed(template: str, message: str, tmp_path: Path) -> None:
    chat = open_chat(save_tokenizer(tmp_path / "tok", template, VISION_TOKENS))
    with pytest.raises(BadSample, match=message) as caught:
        Preparing(chat, Pixels(), 500).prepare(conversation(tmp_path))
    assert f"{tmp_path / 'data.jsonl'}, line 7: " in str(caught.value)


def test_a_text_with_a_special_token_is_refused(qwen_like: str, tmp_path: Path) -> None:
    for token in ("<|image_pad|>", "<|im_end|>"):
        sample = Sample((Message("user", (f"a {token}",)), Message("assistant", ("b",))), tmp_path / "d.jsonl", 3)
        with pytest.raises(BadSample, match=r"line 3: a text contains <\|im.*, a special token"):
            Preparing(open_chat(qwen_like), Pixels(), 100).measure(sample)
        assert Preparing(open_chat("bytes"), Pixels(), 100).measure(sample).patches == 0


# Samples --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["bytes", "hf"])
def test_placeholders_equal_features(tokenizer: str, qwen_like: str, tmp_path: Path) -> None:
    chat, pixels = open_chat("bytes" if tokenizer == "bytes" else qwen_like), Pixels()
    sample = conversation(tmp_path)
    preparing = Preparing(chat, pixels, 400)
    made = preparing.prepare(sample)
    assert isinstance(made, Prepared)
    assert made.grids.tolist() == [[1, 4, 4], [1, 4, 8], [2, 6, 4]]
    assert made.pixel_values.shape == (16 + 32 + 48, pixels.width)
    assert made.seconds_per_grid == (0.5,)
    is_image, is_video = made.ids == chat.vision.image, made.ids == chat.vision.video
    assert (int(is_image.sum()), int(is_video.sum())) == (4 + 8, 12)
    for start in np.flatnonzero(made.ids == chat.vision.start):
        assert (is_image | is_video)[start + 1]
    assert preparing.measure(sample).patches == len(made.pixel_values)
    assert np.array_equal(made.pixel_values[:16], pixels.patches(sample.vision[0])[0])
    assert not (made.learned & (is_image | is_video)).any()


def test_no_picture_no_patches(tmp_path: Path) -> None:
    sample = Sample((Message("user", ("2 + 2?",)), Message("assistant", ("4",))), tmp_path, 1)
    made = Preparing(open_chat("bytes"), Pixels(), 100).prepare(sample)
    assert (made.pixel_values.shape, made.grids.shape, made.seconds_per_grid) == ((0, 1176), (0, 3), ())
    assert (made.pixel_values.dtype, made.grids.dtype) == (np.float32, np.int64)


def test_a_sample_that_does_not_fit_says_what_takes_the_room(tmp_path: Path) -> None:
    chat, sample = open_chat("bytes"), conversation(tmp_path)
    length = len(Preparing(chat, Pixels(), 400).prepare(sample).ids)
    Preparing(chat, Pixels(), length).prepare(sample)
    with pytest.raises(BadSample) as caught:
        Preparing(chat, Pixels(), length - 1).prepare(sample)
    assert str(caught.value) == (
        f"data.path {tmp_path / 'data.jsonl'}, line 7 has 2 images and 1 video of 24 tokens and a text of {length - 24}, but "
        f"model.seq_length is {length - 1}; lower vision.max_pixels (now 1003520; 784 pixels make a token) or raise "
        "model.seq_length"
    )
    with pytest.raises(BadSample, match=r"has 2 images and 1 video of 24 tokens, but model\.seq_length is 23; lower"):
        Preparing(chat, Pixels(), 23).measure(sample)
    text = Sample((Message("user", ("x" * 99,)), Message("assistant", ("y",))), tmp_path, 2)
    with pytest.raises(BadSample, match=r"line 2 has a text of 121 tokens, but model\.seq_length is 50; shorten it or"):
        Preparing(chat, Pixels(), 50).measure(text)


def test_grids_that_disagree_with_the_text_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a processor makes is believed only where the text has a place for it."""
    sample = conversation(tmp_path)
    preparing = Preparing(open_chat("bytes"), Pixels(), 400)
    real = Pixels.patches
    monkeypatch.setattr(Pixels, "patches", lambda self, part: (real(self, part)[0], (1, 2, 2)))
    with pytest.raises(BadSample, match=r"line 7: the images' grids .* have 12 patches, but 96 were made"):
        preparing.prepare(sample)
    monkeypatch.setattr(Pixels, "patches", lambda self, part: (np.zeros((4, 1176), np.float32), (1, 2, 2)))
    with pytest.raises(BadSample, match=r"line 7: the text has 24 image and video tokens, but .* need \[1, 1, 1\], 3 "):
        preparing.prepare(sample)


def test_an_empty_answer_cannot_be_learned(tmp_path: Path) -> None:
    name = save_tokenizer(tmp_path / "tok", "{% for m in messages %}{{ m['content'] }}{% endfor %}", [])
    sample = Sample((Message("user", ("a",)), Message("assistant", ("",))), tmp_path, 1)
    with pytest.raises(BadSample, match=r"the assistant's messages are empty"):
        Preparing(open_chat(name), Pixels(), 10).prepare(sample)


def test_a_file_of_samples_is_prepared(qwen_like: str, tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 70, 70)
    user = [
        {"type": "video", "video": ["a.png"] * 3},
        {"type": "image", "image": "a.png"},
        {"type": "text", "text": "?"},
    ]
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": "!"}]
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": messages}))
    made = Preparing(open_chat(qwen_like), Pixels(), 200).prepare(read_samples(tmp_path / "d.jsonl")[0])
    assert made.grids.tolist() == [[2, 4, 4], [1, 4, 4]]
    assert made.seconds_per_grid == (1.0,)
