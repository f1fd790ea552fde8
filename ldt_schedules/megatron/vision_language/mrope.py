"""Positions of tokens in time, height and width (M-RoPE, arXiv:2409.12191 and, for time in seconds, arXiv:2502.13923).

Text counts on in all three at once. An image stands at one time, its tokens differ in height and width; a video's frames
differ in time by what passes between them. What follows begins behind the largest position so far (section 2.1 of the
first; transformers 4 and MindSpeed-MM agree, transformers 5.23 passes over the time of a video):

    text  text  | image of 2 x 3 tokens          | text
    t  0     1  |  2   2   2   2   2   2         |  5
    h  0     1  |  2   2   2   3   3   3         |  5
    w  0     1  |  2   3   4   2   3   4         |  5

The edge makes them, from the tokens; the cloud is sent the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ldt_schedules.errors import LdtError


def mrope_positions(
    input_ids: torch.Tensor,
    grids: torch.Tensor,
    segments: torch.Tensor | None = None,
    padding: torch.Tensor | None = None,
    *,
    image_token: int,
    video_token: int,
    merge_size: int = 2,
    tokens_per_second: float = 2,
    seconds_per_grid: Sequence[float] | None = None,
) -> torch.Tensor:
    """`[3, b, s]` int64, time, height and width of each token; each segment counts from 0, padding has 0.

    Args:
        input_ids: `[b, s]`, with a placeholder for each token of an image or video.
        grids: `[images, 3]`, (t, h, w) in patches, of all images and videos in the order of the text, sample after sample.
        segments: `[b, s]`, in runs; None: each sample is one segment.
        padding: `[b, s]` bool, True where a token is padding; None: nowhere.
        seconds_per_grid: for each *video*, in order, the seconds between two frames of its grid; default 1.

    Raises:
        LdtError: the placeholders and `grids` tell of different images.
    """
    ids = input_ids.cpu()
    segments = torch.zeros_like(ids) if segments is None else segments.cpu()
    valid = torch.ones_like(ids, dtype=torch.bool) if padding is None else ~padding.cpu().bool()
    videos = iter([1.0] * len(grids) if seconds_per_grid is None else seconds_per_grid)
    images = iter(grids.tolist())
    visual = _Visual(images, videos, image_token, video_token, merge_size, tokens_per_second)
    positions = torch.zeros((3, *ids.shape), dtype=torch.int64)
    for sample, numbers in enumerate(segments):
        for number in torch.unique_consecutive(numbers):
            mine = (numbers == number) & valid[sample]
            positions[:, sample, mine] = visual.of_segment(ids[sample, mine])
    if next(images, None) is not None:
        raise LdtError(f"the text has placeholders for fewer images and videos than the {len(grids)} that are given")
    return positions


class _Visual:
    """Goes through texts, taking the next image wherever a placeholder begins."""

    def __init__(
        self,
        images: Iterator[list[int]],
        seconds: Iterator[float],
        image_token: int,
        video_token: int,
        merge_size: int,
        tokens_per_second: float,
    ) -> None:
        self.images, self.seconds = images, seconds
        self.image_token, self.video_token = image_token, video_token
        self.merge_size, self.tokens_per_second = merge_size, tokens_per_second

    def of_segment(self, ids: torch.Tensor) -> torch.Tensor:
        """`[3, tokens]` for the tokens of one segment, `[tokens]`."""
        is_visual = (ids == self.image_token) | (ids == self.video_token)
        places = is_visual.nonzero().flatten().tolist()
        parts, done, position = [], 0, 0
        while places:
            text = places[0] - done
            parts.append(_text(text, position))
            position += text
            token = int(ids[places[0]])
            part, size = self._next(token, position)
            done = places[0] + part.shape[1]
            if not bool((ids[places[0] : done] == token).all()) or done > len(ids):
                raise LdtError(f"an image or video of {part.shape[1]} tokens has fewer placeholders in the text")
            places = places[part.shape[1] :]
            parts.append(part)
            position += size
        return torch.cat([*parts, _text(len(ids) - done, position)], dim=1)

    def _next(self, token: int, position: int) -> tuple[torch.Tensor, int]:
        """Positions `[3, tokens]` of the next image or video, and how many of them the text moves on."""
        grid = next(self.images, None)
        if grid is None:
            raise LdtError("the text has placeholders for more images and videos than there are")
        frames, rows, columns = grid[0], grid[1] // self.merge_size, grid[2] // self.merge_size
        interval: float = 1
        if token == self.video_token:
            seconds = next(self.seconds, None)
            if seconds is None:
                raise LdtError("seconds_per_grid has fewer numbers than there are videos")
            interval = self.tokens_per_second * seconds
        time = (torch.arange(frames) * interval).long()
        axes = torch.meshgrid(time, torch.arange(rows), torch.arange(columns), indexing="ij")
        return torch.stack([axis.flatten() for axis in axes]) + position, max(rows, columns, int(time[-1]) + 1)


def _text(length: int, position: int) -> torch.Tensor:
    return (torch.arange(length) + position).expand(3, -1)
