"""What a split vision-language model cannot be, and on what sites it cannot run: each rule once, in plain numbers.

The training config asks before anything starts, the model's description asks of whatever built it. Keys are named as a
training config has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ldt_schedules.topology import nearest_multiples


def vision_problems(
    *,
    num_layers: int,
    hidden_size: int,
    num_attention_heads: int,
    full_attention_layers: Sequence[int],
    window_tokens: int,
) -> Iterator[str]:
    """One sentence for each mistake in the sizes of the ViT; `window_tokens` of a side, rounded down as in `transformers`."""
    if hidden_size % (4 * num_attention_heads):
        yield (
            f"vision.hidden_size {hidden_size} / vision.num_attention_heads {num_attention_heads} must be a multiple of 4 "
            f"(rotary angles for height and width); {nearest_multiples(hidden_size, 4 * num_attention_heads)} would do"
        )
    if window_tokens < 1:
        yield (
            "vision.window_size holds no token: it must be at least vision.patch_size x vision.merge_size pixels; raise it"
        )
    beyond = [layer for layer in full_attention_layers if not 0 <= layer < num_layers]
    if beyond:
        yield f"vision.full_attention_layers {beyond} do not exist: vision.num_layers is {num_layers}, counted from 0"


def mrope_problems(section: Sequence[int] | None, head_width: int) -> Iterator[str]:
    """Rotary angles of time, height and width; there are half as many as a head is wide."""
    given, angles = list(section or ()), head_width // 2
    if len(given) != 3 or sum(given) != angles or min(given) < 0:
        yield (
            f"model.mrope_section {given} must be three numbers (time, height, width) that add up to half of a head's "
            f"width, {angles}"
        )


def parallel_problems(
    site: str, *, tensor: int, sequence_parallel: bool, context: int, divided: Mapping[str, int]
) -> Iterator[str]:
    """Of one site.

    Args:
        site: what stands before the names of its sizes: `sites.cloud.`, for instance.
        divided: what its tensor-parallel processes must be able to share out, by its key.
    """
    if sequence_parallel:
        yield (
            f"{site}sequence_parallel: a vision-language model does not run with sequence parallelism, which cuts a sequence "
            "in equal parts: patches come in any number, and the edge puts features into a whole sequence. Turn it off for "
            "both sites"
        )
    if context > 1:
        yield f"{site}context_parallel {context}: a vision-language model does not run with context parallelism; set it to 1"
    for key, value in divided.items():
        if value % tensor:
            yield (
                f"{key} {value} is not a multiple of {site}tensor_parallel {tensor}; change one of them "
                f"({nearest_multiples(value, tensor)} would do)"
            )


def pixel_problems(min_pixels: int, max_pixels: int, patch_size: int, merge_size: int) -> Iterator[str]:
    """Of the bounds that images are scaled to: a picture is at least a token."""
    token = (patch_size * merge_size) ** 2
    if not 0 < min_pixels <= max_pixels or max_pixels < token:
        yield (
            f"vision.min_pixels {min_pixels} and vision.max_pixels {max_pixels}: 0 < min_pixels <= max_pixels and {token} <= "
            f"max_pixels (one token: vision.patch_size {patch_size} x vision.merge_size {merge_size}, squared) is needed"
        )
