"""What each stage of a vision-language model computes and keeps, part by part.

    stage 0       patch embedding, ViT layers              stages 1..P-1    ViT layers
    stage P       ViT layers, projector, language layers   stages P+1..     language layers
    stage 2P      language layers, norm and output layer

    layer             as `cost_model` has it, with attention inside segments: scores and scores times values, 4 n k h for n
                      rows that attend to k rows on average; I does it once more by half (`vision_shapes`)
    patch embedding   2 n (C T P P) h_v              no I: nobody needs the gradient of pixels
    projector         2 n / m^2 (w w + w h)          w = m^2 h_v, m = merge_size
    output layer      2 s b h V

A part that is frozen has no W. Where nothing learns before it either, it has no backward at all and keeps nothing; else it
passes the gradient on, and keeps what that takes. (The first part that learns needs no gradient of its input, which would
save a little of its I; that is counted.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ldt_schedules.planning.layout import EDGE_RANK
from ldt_schedules.topology import Site
from ldt_schedules.training.config import TrainConfig
from ldt_schedules.training.stage_work import StageWork
from ldt_schedules.training.vision_parts import merged_width, patch_values
from ldt_schedules.training.vision_shapes import Patches, SegmentShapes


@dataclass(frozen=True, slots=True)
class _Part:
    """Of one stage, as it would be if everything learned.

    Attributes:
        name: as `vision.frozen` has it.
        keeps: bytes from F to B, on one tensor-parallel process.
        passes: the same where it is frozen and passes the gradient on.
        reads: what first reads the part's input: "layer", "norm", or None where that keeps nothing of it.
    """

    name: str
    work: StageWork
    keeps: float
    passes: float
    reads: str | None


def vision_stage_work(config: TrainConfig, vocab_size: int) -> tuple[StageWork, ...]:
    """Of each stage, 0 first. `vocab_size` is the padded one."""
    return tuple(
        sum((part.work for part in parts), StageWork()) for parts in _as_trained(config, _stages(config, vocab_size))
    )


def vision_activation_bytes(config: TrainConfig, vocab_size: int) -> tuple[float, ...]:
    """What one microbatch keeps in each stage from F to B, on one tensor-parallel process. Padded `vocab_size`."""
    kept = []
    for stage, parts in enumerate(_as_trained(config, _stages(config, vocab_size))):
        # The executor holds the input until B; a first part that keeps it anyway does not make it two.
        first = parts[0] if parts and parts[0].keeps else None
        holds = stage > 0 and config.layout.has_backward(stage) and not _keeps_input(config, stage, first)
        held = _input(config, stage).stream if holds else 0.0
        kept.append(held + sum(part.keeps for part in parts))
    return tuple(kept)


def vision_messages(config: TrainConfig) -> tuple[tuple[int, int, float, float], ...]:
    """`Costs.sizes` of the first lap, `(stage, consumer, bytes forward, bytes backward)`; the second lap's are a text
    model's."""
    size = SegmentShapes.of_vit(config, Site.EDGE).message
    return tuple((stage, stage + 1, size, size) for stage in range(config.lap_layers.joining_stage))


def vision_workspace(config: TrainConfig, site: Site, vocab_size: int) -> float:
    """What is needed once, whatever is in flight: the tower that needs more. `vocab_size` 0: there is no output layer."""
    recompute = config.train.recompute
    language, vit = SegmentShapes.of_language(config, site), SegmentShapes.of_vit(config, site)
    return max(language.workspace(recompute, vocab_size), vit.workspace(recompute, 0))


def _as_trained(config: TrainConfig, stages: list[list[_Part]]) -> Iterator[list[_Part]]:
    """The parts without what nobody needs of them, because they or all before them are frozen."""
    learns_before = False
    for parts in stages:
        found = []
        for part in parts:
            learns = part.name not in config.vision.frozen
            work, keeps = part.work, part.keeps
            if not learns:
                work, keeps = replace(work, weight_grad=0.0), part.passes
            if not learns and not learns_before:
                work, keeps = replace(work, input_grad=0.0), 0.0
            found.append(replace(part, work=work, keeps=keeps))
            learns_before = learns_before or learns
        yield found


def _keeps_input(config: TrainConfig, stage: int, first: _Part | None) -> bool:
    if first is None or first.reads is None:
        return False
    recomputed = first.reads == "layer" and config.train.recompute == "full"
    return recomputed or not _input(config, stage).norm_casts


def _input(config: TrainConfig, stage: int) -> SegmentShapes:
    site = _site_of(config, stage)
    is_patches = stage <= config.lap_layers.joining_stage
    return SegmentShapes.of_vit(config, site) if is_patches else SegmentShapes.of_language(config, site)


def _site_of(config: TrainConfig, stage: int) -> Site:
    return Site.EDGE if config.layout.stages[stage].ranks[0] == EDGE_RANK else Site.CLOUD


def _stages(config: TrainConfig, vocab_size: int) -> list[list[_Part]]:
    """The parts of each stage, in the order of a forward; those without layers are left out."""
    laps, starts = config.lap_layers, 0
    found: list[list[_Part]] = []
    for stage in range(laps.num_stages):
        vision, language = laps.layers_of(stage)
        site = _site_of(config, stage)
        parts = [_patch_embedding(config, site)] if stage == 0 else []
        parts += [_vit_layer(config, site, number) for number in range(starts, starts + vision)]
        starts += vision
        if stage == laps.joining_stage:
            parts += [_projector(config, site), _text_embedding(config, site)]
        parts += [_language_layer(config, site)] * language
        if stage == laps.num_stages - 1:
            parts.append(_output(config, site, vocab_size))
        found.append(parts)
    return found


def _patch_embedding(config: TrainConfig, site: Site) -> _Part:
    shapes, values = SegmentShapes.of_vit(config, site), patch_values(config)
    linear = 2.0 * shapes.tokens * values * shapes.model.hidden_size
    return _Part("vit", StageWork(linear, 0.0, linear), shapes.tokens * values * shapes.element, 0.0, None)


def _vit_layer(config: TrainConfig, site: Site, number: int) -> _Part:
    patches = Patches.of(config)
    attended = patches.in_frame if number in config.vision.full_attention_layers else patches.in_window
    return _layer(config, "vit", SegmentShapes.of_vit(config, site), attended)


def _language_layer(config: TrainConfig, site: Site) -> _Part:
    return _layer(config, "language", SegmentShapes.of_language(config, site), (config.model.seq_length + 1) / 2)


def _layer(config: TrainConfig, name: str, shapes: SegmentShapes, attended: float) -> _Part:
    recompute = config.train.recompute
    linear, core = shapes.layer_work(attended)
    again = {"none": 0.0, "selective": core, "full": linear + core}[recompute] + core / 2
    work = StageWork.of(linear, core, again)
    return _Part(name, work, shapes.layer(recompute), shapes.passing_layer(recompute), "layer")


def _projector(config: TrainConfig, site: Site) -> _Part:
    shapes, width = SegmentShapes.of_vit(config, site), merged_width(config)
    tokens = shapes.tokens / config.vision.merge_size**2
    linear = 2.0 * tokens * width * (width + config.model.hidden_size)
    gelu = tokens * width * shapes.element / shapes.tensor  # its input, and as much its output
    # Where no layer is before it in its stage, Megatron's empty block has copied what the norm reads: it keeps the copy.
    work = StageWork(linear, linear, linear)
    return _Part("projector", work, shapes.norm + 2 * gelu, shapes.passing_norm + gelu, None)


def _text_embedding(config: TrainConfig, site: Site) -> _Part:
    mask = SegmentShapes.of_language(config, site).dropout_mask
    return _Part("language", StageWork(), mask, mask, None)


def _output(config: TrainConfig, site: Site, vocab_size: int) -> _Part:
    shapes = SegmentShapes.of_language(config, site)
    linear = 2.0 * shapes.tokens * config.model.hidden_size * vocab_size
    work, logits = StageWork(linear, linear, linear), shapes.logits(vocab_size)
    return _Part("language", work, shapes.norm + logits, shapes.passing_norm + logits, "norm")
