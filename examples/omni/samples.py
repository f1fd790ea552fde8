"""Synthetic samples of text, sound and pictures: nothing is read or downloaded.

A row of a microbatch is a prompt of random tokens, then a clip and pictures in random order, each followed by a caption
that tells its pitch or its colour, then an ending. Captions and ending are the labels, so there is something to learn.
Clips are pure tones seen through Whisper's feature extractor and pictures are noisy colours seen through Qwen2-VL's
image processor: what the model is given has the form that it has in earnest.

A microbatch depends on its number and the seed alone. Every rank can make it without making those before it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TypedDict

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image
from torch import Tensor
from transformers import Qwen2_5OmniThinkerConfig, Qwen2VLImageProcessorPil, WhisperFeatureExtractor

MODALITIES = ("audio", "image")
PITCHES_HZ = (220.0, 330.0, 495.0, 742.0, 1114.0, 1671.0, 2506.0, 3759.0)
COLOURS = ((200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30), (30, 200, 200), (200, 30, 200))
# Ordinary tokens: a caption counts upwards from its own start, and prompts are drawn from the rest.
PITCH_TOKEN, COLOUR_TOKEN, ENDING_TOKEN, PROMPT_TOKENS = 10, 90, 150, (160, 190)
PADDING_TOKEN, NO_LABEL = 0, -100
SAMPLING_RATE, HOP = 16000, 160


class Microbatch(TypedDict):
    """What each root is called with (None: the root is skipped) and `labels` `[b, s]` for the loss."""

    audio: dict[str, Tensor] | None
    vision: dict[str, Tensor] | None
    text: dict[str, Tensor]
    labels: Tensor


def microbatch(
    config: Qwen2_5OmniThinkerConfig, number: int, *, seed: int = 0, without: Collection[str] = ()
) -> Microbatch:
    """Microbatch `number`: one row when the number is even and two when it is odd; every length is drawn anew.

    Args:
        config: whose token ids, mel bins and patches to use.
        without: the modalities that it shall lack, of `MODALITIES`.

    Returns:
        audio: `input_features` `[clips, mel bins, frames]`, `feature_attention_mask` `[clips, frames]`.
        vision: `pixel_values` `[patches, values of a patch]`, `image_grid_thw` `[images, 3]`.
        text: `input_ids` and `attention_mask` `[b, s]`, with `image_grid_thw` and `audio_lengths` `[clips]` where
            there are any.
        labels: `[b, s]`.

    Raises:
        ValueError: `without` names something else.
    """
    if unknown := set(without) - set(MODALITIES):
        raise ValueError(f"a microbatch has no {sorted(unknown)}; it can be without {' or '.join(MODALITIES)}")
    rng = np.random.default_rng([seed, number])
    rows = [_draw_row(rng, without) for _ in range(1 + number % 2)]
    audio, vision = _audio(config, rows), _vision(config, rows)
    text = _text(config, rows, audio, vision)
    return Microbatch(audio=audio, vision=vision, labels=text.pop("labels"), text=text)


def whole_kwargs(batch: Microbatch) -> dict[str, Tensor | bool]:
    """What the whole model is called with to see the same microbatch; it then returns its loss too."""
    text = {name: batch["text"][name] for name in ("input_ids", "attention_mask")}
    return {**text, **(batch["audio"] or {}), **(batch["vision"] or {}), "labels": batch["labels"], "use_cache": False}


@dataclass
class _Item:
    """A clip or a picture: `signal` is the wave `[samples]` or the image, `caption` are tokens."""

    modality: str
    signal: np.ndarray | Image.Image
    caption: list[int]


@dataclass
class _Row:
    prompt: list[int]
    ending: list[int]
    items: list[_Item] = field(default_factory=list)

    def signals(self, modality: str) -> list[np.ndarray | Image.Image]:
        return [item.signal for item in self.items if item.modality == modality]


def _draw_row(rng: Generator, without: Collection[str]) -> _Row:
    prompt = rng.integers(*PROMPT_TOKENS, size=rng.integers(2, 7)).tolist()
    row = _Row(prompt, _count_from(ENDING_TOKEN, rng))
    # Drawn even where they are left out: what remains of a microbatch is the same with and without them.
    items = [_draw_clip(rng), *(_draw_picture(rng) for _ in range(rng.integers(1, 3)))]
    order = rng.permutation(len(items))
    row.items = [items[index] for index in order if items[index].modality not in without]
    return row


def _draw_clip(rng: Generator) -> _Item:
    """A tone of 0.2 to 0.8 seconds, a whole number of mel frames."""
    pitch = int(rng.integers(len(PITCHES_HZ)))
    time = np.arange(int(rng.integers(20, 81)) * HOP) / SAMPLING_RATE
    wave = np.sin(2 * np.pi * PITCHES_HZ[pitch] * time) + 0.01 * rng.standard_normal(len(time))
    return _Item("audio", wave.astype(np.float32), _count_from(PITCH_TOKEN + 10 * pitch, rng))


def _draw_picture(rng: Generator) -> _Item:
    """A colour with noise, 12 to 40 pixels wide and high; the image processor rounds to whole patches."""
    colour = int(rng.integers(len(COLOURS)))
    height, width = rng.integers(12, 41, size=2)
    pixels = np.array(COLOURS[colour]) + rng.integers(-30, 31, size=(height, width, 3))
    return _Item("image", Image.fromarray(pixels.astype(np.uint8)), _count_from(COLOUR_TOKEN + 10 * colour, rng))


def _count_from(token: int, rng: Generator) -> list[int]:
    return list(range(token, token + int(rng.integers(3, 7))))


def _audio(config: Qwen2_5OmniThinkerConfig, rows: list[_Row]) -> dict[str, Tensor] | None:
    waves = [wave for row in rows for wave in row.signals("audio")]
    if not waves:
        return None
    extractor = WhisperFeatureExtractor(
        feature_size=config.audio_config.num_mel_bins, sampling_rate=SAMPLING_RATE, hop_length=HOP
    )
    features = extractor(
        waves, sampling_rate=SAMPLING_RATE, padding="longest", return_attention_mask=True, return_tensors="pt"
    )
    return {
        "input_features": features["input_features"],
        "feature_attention_mask": features["attention_mask"].long(),
    }


def _vision(config: Qwen2_5OmniThinkerConfig, rows: list[_Row]) -> dict[str, Tensor] | None:
    pictures = [picture for row in rows for picture in row.signals("image")]
    if not pictures:
        return None
    vision = config.vision_config
    processor = Qwen2VLImageProcessorPil(
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
        size={"shortest_edge": 16 * 16, "longest_edge": 48 * 48},
    )
    patches = processor(pictures, return_tensors="pt")
    return {name: patches[name] for name in ("pixel_values", "image_grid_thw")}


def _text(
    config: Qwen2_5OmniThinkerConfig,
    rows: list[_Row],
    audio: dict[str, Tensor] | None,
    vision: dict[str, Tensor] | None,
) -> dict[str, Tensor]:
    """The text root's inputs and the labels."""
    sizes: dict[str, Tensor] = {}
    places: dict[str, list[int]] = {"audio": [], "image": []}
    if audio is not None:
        frames = sizes["audio_lengths"] = audio["feature_attention_mask"].sum(-1)
        # The tower halves the frames twice: a strided convolution that rounds up, a pooling that rounds down.
        places["audio"] = ((frames + 1) // 2 // 2).tolist()
    if vision is not None:
        grids = sizes["image_grid_thw"] = vision["image_grid_thw"]
        places["image"] = (grids.prod(-1) // config.vision_config.spatial_merge_size**2).tolist()
    counts = {modality: iter(numbers) for modality, numbers in places.items()}
    spelled = [_spell(config, row, {m: [next(counts[m]) for _ in row.signals(m)] for m in MODALITIES}) for row in rows]
    return {
        "input_ids": _padded([tokens for tokens, _ in spelled], PADDING_TOKEN),
        "attention_mask": _padded([[1] * len(tokens) for tokens, _ in spelled], 0),
        "labels": _padded([labels for _, labels in spelled], NO_LABEL),
        **sizes,
    }


def _padded(rows: list[list[int]], value: int) -> Tensor:
    """`[b, s]`. Padding goes to the left, as the model's processor has it: to the right, a causal model would not see
    it, and a stage that lost the attention mask would make no difference to the loss.
    """
    length = max(len(row) for row in rows)
    return torch.tensor([[value] * (length - len(row)) + row for row in rows])


def _spell(config: Qwen2_5OmniThinkerConfig, row: _Row, places: dict[str, list[int]]) -> tuple[list[int], list[int]]:
    """A row's tokens and labels, not padded; `places` are the placeholders of each of its clips and pictures."""
    around = {
        "audio": (config.audio_start_token_id, config.audio_token_id, config.audio_end_token_id),
        "image": (config.vision_start_token_id, config.image_token_id, config.vision_end_token_id),
    }
    counts = {modality: iter(numbers) for modality, numbers in places.items()}
    tokens, labels = list(row.prompt), [NO_LABEL] * len(row.prompt)
    for item in row.items:
        start, placeholder, end = around[item.modality]
        item_tokens = [start, *[placeholder] * next(counts[item.modality]), end]
        tokens += item_tokens + item.caption
        labels += [NO_LABEL] * len(item_tokens) + item.caption
    return tokens + row.ending, labels + row.ending
