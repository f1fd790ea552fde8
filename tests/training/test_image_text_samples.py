"""The users' format, line by line, and the charts that are drawn in it."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as Pillow

from ldt_schedules.errors import ConfigError
from ldt_schedules.training.chat.samples import Image, Message, Video, read_samples
from ldt_schedules.training.image_text import charts

ANSWER = {"role": "assistant", "content": "March"}


def write(folder: Path, *lines: Any) -> Path:
    """A file of samples; anything but bytes is written as JSON. Beside it lies a picture, `a.png`."""
    Pillow.new("RGB", (30, 20), "red").save(folder / "a.png")
    file = folder / "data.jsonl"
    file.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return file


def asked(*parts: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}, ANSWER], **more}


def test_a_sample_keeps_the_order_of_its_parts(tmp_path: Path) -> None:
    image = {"type": "image", "image": "a.png"}
    video = {"type": "video", "video": ["a.png", "a.png"], "fps": 4}
    first = {"messages": [{"role": "system", "content": "Be short."}, *asked(image, video)["messages"]]}
    second = asked({"type": "text", "text": "grün "}, {"type": "video", "video": ["a.png"]}, image, id=3)
    one, two = read_samples(write(tmp_path, first, b"  ", second))
    path = tmp_path / "a.png"
    assert one.vision == (Image(path), Video((path, path), 4.0))
    assert [message.role for message in one.messages] == ["system", "user", "assistant"]
    assert two.messages == (
        Message("user", ("grün ", Video((path,), 2.0), Image(path))),
        Message("assistant", ("March",)),
    )
    assert (one.line, two.line) == (1, 3)


IMAGE = {"type": "image", "image": "a.png"}
WRONG: dict[str, tuple[Any, str]] = {
    "json": (b"{", "not JSON"),
    "utf8": (b"\xff", "not UTF-8"),
    "no object": ([1], "the line is a list; an object with messages"),
    "another text": (asked("", tools=[1]), "the line has the key 'tools'; conversations with it are not served"),
    "no messages": ({}, "the line has no key 'messages'"),
    "null messages": ({"messages": None}, "messages is null"),
    "empty messages": ({"messages": []}, "messages is an empty list"),
    "message": ({"messages": ["hi"]}, "messages[0] is a string; an object with role, content is needed"),
    "message's key": (
        {"messages": [{**ANSWER, "name": "x"}]},
        "messages[0] has the key 'name'; allowed are role, content",
    ),
    "role": ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role is 'tool'; allowed are system, user,"),
    "content": ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content is a number"),
    "empty content": ({"messages": [{"role": "user", "content": []}]}, "messages[0].content is an empty list"),
    "part": (asked("x"), "messages[0].content[0] is a string; an object with the type text, image or video"),
    "type": (asked({"type": "audio"}), "messages[0].content[0].type is 'audio'"),
    "part's key": (
        asked({**IMAGE, "detail": 1}),
        "messages[0].content[0] has the key 'detail'; allowed are type, image",
    ),
    "text": (asked({"type": "text", "text": None}), "messages[0].content[0].text is null"),
    "surrogate": (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "half a surrogate pair"),
    "missing file": (asked({"type": "image", "image": "b.png"}), "messages[0].content[0].image is 'b.png', and"),
    "file's name": (asked({"type": "image", "image": 3}), "messages[0].content[0].image is 3; a picture's path"),
    "a folder": (asked({"type": "image", "image": "."}), "is no file"),
    "video": (asked({"type": "video", "video": "a.mp4"}), "messages[0].content[0].video is a string; a list with"),
    "no frames": (asked({"type": "video", "video": []}), "messages[0].content[0].video is an empty list"),
    "missing frame": (
        asked({"type": "video", "video": ["a.png", "c.png"]}),
        "messages[0].content[0].video[1] is 'c.png'",
    ),
    "fps": (asked({"type": "video", "video": ["a.png"], "fps": 0}), "messages[0].content[0].fps is 0; a number"),
    "fps true": (asked({"type": "video", "video": ["a.png"], "fps": True}), "fps is True"),
    "fps NaN": (asked({"type": "video", "video": ["a.png"], "fps": float("nan")}), "fps is nan"),
    "video's key": (
        asked({"type": "video", "video": ["a.png"], "size": 1}),
        "allowed are type, video, fps (may be left",
    ),
    "image of the assistant": (
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": [IMAGE]}]},
        "messages[1], of the assistant, has an image; only the user's",
    ),
    "no assistant": ({"messages": [{"role": "user", "content": "x"}]}, "no message of the assistant"),
    "assistant first": ({"messages": [ANSWER]}, "the assistant has the first message"),
    "late system": ({"messages": [*asked(IMAGE)["messages"], {"role": "system", "content": "x"}]}, "is not the first"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_line_is_named(name: str, tmp_path: Path) -> None:
    line, message = WRONG[name]
    with pytest.raises(ConfigError) as caught:
        read_samples(write(tmp_path, asked(IMAGE), line))
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"data.path {tmp_path / 'data.jsonl'}, line 2: ")


def test_a_file_that_cannot_hold_samples(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not exist"):
        read_samples(tmp_path / "none.jsonl")
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(ConfigError, match=r"need a \.jsonl file"):
        read_samples(tmp_path / "a.txt")
    with pytest.raises(ConfigError, match=r"holds no sample"):
        read_samples(write(tmp_path, b"\n\n"))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return charts.write_charts(tmp_path_factory.mktemp("charts"), 24, seed=5)


def test_charts_are_of_all_kinds(drawn: Path) -> None:
    samples = read_samples(drawn)
    assert len(samples) == 24
    kinds = [tuple(type(part).__name__ for part in sample.vision) for sample in samples]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        (): 4,
        ("Image",): 14,
        ("Image", "Image"): 2,
        ("Image", "Image", "Image"): 2,
        ("Video",): 2,
    }
    assert {len(sample.messages) for sample in samples} == {2, 4}
    sizes = {Pillow.open(part.path).size for sample in samples for part in sample.vision if isinstance(part, Image)}
    assert len(sizes) >= 6
    assert all(wide * high <= 50_176 for wide, high in sizes)


def test_charts_are_the_same_every_time(drawn: Path, tmp_path: Path) -> None:
    """Sample n does not depend on how many are drawn, or on what the user's matplotlibrc says."""
    import matplotlib

    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red"}):
        again = charts.write_charts(tmp_path, 5, seed=5)
    assert again.read_text().splitlines() == drawn.read_text().splitlines()[:5]
    pictures = sorted(tmp_path.glob("*.png"))
    assert len(pictures) == 5
    assert all(picture.read_bytes() == (drawn.parent / picture.name).read_bytes() for picture in pictures)
    other = charts.write_charts(tmp_path / "other", 5, seed=6)
    assert other.read_text() != again.read_text()


def test_a_charts_answer_is_what_the_picture_shows(drawn: Path) -> None:
    """The colour that an answer names is in the picture, and that of no other bar or slice is asked for."""
    checked = 0
    for sample in read_samples(drawn):
        for question, answer in zip(sample.messages[::2], sample.messages[1::2], strict=True):
            if not str(question.parts[-1]).startswith("What colour"):
                continue
            wanted = tuple(struct.unpack("3B", bytes.fromhex(charts.COLOURS[str(answer.parts[0])][1:])))
            picture = sample.vision[0]
            assert isinstance(picture, Image)
            pixels = Pillow.open(picture.path).convert("RGB")
            assert sum(count for count, colour in pixels.getcolors(1 << 16) or [] if colour == wanted) > 30
            checked += 1
    assert checked >= 2


def test_default_charts_are_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "DEFAULT_COUNT", 2)
    file = charts.default_charts(tmp_path)
    assert file == tmp_path / "charts-2-0" / "samples.jsonl"
    assert [path.name for path in tmp_path.iterdir()] == ["charts-2-0"]
    monkeypatch.setattr(charts, "write_charts", None)
    assert charts.default_charts(tmp_path) == file


def test_another_process_may_be_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "DEFAULT_COUNT", 1)
    draw = charts.write_charts

    def overtaken(folder: Path, *which: int) -> Path:
        draw(tmp_path / "charts-1-0", *which)
        return draw(folder, *which)

    monkeypatch.setattr(charts, "write_charts", overtaken)
    assert len(read_samples(charts.default_charts(tmp_path))) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["charts-1-0"]


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"needs matplotlib .*\[plot\].*set data\.path"):
        charts.write_charts(tmp_path, 1)
