"""What the sizes of images alone say of a ViT's input: the order of its patches, who attends to whom, where each stands.

A ViT with window attention (Qwen2.5-VL, arXiv:2502.13923, section 2.1.1) cuts each frame into square windows. Its patches
are put in *window order* once, before the first layer, so that a window is a run of rows; after the last layer the
order is undone. Every stage needs this, also one that never sees a pixel, so it is made from `grids` and nothing else.

    frame of 4 x 6 tokens, windows of 4 x 4       window order (windows one after the other, row by row inside)
      0  1  2  3 | 4  5                             0 1 2 3  6 7 8 9  12 13 14 15  18 19 20 21 | 4 5  10 11  16 17  22 23
      6  7  8  9 |10 11
     12 13 14 15 |16 17                           A token is merge x merge patches, which stand together before and after.
     18 19 20 21 |22 23
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from ldt_schedules.errors import LdtError

Grids = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class ImageStructure:
    """Of the images and videos of one microbatch; CPU tensors, not to be changed: callers share them.

    Attributes:
        order: `[tokens]`; row i of the window order is row `order[i]` of the images' own order.
        inverse: `[tokens]`; back again.
        segments: `[2, patches]` in window order, each row non-decreasing: number of the window, number of the frame.
        positions: `[2, patches]` in window order: row and column of a patch in its frame.
    """

    order: torch.Tensor
    inverse: torch.Tensor
    segments: torch.Tensor
    positions: torch.Tensor

    @property
    def num_patches(self) -> int:
        return self.segments.shape[1]


def image_structure(grids: torch.Tensor, merge_size: int, window_tokens: int) -> ImageStructure:
    """The structure of images and videos with these `grids` `[images, 3]`, (t, h, w) in patches; no images are fine.

    Args:
        merge_size: patches of a side that become one token.
        window_tokens: side of a window, in tokens.

    Raises:
        LdtError: a side that is no multiple of `merge_size`.
    """
    return _structure(tuple((int(t), int(h), int(w)) for t, h, w in grids.tolist()), merge_size, window_tokens)


@lru_cache(maxsize=32)
def _structure(grids: Grids, merge: int, window_tokens: int) -> ImageStructure:
    orders, windows, frames, positions = [], [], [], []
    num_tokens = num_windows = num_frames = 0
    for grid in grids:
        _check(grid, merge)
        window, frame, row, column = _tokens(grid, merge, window_tokens)
        order = torch.argsort(window, stable=True)
        orders.append(order + num_tokens)
        windows.append(window[order] + num_windows)
        frames.append(frame[order] + num_frames)
        positions.append(_patches(row[order], column[order], merge))
        num_tokens += len(order)
        num_windows += int(window.max()) + 1
        num_frames += grid[0]
    none = torch.zeros(0, dtype=torch.int64)
    order = torch.cat([none, *orders])
    segments = torch.stack([torch.cat([none, *windows]), torch.cat([none, *frames])])
    return ImageStructure(
        order=order,
        inverse=torch.argsort(order),
        segments=segments.repeat_interleave(merge**2, dim=1),
        positions=torch.cat([none.expand(2, 0), *positions], dim=1),
    )


def _check(grid: tuple[int, int, int], merge: int) -> None:
    frames, height, width = grid
    if min(grid) < 1 or height % merge or width % merge:
        raise LdtError(
            f"an image of {frames} x {height} x {width} patches (frames, height, width): height and width must be positive "
            f"multiples of merge_size, {merge}; resize the image"
        )


def _tokens(grid: tuple[int, int, int], merge: int, side: int) -> tuple[torch.Tensor, ...]:
    """Window, frame, row and column of each token of one image, in the image's own order, each `[tokens]`."""
    frames, rows, columns = grid[0], grid[1] // merge, grid[2] // merge
    frame, row, column = torch.meshgrid(*map(torch.arange, (frames, rows, columns)), indexing="ij")
    across, down = -(-columns // side), -(-rows // side)
    window = (frame * down + row // side) * across + column // side
    return window.flatten(), frame.flatten(), row.flatten(), column.flatten()


def _patches(row: torch.Tensor, column: torch.Tensor, merge: int) -> torch.Tensor:
    """`[2, tokens * merge^2]`: row and column of each patch, from those of its token."""
    inner_row, inner_column = torch.meshgrid(torch.arange(merge), torch.arange(merge), indexing="ij")
    rows = row[:, None] * merge + inner_row.flatten()
    columns = column[:, None] * merge + inner_column.flatten()
    return torch.stack([rows.flatten(), columns.flatten()])
