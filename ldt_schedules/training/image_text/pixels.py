"""Images and videos to patches. The arithmetic of a picture is `transformers`' own image processor of Qwen2-VL.

    [C, H, W]  resized to multiples of patch * merge, normalized   ->  [h * w, C * T * P * P],  grid (1, h, w)

The patches of one square of merge x merge stand together, because they become one token. A still image fills the T
(temporal_patch) layers of each patch with itself.

The processor for videos needs torchvision. A video's frames therefore go through the image processor, one by one, and
layer f mod T of the patches at time f // T is taken from frame f; the last frame is repeated where T does not divide
their number. That is what the reference computes, but for the bounds of its pixels: ours hold for each frame.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron.vision_language.limits import pixel_problems
from ldt_schedules.training.chat.samples import Image, Video
from ldt_schedules.training.tokenizer import HF_EXTRA

Grid = tuple[int, int, int]
"""(t, h, w): patches of an image or video in time, height and width."""


class PictureError(Exception):
    """A picture cannot be used. Says why, without the sample's name, which the caller knows."""


@dataclass(frozen=True)
class Pixels:
    """How pictures become patches.

    Attributes:
        patch: pixels of a patch's side (P).
        temporal_patch: frames of a patch (T).
        merge: patches of a side that become one token.
        min_pixels, max_pixels: a picture (of a video: each frame) is scaled so that it has between so many.

    Raises:
        ConfigError: the bounds admit no picture, or transformers or Pillow is not installed (when first used).
    """

    patch: int = 14
    temporal_patch: int = 2
    merge: int = 2
    min_pixels: int = 4 * 28 * 28
    max_pixels: int = 1280 * 28 * 28

    def __post_init__(self) -> None:
        for problem in pixel_problems(self.min_pixels, self.max_pixels, self.patch, self.merge):
            raise ConfigError(problem)

    @property
    def width(self) -> int:
        """Numbers of a patch, of 3 colours."""
        return 3 * self.temporal_patch * self.patch**2

    def tokens(self, grid: Grid) -> int:
        """Tokens that an image or video takes in the sequence."""
        return grid[0] * grid[1] * grid[2] // self.merge**2

    def seconds(self, video: Video) -> float:
        """Time between two frames of its grid, seconds."""
        return self.temporal_patch / video.fps

    def grid(self, part: Image | Video) -> Grid:
        """Its grid, from the sizes in the files' headers alone.

        Raises:
            PictureError: a file is no picture, is too narrow to be resized, or frames differ in size.
        """
        paths = _files(part)
        sizes = [_size(path) for path in paths]
        if len(set(sizes)) > 1:
            other = next(index for index, size in enumerate(sizes) if size != sizes[0])
            raise PictureError(
                f"frames of one video must have one size, but {paths[0]} is {sizes[0][0]} x {sizes[0][1]} and "
                f"{paths[other]} is {sizes[other][0]} x {sizes[other][1]} pixels"
            )
        width, height = sizes[0]
        try:
            height, width = _reference().smart_resize(
                height, width, self.patch * self.merge, min_pixels=self.min_pixels, max_pixels=self.max_pixels
            )
        except ValueError as error:
            raise PictureError(f"{paths[0]} is {sizes[0][0]} x {sizes[0][1]} pixels: {error}") from None
        # Older versions let the width of a long, flat picture become 0.
        if not height or not width:
            raise PictureError(f"{paths[0]} is {sizes[0][0]} x {sizes[0][1]} pixels, too long for vision.max_pixels")
        return -(-len(paths) // self.temporal_patch), height // self.patch, width // self.patch

    def patches(self, part: Image | Video) -> tuple[np.ndarray, Grid]:
        """`[t * h * w, C * T * P * P]` float32, and the grid that the processor says it has.

        Raises:
            PictureError: a file cannot be decoded.
        """
        frames = [self._still(path) for path in _files(part)]
        if isinstance(part, Image):
            return frames[0]
        _, height, width = frames[0][1]
        layers = [patches.reshape(height * width, 3, self.temporal_patch, -1)[:, :, 0] for patches, _ in frames]
        layers += layers[-1:] * (-len(layers) % self.temporal_patch)
        times = len(layers) // self.temporal_patch
        stacked = np.stack(layers).reshape(times, self.temporal_patch, height * width, 3, -1)
        return stacked.transpose(0, 2, 3, 1, 4).reshape(times * height * width, self.width), (times, height, width)

    def _still(self, path: Path) -> tuple[np.ndarray, Grid]:
        try:
            with _open(path) as image:
                coloured = image.convert("RGB")
        except PictureError:
            raise
        except Exception as error:  # a broken file raises whatever its decoder does
            raise PictureError(f"{path} cannot be decoded ({error})") from None
        made = self._processor(images=[coloured], return_tensors="np")
        time, height, width = (int(side) for side in made["image_grid_thw"][0])
        return np.asarray(made["pixel_values"], dtype=np.float32), (time, height, width)

    @cached_property
    def _processor(self) -> Any:
        return _reference().processor(
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
            patch_size=self.patch,
            temporal_patch_size=self.temporal_patch,
            merge_size=self.merge,
        )


def _files(part: Image | Video) -> tuple[Path, ...]:
    return part.frames if isinstance(part, Video) else (part.path,)


@lru_cache(maxsize=65536)
def _size(path: Path) -> tuple[int, int]:
    """Width and height, from the header."""
    with _open(path) as image:
        size: tuple[int, int] = image.size
    return size


def _open(path: Path) -> Any:
    try:
        from PIL import Image as pillow
    except ImportError as error:
        raise ConfigError(f"images need the package pillow ({error}): {HF_EXTRA}") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pillow.DecompressionBombWarning)
            return pillow.open(path)
    except Exception as error:  # a broken header raises whatever its decoder does
        raise PictureError(f"{path} is no picture that Pillow can read ({error})") from None


@dataclass(frozen=True)
class _Reference:
    processor: Any
    smart_resize: Any


@lru_cache(maxsize=1)
def _reference() -> _Reference:
    """Qwen2-VL's image processor without torchvision, which has had two homes, and its rule of sizes.

    Where both exist, the class under the old name is torchvision's.
    """
    try:
        try:
            from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as pil

            return _Reference(pil.Qwen2VLImageProcessorPil, pil.smart_resize)
        except ImportError:
            from transformers.models.qwen2_vl import image_processing_qwen2_vl as older

            return _Reference(older.Qwen2VLImageProcessor, older.smart_resize)
    except ImportError as error:
        raise ConfigError(
            f"images need the packages transformers (4.49 or newer) and pillow ({error}): {HF_EXTRA}"
        ) from None
