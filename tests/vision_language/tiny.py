"""A tiny vision-language model, microbatches for it, and the world that it runs in."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ldt_schedules.megatron.vision_language.mrope import mrope_positions

VOCABULARY, IMAGE, VIDEO, PAD = 64, 62, 63, 0
MERGE, PATCH_VALUES = 2, 24
VISION_LAYERS, LANGUAGE_LAYERS = 4, 3
FULL_ATTENTION = [1, 3]
MROPE = [1, 1, 2]
SEQUENCE = 40

Part = int | tuple[int, tuple[int, int, int]]
"""So many tokens of text, or (IMAGE or VIDEO, its grid)."""


@dataclass(frozen=True)
class Sample:
    """Parts of a text, and how many of the padding tokens stand before it."""

    parts: tuple[Part, ...]
    left: int = 0


BATCHES: dict[str, tuple[Sample, ...]] = {
    "no image": (Sample((SEQUENCE,)), Sample((SEQUENCE,))),
    "one image": (Sample((3, (IMAGE, (1, 4, 6)), 31)),),
    "three images": (
        Sample((2, (IMAGE, (1, 6, 10)), 1, (IMAGE, (1, 2, 2)), 21)),
        Sample(((IMAGE, (1, 8, 6)), 28)),
    ),
    "a video": (Sample((4, (VIDEO, (3, 6, 4)), 18)), Sample((40,))),
    "video and images": (Sample((1, (VIDEO, (2, 4, 4)), 2, (IMAGE, (1, 4, 4)), 3)), Sample(((IMAGE, (1, 2, 6)), 9))),
    "padding at both ends": (
        Sample((2, (IMAGE, (1, 4, 6)), 6), left=5),
        Sample((3, (VIDEO, (2, 4, 4)), 6), left=23),
        Sample((9,)),
    ),
}


def microbatch(samples: Sequence[Sample], dtype: torch.dtype = torch.float32, seed: int = 1) -> dict[str, torch.Tensor]:
    """As the edge gets it, and `padding` `[b, s]`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((len(samples), SEQUENCE), PAD)
    padding = torch.ones((len(samples), SEQUENCE), dtype=torch.bool)
    grids: list[tuple[int, int, int]] = []
    for row, sample in enumerate(samples):
        text: list[int] = []
        for part in sample.parts:
            if isinstance(part, int):
                text += torch.randint(1, IMAGE, (part,), generator=generator).tolist()
            else:
                token, grid = part
                text += [token] * (grid[0] * grid[1] * grid[2] // MERGE**2)
                grids.append(grid)
        ids[row, sample.left : sample.left + len(text)] = torch.tensor(text)
        padding[row, sample.left : sample.left + len(text)] = False
    seen = (~padding).long().cumsum(1) > 0
    segments = seen.long() + (seen & padding).long()
    given = torch.tensor(grids, dtype=torch.int64).view(-1, 3)
    patches = int(given.prod(1).sum())
    return {
        "input_ids": ids,
        "labels": torch.cat([ids[:, 1:], ids[:, :1]], dim=1),
        "loss_mask": (~padding).float(),
        "padding": padding,
        "segments": segments,
        "position_ids": mrope_positions(ids, given, segments, padding, image_token=IMAGE, video_token=VIDEO),
        "pixel_values": torch.randn((patches, PATCH_VALUES), generator=generator, dtype=torch.float64).to(dtype),
        "grids": given,
    }


def for_the_cloud(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a step header tells."""
    return {name: batch[name] for name in ("segments", "position_ids", "grids")}


def model(dtype: torch.dtype = torch.float32, tensor: int = 1, tied: bool = False, **more: Any) -> Any:
    """The description of the tiny model; `more` are fields of the language model's TransformerConfig."""
    from ldt_schedules.topology import Site
    from ldt_schedules.training.config import TrainConfig
    from ldt_schedules.training.model import transformer_config
    from ldt_schedules.training.vision_model import described
    from ldt_schedules.training.vocabulary import Vocabulary

    config = TrainConfig.model_validate(
        {
            "model": {
                "num_layers": LANGUAGE_LAYERS,
                "hidden_size": 32,
                "ffn_hidden_size": 48,
                "num_attention_heads": 4,
                "num_query_groups": 2,
                "seq_length": SEQUENCE,
                "tie_embeddings": tied,
                "activation": "swiglu",
                "qkv_bias": True,
                "norm_eps": 1e-6,
                "mrope_section": MROPE,
                "precision": {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16"}[dtype],
                "megatron": more,
            },
            "vision": {
                "num_layers": VISION_LAYERS,
                "hidden_size": 32,
                "ffn_hidden_size": 40,
                "num_attention_heads": 2,
                "full_attention_layers": FULL_ATTENTION,
                "patch_size": 2,
                "merge_size": MERGE,
                "window_size": 8,
            },
            "sites": {"edge": {"tensor_parallel": tensor}, "cloud": {"pipeline_ranks": 0}},
        }
    )
    language = transformer_config(config, config.topology, Site.EDGE)
    return described(config, language, Vocabulary(VOCABULARY, IMAGE, VIDEO))


def open_world(rank: int, ports: dict[str, int], tensor: int = 1) -> None:
    """Join the world of an edge of `tensor` processes, on a CPU, with patches."""
    from ldt_schedules.topology import SiteSize
    from tests.parity.case import Case, open_rank

    open_rank(Case((1,), 1, edge=SiteSize(tensor=tensor)), rank, ports)
    warnings.simplefilter("ignore")


def named_parameters(stage: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """By their names in the whole model."""
    for prefix, offset, part in stage.named_parts():
        for name, parameter in part.named_parameters():
            before, layers, rest = name.partition("layers.")
            if layers:
                number, _, rest = rest.partition(".")
                rest = f"{int(number) + offset}.{rest}"
            yield prefix + before + layers + rest, parameter


def random_weights(seed: int = 5) -> dict[str, torch.Tensor]:
    """Of the whole model, in float64, by name: wide enough that nothing is close to linear."""
    from ldt_schedules.megatron.vision_language.stages import UnsplitVisionLanguageModel

    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, parameter in named_parameters(UnsplitVisionLanguageModel(model(torch.float64))):
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        found[name] = 0.25 * drawn + (1.0 if "norm" in name else 0.0)
    return found


def load(stage: Any, weights: dict[str, torch.Tensor]) -> Any:
    """Put whole weights, or their slices of a tensor-parallel process, into a stage; returns it."""
    with torch.no_grad():
        for name, parameter in named_parameters(stage):
            parameter.copy_(slice_of(name, weights[name], parameter))
    return stage


def slice_of(name: str, whole: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
    """What a tensor-parallel process holds of a weight (or of its gradient)."""
    from megatron.core import parallel_state

    size, rank = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    if size == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return whole
    gated = "linear_fc1" in name and "projector" not in name
    halves = whole.chunk(2) if gated else (whole,)
    return torch.cat([half.chunk(size, dim=parameter.partition_dim)[rank] for half in halves])


def masked_mean(losses: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Over the tokens that count."""
    mask = batch["loss_mask"].to(losses.dtype)
    return (losses * mask).sum() / mask.sum()
