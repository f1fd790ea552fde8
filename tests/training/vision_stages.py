"""In a worker: the stages of a vision-language model as they are, counted."""

from __future__ import annotations

from typing import Any

from ldt_schedules.topology import Site
from tests.training.measuring import count, site_world


def measure(
    site: Site, rank: int, cases: dict[str, dict[str, Any]], port: int
) -> dict[str, dict[int, dict[str, float]]]:
    """Of each case and stage of this site: parameters, operations, bytes kept from F to B."""
    from tests.training.test_vision_costs import config_of

    with site_world(config_of().topology, site, rank, port) as place:
        return {name: _stages(config_of(**case), place) for name, case in cases.items()}


def _stages(config: Any, place: Any) -> dict[int, dict[str, float]]:
    from ldt_schedules.training.model import transformer_config
    from ldt_schedules.training.vision_model import vision_language_module
    from ldt_schedules.training.vocabulary import Vocabulary
    from tests.training.test_vision_costs import VOCABULARY

    language = transformer_config(config, config.topology, place.site)
    module: Any = vision_language_module(config, language, place, Vocabulary(VOCABULARY, 258, 259)).train()
    seen: set[int] = set()
    return {number: _counted(config, number, stage, seen) for number, stage in sorted(module.stage_modules.items())}


def _counted(config: Any, number: int, stage: Any, seen: set[int]) -> dict[str, float]:
    own = [p for p in stage.parameters() if id(p) not in seen]  # of a tied output layer the embedding has it
    seen.update(map(id, own))
    given = _input(config, number) if number else None
    if given is not None:
        given.requires_grad_(config.layout.has_backward(number - 1))
    counted = count(stage, given, _microbatch(config), has_backward=config.layout.has_backward(number))
    return {
        "parameters": sum(p.numel() for p in own),
        "trained": sum(p.numel() for p in own if p.requires_grad),
        "weight products": counted.forward,
        "kept": counted.kept,
    }


def _input(config: Any, number: int) -> Any:
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.model.precision]
    if number <= config.lap_layers.joining_stage:
        return torch.randn(200, 1, config.vision.hidden_size, dtype=dtype)
    return torch.randn(config.model.seq_length, 2, config.model.hidden_size, dtype=dtype)


def _microbatch(config: Any) -> dict[str, Any]:
    """Two samples of one picture each, 10 x 12 and 10 x 8 patches, and text."""
    import torch

    samples, sequence = 2, config.model.seq_length
    ids = torch.randint(0, 256, (samples, sequence))
    ids[0, :30] = ids[1, :20] = 258
    return {
        "input_ids": ids,
        "labels": ids.clone(),
        "loss_mask": torch.ones(samples, sequence),
        "segments": torch.zeros(samples, sequence, dtype=torch.int64),
        "position_ids": torch.arange(sequence).expand(3, samples, sequence).contiguous(),
        "pixel_values": torch.randn(200, 1176),
        "grids": torch.tensor([[1, 10, 12], [1, 10, 8]]),
    }
