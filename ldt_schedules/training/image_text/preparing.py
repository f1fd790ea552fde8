"""One conversation, ready for a batch, or what is wrong with it.

A sample is never cut: behind the cut lies the answer, and within an image's placeholders a cut would leave features
without a place. One that does not fit is a bad sample, like one whose picture is broken, and `on_bad_sample` says
whether the run stops or takes the next.

`measure` looks at headers and text only. It is cheap enough for all replicas to measure a whole global batch, of which
each then prepares its own part.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ldt_schedules.errors import ConfigError
from ldt_schedules.training.chat.samples import Sample, Video
from ldt_schedules.training.chat.writing import Chat, ChatError, Written
from ldt_schedules.training.image_text.pixels import Grid, PictureError, Pixels


class BadSample(ConfigError):
    """A sample that cannot be trained on; the message names its file and line."""


@dataclass(frozen=True)
class Measure:
    """What a sample takes, known without decoding a picture."""

    written: Written
    grids: tuple[Grid, ...]

    @property
    def patches(self) -> int:
        """Rows of work for the image encoder."""
        return sum(t * h * w for t, h, w in self.grids)


@dataclass(frozen=True)
class Prepared:
    """A sample as arrays.

    Attributes:
        ids: `[n]` int64.
        learned: `[n]` bool, the ids that the assistant wrote.
        pixel_values: `[patches, C * T * P * P]` float32, images and videos in the order of the text.
        grids: `[images, 3]` int64, (t, h, w) in patches of each.
        seconds_per_grid: for each video, in order, the seconds between two frames of its grid.
    """

    ids: np.ndarray
    learned: np.ndarray
    pixel_values: np.ndarray
    grids: np.ndarray
    seconds_per_grid: tuple[float, ...]


@dataclass(frozen=True)
class Preparing:
    """How conversations become arrays.

    Attributes:
        seq_length: tokens of a sample at most.
    """

    chat: Chat
    pixels: Pixels
    seq_length: int

    def measure(self, sample: Sample) -> Measure:
        """Raises BadSample: too long, a picture without a usable header, a text that the chat template refuses."""
        try:
            grids = tuple(self.pixels.grid(part) for part in sample.vision)
        except PictureError as error:
            raise BadSample(f"data.path {sample.name}: {error}") from None
        tokens = [self.pixels.tokens(grid) for grid in grids]
        # Before the conversation is written: millions of placeholders need not be made to be counted.
        self._check_length(sample, 0, sum(tokens))
        try:
            written = self.chat.write(sample.messages, tokens)
        except ChatError as error:
            raise BadSample(f"data.path {sample.name}: {error}") from None
        self._check_length(sample, len(written.ids), sum(tokens))
        if not written.learned[1:].any():
            raise BadSample(f"data.path {sample.name}: the assistant's messages are empty; at least a token is needed")
        return Measure(written, grids)

    def prepare(self, sample: Sample) -> Prepared:
        """Raises BadSample: as `measure`; a picture that cannot be decoded; placeholders and patches that disagree."""
        measure = self.measure(sample)
        try:
            made = [self.pixels.patches(part) for part in sample.vision]
        except PictureError as error:
            raise BadSample(f"data.path {sample.name}: {error}") from None
        pixel_values = [patches for patches, _ in made] or [np.zeros((0, self.pixels.width), dtype=np.float32)]
        prepared = Prepared(
            ids=measure.written.ids,
            learned=measure.written.learned,
            pixel_values=np.concatenate(pixel_values),
            grids=np.array([grid for _, grid in made], dtype=np.int64).reshape(-1, 3),
            seconds_per_grid=tuple(self.pixels.seconds(part) for part in sample.vision if isinstance(part, Video)),
        )
        self._check_agreement(sample, prepared)
        return prepared

    def _check_length(self, sample: Sample, total: int, vision: int) -> None:
        longest = max(total, vision)
        if longest <= self.seq_length:
            return
        if vision:
            kinds = ["video" if isinstance(part, Video) else "image" for part in sample.vision]
            counted = ((kind, kinds.count(kind)) for kind in ("image", "video") if kind in kinds)
            pictures = " and ".join(f"{count} {kind}{'s' * (count > 1)}" for kind, count in counted)
            takes = f"{pictures} of {vision} tokens" + (f" and a text of {total - vision}" if total else "")
            change = (
                f"lower vision.max_pixels (now {self.pixels.max_pixels}; {(self.pixels.patch * self.pixels.merge) ** 2} "
                "pixels make a token) or raise model.seq_length"
            )
        else:
            takes, change = f"a text of {total} tokens", "shorten it or raise model.seq_length"
        raise BadSample(f"data.path {sample.name} has {takes}, but model.seq_length is {self.seq_length}; {change}")

    def _check_agreement(self, sample: Sample, prepared: Prepared) -> None:
        """Each run of placeholders must be as long as its grid says, and of its kind."""
        ids, vision = prepared.ids, self.chat.vision
        patches = int(prepared.grids.prod(axis=1).sum())
        if patches != len(prepared.pixel_values):
            raise BadSample(
                f"data.path {sample.name}: the images' grids {prepared.grids.tolist()} have {patches} patches, but "
                f"{len(prepared.pixel_values)} were made"
            )
        kinds = [vision.video if isinstance(part, Video) else vision.image for part in sample.vision]
        counts = [self.pixels.tokens(tuple(grid)) for grid in prepared.grids.tolist()]
        expected = np.repeat(np.array(kinds, dtype=np.int64), counts)
        found = ids[(ids == vision.image) | (ids == vision.video)]
        if not np.array_equal(expected, found):
            raise BadSample(
                f"data.path {sample.name}: the text has {len(found)} image and video tokens, but the grids "
                f"{prepared.grids.tolist()} need {counts}, {sum(counts)} together; they must agree in number and order"
            )
