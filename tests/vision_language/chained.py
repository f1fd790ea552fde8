"""What workers run for `test_stages.py`: stages chained by hand, frozen parts, recomputation, 16 bits, tensor parallelism."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ldt_schedules.planning.lap_layers import LapLayers, frozen_stages
from ldt_schedules.planning.layout import EDGE_RANK, Layout
from tests.vision_language import tiny

Tensors = dict[str, torch.Tensor]
Result = tuple[torch.Tensor, Tensors]
"""Losses `[b, s]` or logits, and the gradient of each parameter by its name in the whole model."""


def compositions(total: int, parts: int) -> list[tuple[int, ...]]:
    """All tuples of `parts` numbers, 0 or more, that sum to `total`."""
    return [
        tuple(b - a - 1 for a, b in itertools.pairwise((-1, *cuts, total + parts - 1)))
        for cuts in itertools.combinations(range(total + parts - 1), parts - 1)
    ]


def splits(num_ranks: int) -> list[LapLayers]:
    """Every split of the ViT and every split of the language model, in pairs."""
    vision = compositions(tiny.VISION_LAYERS, num_ranks + 1)
    language = compositions(tiny.LANGUAGE_LAYERS, num_ranks + 1)
    return [
        LapLayers(vision[n % len(vision)], language[(n * 7) % len(language)])
        for n in range(max(len(vision), len(language)))
    ]


def whole_step(whole: Any, batch: Tensors) -> Result:
    whole.zero_grad(set_to_none=True)
    losses = whole(batch)
    tiny.masked_mean(losses.float() if losses.dtype is torch.bfloat16 else losses, batch).backward()
    return losses.detach(), {name: p.grad for name, p in tiny.named_parameters(whole) if p.grad is not None}


def chained_step(stages: Sequence[Any], batch: Tensors, layout: Layout) -> Result:
    """Forward over all stages, backward over those that have one; at each boundary a tensor that knows nothing of what
    made it."""
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    cloud = tiny.for_the_cloud(batch)
    edge = layout.stages_on(EDGE_RANK)
    for number, stage in enumerate(stages):
        if number:
            inputs.append(outputs[-1].detach().requires_grad_(layout.has_backward(number - 1)))
            stage.set_input_tensor([inputs[-1]] if number % 2 else inputs[-1])
        with torch.set_grad_enabled(layout.has_backward(number)):
            outputs.append(stage(batch if number in edge else cloud))
    assert all(output._base is None for output in outputs[:-1]), "Megatron cannot free a view"
    tiny.masked_mean(outputs[-1], batch).backward()
    for number, handed_over in reversed(list(enumerate(inputs))):
        if layout.has_backward(number):
            outputs[number].backward(handed_over.grad)
    gradients = {name: p.grad for stage in stages for name, p in tiny.named_parameters(stage) if p.grad is not None}
    return outputs[-1].detach(), gradients


def built(model: Any, layers: LapLayers, weights: Tensors) -> list[Any]:
    from ldt_schedules.megatron.vision_language.stages import build_stage

    return [tiny.load(build_stage(model, layers, stage), weights) for stage in range(layers.num_stages)]


def unsplit(model: Any, weights: Tensors) -> Any:
    from ldt_schedules.megatron.vision_language.stages import UnsplitVisionLanguageModel

    return tiny.load(UnsplitVisionLanguageModel(model), weights)


def differences(mine: Result, reference: Result) -> list[str]:
    """What is not the same bit for bit."""
    if set(mine[1]) != set(reference[1]):
        return sorted(set(mine[1]) ^ set(reference[1]))
    found = [] if torch.equal(mine[0], reference[0]) else ["losses"]
    return found + [name for name, gradient in mine[1].items() if not torch.equal(gradient, reference[1][name])]


def all_splits(rank: int, ports: dict[str, int], num_ranks: int) -> list[str]:
    """The splits of a U of `num_ranks` that are not the whole model; each with two of the batches."""
    tiny.open_world(rank, ports)
    model, weights = tiny.model(), tiny.random_weights()
    batches = [tiny.microbatch(samples) for samples in tiny.BATCHES.values()]
    whole = unsplit(model, weights)
    expected = [whole_step(whole, batch) for batch in batches]
    wrong = []
    for number, layers in enumerate(splits(num_ranks)):
        for which in (0, 1 + number % (len(batches) - 1)):
            mine = chained_step(built(model, layers, weights), batches[which], layers.layout())
            found = differences(mine, expected[which])
            wrong += [f"{layers}, batch {which}: {found}"] if found else []
    return wrong


def tied_and_recomputed(rank: int, ports: dict[str, int]) -> dict[str, list[str]]:
    """Of activation recomputation in both ways, and with dropout, against none; and of a tied model's logits."""
    tiny.open_world(rank, ports)
    weights = tiny.random_weights()
    batch = tiny.microbatch(tiny.BATCHES["padding at both ends"])
    expected = whole_step(unsplit(tiny.model(), weights), batch)
    ways = {
        "full": dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
        "selective": dict(recompute_granularity="selective"),
    }
    found = {}
    layers = LapLayers((1, 2, 1), (1, 1, 1))
    for name, fields in ways.items():
        stages = built(tiny.model(**fields), layers, weights)
        found[name] = differences(chained_step(stages, batch, layers.layout()), expected)
    found["dropout"] = _dropout_comes_again(weights, batch, ways["full"])
    tied = {**weights, "language.output_layer.weight": weights["language.embedding.word_embeddings.weight"]}
    without_labels = {name: value for name, value in batch.items() if name != "labels"}
    same = torch.equal(
        unsplit(tiny.model(tied=True), tied)(without_labels), unsplit(tiny.model(), tied)(without_labels)
    )
    found["tied"] = [] if same else ["logits"]
    return found


def _dropout_comes_again(weights: Tensors, batch: Tensors, recompute: dict[str, Any]) -> list[str]:
    """Attention drops the same when it is computed again, and drops at all."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    results = []
    for fields in (dict(attention_dropout=0.3), dict(attention_dropout=0.3, **recompute), {}):
        model_parallel_cuda_manual_seed(7)
        results.append(whole_step(unsplit(tiny.model(**fields), weights), batch))
    assert not torch.equal(results[0][0], results[2][0])
    return differences(results[0], results[1])


def frozen(rank: int, ports: dict[str, int], parts: tuple[str, ...]) -> list[str]:
    """Of a split model with frozen parts, what differs from the whole one's trainable gradients."""
    from ldt_schedules.megatron.vision_language.description import freeze, part_of

    tiny.open_world(rank, ports)
    model, weights = tiny.model(), tiny.random_weights()
    layers = LapLayers((1, 0, 2, 1), (0, 1, 1, 1))
    layout = layers.layout().freeze(frozen_stages(layers, frozenset(parts)))
    wrong = []
    for name in ("three images", "no image"):
        batch = tiny.microbatch(tiny.BATCHES[name])
        losses, gradients = whole_step(unsplit(model, weights), batch)
        trained = {key: gradient for key, gradient in gradients.items() if part_of(key) not in parts}
        stages = built(model, layers, weights)
        for stage in stages:
            freeze(stage, parts)
        wrong += differences(chained_step(stages, batch, layout), (losses, trained))
    return wrong


def narrowed(rank: int, ports: dict[str, int]) -> dict[str, Any]:
    """bfloat16 through Megatron's Float16Module: chained against whole, and the whole against float32, of their size.

    And which dtypes queries, keys and values have where a layer attends: they were rotated in them.
    """
    from megatron.core.transformer.module import Float16Module

    from ldt_schedules.megatron.chunks import narrowed_stage

    tiny.open_world(rank, ports)
    weights = {name: weight.bfloat16().double() for name, weight in tiny.random_weights().items()}
    batch = tiny.microbatch(tiny.BATCHES["video and images"])
    wide, _ = whole_step(unsplit(tiny.model(), weights), batch)
    model = tiny.model(torch.bfloat16)
    whole = Float16Module(model.language, unsplit(model, weights))
    dtypes = _dtypes_where_attended(whole)
    losses = whole(batch).detach()
    stages: list[Any] = built(model, LapLayers((2, 1, 1), (0, 2, 1)), weights)
    last = len(stages) - 1
    output = None
    for number, stage in enumerate(stages):
        wrapped = narrowed_stage(stage.config, stage, number == 0, number == last)
        # Without a session, which says that this is no last stage, megatron-core 0.12 gives float32: the same numbers.
        wrapped.set_input_tensor(None if output is None else output.bfloat16())
        output = wrapped(batch).detach()
    apart, rounding = (output - losses).abs().max(), (losses - wide).abs().max() / wide.max()
    return {"chained": float(apart), "float32": float(rounding), "dtypes": dtypes}


def _dtypes_where_attended(whole: Any) -> dict[str, set[tuple[str, ...]]]:
    """Filled when `whole` is called: attention class -> dtypes of query, key and value."""
    from ldt_schedules.megatron.segment_attention import SegmentAttention

    found: dict[str, set[tuple[str, ...]]] = {}

    def note(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        names = tuple(str(tensor.dtype).removeprefix("torch.") for tensor in arguments[:3])
        found.setdefault(type(module).__name__, set()).add(names)

    for module in whole.modules():
        if isinstance(module, SegmentAttention):
            module.register_forward_pre_hook(note)
    return found


Alone = tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]
"""Weights by name, and of each batch the gradients by name and, as "logits", the logits `[b, s, vocabulary]`."""


def alone(rank: int, ports: dict[str, int]) -> Alone:
    """What one process gives, in float64; as numpy arrays, which outlive the process."""
    tiny.open_world(rank, ports)
    weights = tiny.random_weights()
    whole = unsplit(tiny.model(torch.float64), weights)
    found = [_logits_and_gradients(whole, tiny.microbatch(s, torch.float64)) for s in tiny.BATCHES.values()]
    return _arrays(weights), [_arrays(one) for one in found]


def _arrays(tensors: Tensors) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def _logits_and_gradients(whole: Any, batch: Tensors) -> Tensors:
    logits = whole({name: value for name, value in batch.items() if name != "labels"}).detach()
    _, gradients = whole_step(whole, batch)
    return {"logits": logits, **{name: gradient.clone() for name, gradient in gradients.items()}}


def tensor_parallel_distances(rank: int, ports: dict[str, int], one_process: Alone) -> dict[str, float]:
    """How far one of two tensor-parallel processes is from its part of `one_process`, over all batches."""
    tiny.open_world(rank, ports, tensor=2)
    weights = {name: torch.from_numpy(array) for name, array in one_process[0].items()}
    whole = unsplit(tiny.model(torch.float64, tensor=2), weights)
    parameters = dict(tiny.named_parameters(whole))
    found: dict[str, float] = {}
    for samples, arrays in zip(tiny.BATCHES.values(), one_process[1], strict=True):
        mine = _logits_and_gradients(whole, tiny.microbatch(samples, torch.float64))
        assert set(mine) == set(arrays)
        for name, value in mine.items():
            expected = torch.from_numpy(arrays[name])
            part = (
                expected.chunk(2, dim=2)[rank] if name == "logits" else tiny.slice_of(name, expected, parameters[name])
            )
            assert value.shape == part.shape
            found[name] = max(found.get(name, 0.0), float((value - part).abs().max()))
    return found
