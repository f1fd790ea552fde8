"""The six stages of the Omni thinker against the whole model in float64, and the samples that both are given.

Stages run as on ranks of their own: every tensor that passes from one to another is cut from its graph, and gradients
are handed back by hand. The same operations in the same order leave no difference at all: logits and losses are
compared bit by bit. For gradients 1e-12 of their largest is allowed, though 0 was measured.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers.models.qwen2_5_omni")

from examples.omni import samples, thinker

SEED = 7
# Microbatch number and what it lacks; number 3 has two rows and three images of three sizes.
CASES = {
    "one row": (0, ()),
    "two rows, several images": (3, ()),
    "no audio": (3, ("audio",)),
    "no image": (3, ("image",)),
    "one row, no audio": (4, ("audio",)),
    "text only": (5, ("audio", "image")),
}
# The tower has it for marks around a clip, and no code of the model reads it.
UNUSED = {"model.audio_tower.audio_bos_eos_token.weight"}


@pytest.fixture(scope="module")
def whole() -> nn.Module:
    return thinker.build(SEED, torch.float64)


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def batch(request: pytest.FixtureRequest) -> samples.Microbatch:
    number, without = request.param
    return samples.microbatch(thinker.tiny_config(), number, without=without)


def tensors(value: Any) -> tuple[Tensor, ...]:
    """What a stage returned, as a tuple."""
    return value if isinstance(value, tuple) else (value,)


def received(value: Any) -> Any:
    """What arrives on another rank: copies without a history, the floating ones wanting gradients."""
    if value is None:
        return None
    copies = tuple(tensor.detach().clone().requires_grad_(tensor.is_floating_point()) for tensor in tensors(value))
    return copies if isinstance(value, tuple) else copies[0]


def hand_back(output: Any, arrived: Any) -> None:
    """The backward of the stage that made `output`, with the gradients of its copies."""
    pairs = [pair for pair in zip(tensors(output), tensors(arrived), strict=True) if pair[0].is_floating_point()]
    torch.autograd.backward([made for made, _ in pairs], [copy.grad for _, copy in pairs])


def forward(stages: list[nn.Module], batch: samples.Microbatch) -> tuple[list[Any], list[Any]]:
    """What each stage returned, and for all but the last what the next stage took in its place."""
    inputs = (batch["audio"], batch["vision"], batch["text"])
    made = [None if given is None else root(**given) for root, given in zip(stages[:3], inputs, strict=True)]
    arrived = [received(output) for output in made]
    made.append(stages[3](*arrived))
    for stage in stages[4:]:
        arrived.append(received(made[-1]))
        made.append(stage(arrived[-1]))
    return made, arrived


def gradients(module: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    """Each parameter's gradient, which is then forgotten."""
    for name, parameter in module.named_parameters():
        yield name, parameter.grad
        parameter.grad = None


def test_stages_are_the_whole_model(whole: nn.Module, batch: samples.Microbatch) -> None:
    expected = whole(**samples.whole_kwargs(batch))
    expected.loss.backward()
    expected_gradients = dict(gradients(whole))

    stages = thinker.stages(whole)
    made, arrived = forward(stages, batch)
    assert torch.equal(made[-1], expected.logits)
    loss = thinker.loss(made[-1], batch["labels"])
    assert torch.equal(loss, expected.loss)

    loss.backward()
    for output, copies in reversed(list(zip(made[:-1], arrived, strict=True))):
        if output is not None:
            hand_back(output, copies)
    for stage in stages:
        for name, gradient in gradients(stage):
            wanted = expected_gradients.pop(name)
            assert (gradient is None) == (wanted is None), name
            if gradient is not None:
                assert (gradient - wanted).abs().max() <= 1e-12 * wanted.abs().max(), name
    assert not expected_gradients


def test_gradients_reach_every_parameter_that_is_used(whole: nn.Module) -> None:
    stages, batch = thinker.stages(whole), samples.microbatch(whole.config, 3)
    made, arrived = forward(stages, batch)
    thinker.loss(made[-1], batch["labels"]).backward()
    for output, copies in reversed(list(zip(made[:-1], arrived, strict=True))):
        hand_back(output, copies)
    without = {name for name, gradient in gradients(whole) if gradient is None or not gradient.any()}
    assert without == UNUSED


def test_stages_divide_the_parameters(whole: nn.Module) -> None:
    stages = thinker.stages(whole)
    assert len(stages) == len(thinker.STAGES) == 6
    held = [(name, parameter) for stage in stages for name, parameter in stage.named_parameters()]
    wanted = dict(whole.named_parameters())
    assert sorted(name for name, _ in held) == sorted(wanted)
    assert all(parameter is wanted[name] for name, parameter in held)
    assert {name for stage in stages for name in stage.state_dict()} == set(whole.state_dict())


@pytest.mark.parametrize("rank", range(6), ids=thinker.STAGES)
def test_a_rank_can_let_go_of_the_rest(rank: int) -> None:
    whole = thinker.build(SEED)
    stages = thinker.stages(whole)
    held = {id(module) for module in stages[rank].modules()}
    others = {name: weakref.ref(module) for name, module in whole.named_modules() if id(module) not in held}
    stage = stages[rank]
    del whole, stages
    gc.collect()
    assert [name for name, other in others.items() if other() is not None] == []
    assert any(True for _ in stage.parameters())


def test_token_ids_stay_with_the_text_root(whole: nn.Module, batch: samples.Microbatch) -> None:
    root = thinker.stages(whole)[2]
    embeddings, audio_mask, image_mask, attention_mask, position_ids = root(**batch["text"])
    ids = batch["text"]["input_ids"]
    assert embeddings.shape == (*ids.shape, thinker.HIDDEN_SIZE) and embeddings.is_floating_point()
    assert audio_mask.dtype == image_mask.dtype == torch.bool
    assert set(attention_mask.unique().tolist()) <= {0, 1}
    assert position_ids.shape == (3, *ids.shape) and position_ids.is_contiguous()
    storage = ids.untyped_storage().data_ptr()
    for tensor in (embeddings, audio_mask, image_mask, attention_mask, position_ids):
        assert tensor.untyped_storage().data_ptr() != storage
        assert tensor.shape != ids.shape or not torch.equal(tensor, ids)
    # What does not depend on the modalities says nothing of the words: others in their place change the embeddings only.
    ordinary = (ids < min(thinker.SPECIAL_TOKENS.values())) & attention_mask.bool()
    other_words = root(**{**batch["text"], "input_ids": torch.where(ordinary, 1, ids)})
    assert not torch.equal(other_words[0], embeddings)
    for other, mine in zip(other_words[1:], (audio_mask, image_mask, attention_mask, position_ids), strict=True):
        assert torch.equal(other, mine)


def test_features_that_are_not_of_this_microbatch_are_refused(whole: nn.Module) -> None:
    stages = thinker.stages(whole)
    made, _ = forward(stages, samples.microbatch(whole.config, 0))
    with pytest.raises(ValueError, match=r"\d+ audio placeholders in the text, and 0 audio tokens"):
        stages[3](None, made[1], made[2])
    with pytest.raises(ValueError, match=r"\d+ image placeholders in the text, and \d+ image tokens"):
        stages[3](made[0], made[1][1:], made[2])


def test_build_is_repeatable_and_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    first, second = thinker.build(SEED), thinker.build(SEED)
    assert torch.equal(state, torch.get_rng_state())
    assert first.lm_head.weight is not first.model.language_model.embed_tokens.weight
    for (name, mine), other in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(mine, other), name
    assert not torch.equal(first.lm_head.weight, thinker.build(SEED + 1).lm_head.weight)


def test_microbatches_are_repeatable_and_differ_in_size() -> None:
    config = thinker.tiny_config()
    batches = [samples.microbatch(config, number) for number in range(8)]
    for name in ("input_features", "pixel_values", "input_ids"):
        shapes = {tuple(samples.whole_kwargs(batch)[name].shape) for batch in batches}
        assert len(shapes) >= 6, name
    assert {len(batch["labels"]) for batch in batches} == {1, 2}
    assert len(batches[3]["vision"]["image_grid_thw"].unique(dim=0)) == 3
    assert (batches[3]["text"]["attention_mask"] == 0).any()
    again = samples.whole_kwargs(samples.microbatch(config, 3))
    for name, tensor in samples.whole_kwargs(batches[3]).items():
        assert torch.equal(torch.as_tensor(tensor), torch.as_tensor(again[name])), name
    assert not torch.equal(batches[0]["labels"], samples.microbatch(config, 0, seed=1)["labels"])


def test_what_a_microbatch_lacks() -> None:
    config = thinker.tiny_config()
    silent = samples.microbatch(config, 3, without=("audio",))
    assert silent["audio"] is None and "audio_lengths" not in silent["text"]
    assert torch.equal(silent["vision"]["pixel_values"], samples.microbatch(config, 3)["vision"]["pixel_values"])
    blind = samples.microbatch(config, 3, without=("image",))
    assert blind["vision"] is None and "image_grid_thw" not in blind["text"]
    assert (blind["labels"] != samples.NO_LABEL).any(dim=-1).all()
    with pytest.raises(ValueError, match="video"):
        samples.microbatch(config, 3, without=("video",))
