"""The data of a run without a file: small drawn charts with questions and answers, made from a seed.

They are real pictures of different sizes, from none to three a sample, and some videos, written in the format that users
bring (`samples`), so that the folder is also its worked example. Sample n is a function of (seed, n) alone.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ldt_schedules.training.image_text.chart_drawing import COLOURS, Chart, draw

DEFAULT_COUNT = 72
DEFAULT_SEED = 0
SAMPLES_FILE = "samples.jsonl"

_TOPICS = (
    ("Rain", "mm", ("Jan", "Mar", "Jun", "Sep", "Dec")),
    ("Visitors", "", ("Mon", "Tue", "Thu", "Fri", "Sun")),
    ("Harvest", "tons", ("Apples", "Pears", "Plums", "Nuts", "Figs")),
    ("Sales", "", ("North", "East", "South", "West", "Centre")),
    ("Score", "", ("A", "B", "C", "D", "E")),
)
_ORDERED = _TOPICS[:2]
"""Those whose labels are times, so that a line between them means something."""
_WIDTHS, _HEIGHTS = (196, 210, 224, 252), (154, 168, 180, 196)
_SMALL = (168, 140)
"""Where a sample has several pictures, so that it is no longer than the others."""
_WHICH = ("the first", "the second", "the third")

Content = str | list[dict[str, Any]]


def write_charts(folder: str | Path, count: int = DEFAULT_COUNT, seed: int = DEFAULT_SEED) -> Path:
    """Write `count` samples: PNG files and `samples.jsonl`, whose path is returned.

    Raises:
        ConfigError: matplotlib is missing.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"messages": _sample(folder, index, seed)}) + "\n" for index in range(count)]
    file = folder / SAMPLES_FILE
    file.write_text("".join(lines), encoding="utf-8")
    return file


def default_charts(folder: str | Path) -> Path:
    """The default charts' `samples.jsonl` in `folder`, written if it is not there.

    Several processes may do so at the same time: each writes a folder of its own, and the first to finish gives it
    its name.
    """
    final = Path(folder) / f"charts-{DEFAULT_COUNT}-{DEFAULT_SEED}"
    if not (final / SAMPLES_FILE).is_file():
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=final.parent, prefix="drawing-") as own:
            drawn = write_charts(Path(own) / final.name, DEFAULT_COUNT, DEFAULT_SEED).parent
            try:
                drawn.rename(final)
            except OSError:
                if not (final / SAMPLES_FILE).is_file():  # half a folder, from elsewhere
                    shutil.copytree(drawn, final, dirs_exist_ok=True)
    return final / SAMPLES_FILE


@dataclass
class _Writer:
    """Draws the pictures of one sample and names them."""

    folder: Path
    index: int
    random: np.random.RandomState
    drawn: int = 0

    def picture(self, chart: Chart) -> str:
        name = f"{self.index:04d}-{self.drawn}.png"
        self.drawn += 1
        draw(chart, self.folder / name)
        return name

    def image(self, chart: Chart) -> dict[str, Any]:
        return {"type": "image", "image": self.picture(chart)}

    def pick(self, choices: Any) -> Any:
        return choices[self.random.randint(len(choices))]

    def some(self, choices: Any, count: int) -> tuple[Any, ...]:
        """`count` different ones, in the order in which they stand."""
        return tuple(choices[place] for place in sorted(self.random.permutation(len(choices))[:count].tolist()))

    def chart(self, kind: Any, *, small: bool = False) -> Chart:
        title, unit, labels = self.pick(_ORDERED if kind == "line" else _TOPICS)
        count = int(self.random.randint(3, 5 if small else 6))
        # Multiples of 10, so that what is larger is seen to be.
        values = self.random.permutation(np.arange(10, 100, 10))[:count].tolist()
        colours = self.random.permutation(list(COLOURS))[:count].tolist()
        size = _SMALL if small else (self.pick(_WIDTHS), self.pick(_HEIGHTS))
        return Chart(kind, title, self.some(labels, count), tuple(values), tuple(colours), size, unit)


def _sample(folder: Path, index: int, seed: int) -> list[dict[str, Any]]:
    """The messages of sample `index`; its pictures are written to `folder`."""
    writer = _Writer(folder, index, np.random.RandomState([seed, index]))
    turns = _KINDS[index % len(_KINDS)](writer)
    roles = ("user", "assistant")
    return [{"role": role, "content": content} for turn in turns for role, content in zip(roles, turn, strict=True)]


def _one_chart(kind: str) -> Callable[[_Writer], Iterator[tuple[Content, str]]]:
    """One picture; in half of the samples a second question about it follows."""

    def ask(writer: _Writer) -> Iterator[tuple[Content, str]]:
        chart = writer.chart(kind)
        questions = list(_questions(writer, chart))
        chosen = writer.some(questions, 1 + writer.random.randint(2))
        yield [writer.image(chart), _text(chosen[0][0])], chosen[0][1]
        yield from chosen[1:]

    return ask


def _questions(writer: _Writer, chart: Chart) -> Iterator[tuple[str, str]]:
    part, largest, smallest = {
        "bar": ("bar", "Which bar is the tallest?", "Which bar is the shortest?"),
        "line": ("point", "Where is the line highest?", "Where is the line lowest?"),
        "pie": ("slice", "Which slice is the largest?", "Which slice is the smallest?"),
    }[chart.kind]
    ranked = [label for _, label in sorted(zip(chart.values, chart.labels, strict=True))]
    yield largest, ranked[-1]
    yield smallest, ranked[0]
    yield f"How many {part}s are there?", str(len(chart.labels))
    a, b = writer.some(range(len(chart.labels)), 2)
    if chart.kind == "line":
        yield "What colour is the line?", chart.colours[0]
        rises = chart.values[a] < chart.values[b]
        yield f"Is {chart.labels[b]} above {chart.labels[a]}?", "Yes" if rises else "No"
    else:
        yield f"What colour is the {part} of {chart.labels[a]}?", chart.colours[a]
        yield (
            f"Is {chart.labels[a]} larger than {chart.labels[b]}?",
            "Yes" if chart.values[a] > chart.values[b] else "No",
        )


def _two_charts(writer: _Writer) -> Iterator[tuple[Content, str]]:
    first = writer.chart("bar", small=True)
    values = tuple(int(value) for value in writer.random.permutation(np.arange(15, 95, 10))[: len(first.values)])
    second = replace(first, values=values, title=f"{first.title} 2", colours=first.colours[::-1])
    place = writer.random.randint(len(first.labels))
    answer = _WHICH[int(second.values[place] > first.values[place])]
    question = f"In which of the two charts is the bar of {first.labels[place]} taller?"
    yield [writer.image(first), _text("and"), writer.image(second), _text(question)], f"In {answer}"


def _three_charts(writer: _Writer) -> Iterator[tuple[Content, str]]:
    kinds = writer.random.permutation(["bar", "line", "pie"]).tolist()
    images = [writer.image(writer.chart(kind, small=True)) for kind in kinds]
    asked = writer.pick(("bar", "line", "pie"))
    names = {"bar": "has bars", "line": "has a line", "pie": "is a pie"}
    yield [*images, _text(f"Which of the three charts {names[asked]}?")], _WHICH[kinds.index(asked)].capitalize()


def _video(writer: _Writer) -> Iterator[tuple[Content, str]]:
    """A bar grows from frame to frame."""
    chart = writer.chart("bar", small=True)
    place, frames = writer.random.randint(len(chart.labels)), int(writer.random.randint(3, 5))
    names = []
    for frame in range(frames):
        values = list(chart.values)
        values[place] = 10 + 85 * frame // (frames - 1)
        names.append(writer.picture(replace(chart, values=tuple(values))))
    video = {"type": "video", "video": names, "fps": writer.pick((1, 2))}
    yield [video, _text("Which bar grows?")], chart.labels[place]


def _no_picture(writer: _Writer) -> Iterator[tuple[Content, str]]:
    a, b = (int(value) for value in writer.random.randint(2, 50, size=2))
    title, _, labels = writer.pick(_TOPICS)
    first, second = writer.some(labels, 2)
    yield writer.pick(
        (
            (f"What is {a} + {b}?", str(a + b)),
            (f"Which is larger, {a} or {a + b}?", str(a + b)),
            (f"{title} of {first} is {a}, of {second} {a + b}. How much more is {second}?", str(b)),
        )
    )


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


_BARS, _LINE, _PIE = _one_chart("bar"), _one_chart("line"), _one_chart("pie")
_KINDS = (_BARS, _LINE, _no_picture, _PIE, _two_charts, _BARS, _LINE, _video, _three_charts, _PIE, _no_picture, _BARS)
"""Sample n is of kind n mod 12."""
