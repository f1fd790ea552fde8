"""The thinker of Qwen2.5-Omni cut into six stages for a pipeline with three roots, one stage for each rank.

    audio  (0) --+
    vision (1) --+--> join (3) --> middle (4) --> last (5)
    text   (2) --+

The model is the one in transformers, small and with random weights. A stage holds some of its modules, the very
objects and under their names in the whole model, so a stage's `named_parameters()` and `state_dict()` are a part of the
whole model's. Ranks share nothing but what one stage returns and the next takes:

    root audio     input_features, feature_attention_mask                             -> features
    root vision    pixel_values, image_grid_thw                                       -> features
    root text      input_ids, attention_mask, image_grid_thw or not, audio_lengths or not
                                  -> (embeddings, audio_mask, image_mask, attention_mask, position_ids)
    join           audio or None, vision or None, text                                -> (hidden, mask, position_ids)
    middle         (hidden, mask, position_ids)                                       -> (hidden, mask, position_ids)
    last           (hidden, mask, position_ids)                                       -> logits

Roots are called with keywords, the others with one positional argument for each stage that feeds them. Of each tuple
only the first tensor is floating and has a gradient.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import (
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2_5OmniThinkerModel,
)
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import create_causal_mask

STAGES = ("audio", "vision", "text", "join", "middle", "last")
HIDDEN_SIZE = 64
VOCABULARY = 200
# The highest ids of the vocabulary, as in the tokenizer of the model; ordinary tokens are those below them.
SPECIAL_TOKENS = {
    "audio_start_token_id": 193,
    "audio_token_index": 194,
    "audio_end_token_id": 195,
    "vision_start_token_id": 196,
    "image_token_index": 197,
    "video_token_index": 198,
    "vision_end_token_id": 199,
}

TextOutput = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Carried = tuple[Tensor, Tensor, Tensor]


def tiny_config() -> Qwen2_5OmniThinkerConfig:
    """Two layers in each tower and six in the decoder, everything else of the architecture as in the large model.

    The weights are drawn wider than a large model's (0.1 instead of 0.02): at this width attention would otherwise be
    all but uniform, and a wrong position or mask would hardly show.
    """
    audio = {"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64, "d_model": 32}
    vision = {"depth": 2, "num_heads": 4, "hidden_size": 32, "intermediate_size": 64, "fullatt_block_indexes": [1]}
    text = {"num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}
    # Half a head's width of 16, divided among time, height and width.
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    wide = {"initializer_range": 0.1}
    return Qwen2_5OmniThinkerConfig(
        # Chunks of 20 mel frames and windows of 2 x 2 merged patches: small samples still have several of each.
        audio_config={**audio, **wide, "num_mel_bins": 16, "n_window": 10, "output_dim": HIDDEN_SIZE},
        vision_config={**vision, **wide, "patch_size": 4, "window_size": 16, "out_hidden_size": HIDDEN_SIZE},
        text_config={
            **text,
            **wide,
            "hidden_size": HIDDEN_SIZE,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 1024,
            "rope_parameters": rope,
            "tie_word_embeddings": False,
        },
        **wide,
        **SPECIAL_TOKENS,
        user_token_id=1,
        tie_word_embeddings=False,
        # Eager attention casts to float32 before its softmax. The lowest float64, its mask, becomes -inf there, and a
        # padding token on the left, which may look at nothing, becomes NaN.
        attn_implementation="sdpa",
    )


def build(seed: int, dtype: torch.dtype = torch.float32) -> Qwen2_5OmniThinkerForConditionalGeneration:
    """The whole model, the same on every rank that gives the same seed; the caller's random state is left alone.

    Weights are drawn in float32 and then cast, so the float64 model is the float32 model.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5OmniThinkerForConditionalGeneration(tiny_config())
    return model.to(dtype)


def stages(model: Qwen2_5OmniThinkerForConditionalGeneration) -> list[Stage]:
    """Cut the model: six modules in the order of `STAGES`, which share its parameters and keep no other part of it."""
    count = len(model.model.language_model.layers)
    first, second = count // 3, 2 * count // 3
    return [
        AudioRoot(model),
        VisionRoot(model),
        TextRoot(model),
        Join(model, range(first)),
        Middle(model, range(first, second)),
        Last(model, range(second, count)),
    ]


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of each token given those before it, over the labels that are not -100; a scalar in float32.

    The library's own function, which casts to float32 whatever the dtype of the logits: with anything else this could
    not equal the loss that the whole model reports.

    Args:
        logits: `[b, s, vocabulary]`.
        labels: `[b, s]`, not shifted.
    """
    return ForCausalLMLoss(logits, labels, vocab_size=logits.shape[-1])


class Stage(nn.Module):
    """Some modules of the whole model under the names that they have there."""

    def __init__(self, whole: nn.Module, paths: Iterable[str]) -> None:
        super().__init__()
        for path in paths:
            *parents, leaf = path.split(".")
            parent: nn.Module = self
            for name in parents:
                if not hasattr(parent, name):
                    parent.add_module(name, nn.Module())
                parent = getattr(parent, name)
            parent.add_module(leaf, whole.get_submodule(path))


class AudioRoot(Stage):
    """Rank 0: the audio tower."""

    def __init__(self, whole: Qwen2_5OmniThinkerForConditionalGeneration) -> None:
        super().__init__(whole, ["model.audio_tower"])

    def forward(self, input_features: Tensor, feature_attention_mask: Tensor) -> Tensor:
        """The clips of a microbatch, one after the other without their padding.

        Args:
            input_features: `[clips, mel bins, frames]`, padded to the longest clip.
            feature_attention_mask: `[clips, frames]`, 0 where a frame is padding.

        Returns:
            `[audio tokens, hidden]`.
        """
        # Of its own class the library's method needs the tower only, and the tower is where it expects it.
        return Qwen2_5OmniThinkerModel.get_audio_features(
            self.model, input_features, feature_attention_mask, return_dict=True
        ).last_hidden_state


class VisionRoot(Stage):
    """Rank 1: the vision tower with its patch merger."""

    def __init__(self, whole: Qwen2_5OmniThinkerForConditionalGeneration) -> None:
        super().__init__(whole, ["model.visual"])

    def forward(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        """The images of a microbatch, one after the other.

        Args:
            pixel_values: `[patches, values of a patch]`, all images together.
            image_grid_thw: `[images, 3]`, the patches of each image in time, height and width.

        Returns:
            `[image tokens, hidden]`; 2 x 2 patches make a token.
        """
        images = Qwen2_5OmniThinkerModel.get_image_features(self.model, pixel_values, image_grid_thw, return_dict=True)
        return torch.cat(images.pooler_output)


class TextRoot(Stage):
    """Rank 2: the token embeddings, and all that depends on the token ids, so that these need not leave the rank."""

    # Borrowed: they use the configuration and none of the model's modules.
    get_rope_index = Qwen2_5OmniThinkerModel.get_rope_index
    get_llm_pos_ids_for_vision = Qwen2_5OmniThinkerModel.get_llm_pos_ids_for_vision

    def __init__(self, whole: Qwen2_5OmniThinkerForConditionalGeneration) -> None:
        super().__init__(whole, ["model.language_model.embed_tokens"])
        self.config = whole.config
        self.spatial_merge_size = whole.spatial_merge_size

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        image_grid_thw: Tensor | None = None,
        audio_lengths: Tensor | None = None,
    ) -> TextOutput:
        """Embeddings, where the other roots' features belong in them, and every token's position.

        Args:
            input_ids: `[b, s]` with a placeholder for each audio and image token.
            attention_mask: `[b, s]`, 0 where a token is padding.
            image_grid_thw: `[images, 3]`, as the vision root has it; None without images.
            audio_lengths: `[clips]`, mel frames of each clip; None without audio.

        Returns:
            embeddings `[b, s, hidden]`, audio and image mask `[b, s]` (bool, True at placeholders), `attention_mask`
            and position ids `[3, b, s]`.
        """
        embeddings = self.model.language_model.embed_tokens(input_ids)
        audio_mask = input_ids == self.config.audio_token_id
        image_mask = input_ids == self.config.image_token_id
        position_ids, _ = self.get_rope_index(
            input_ids, image_grid_thw=image_grid_thw, attention_mask=attention_mask, audio_seqlens=audio_lengths
        )
        # Without images the three rows are one row's memory, which no transport could send.
        return embeddings, audio_mask, image_mask, attention_mask, position_ids.contiguous()


class DecoderStage(Stage):
    """Decoder layers; the rotary embedding and the mask are made anew on each rank, they have no parameters."""

    def __init__(self, whole: Qwen2_5OmniThinkerForConditionalGeneration, layers: range, *others: str) -> None:
        prefix = "model.language_model"
        super().__init__(whole, [f"{prefix}.rotary_emb", *(f"{prefix}.layers.{index}" for index in layers), *others])
        self.config = whole.model.language_model.config
        assert set(self.config.layer_types) == {"full_attention"}, "the stages make one mask for all their layers"

    def decode(self, hidden: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        """Run this stage's layers.

        Args:
            hidden: `[b, s, hidden]`.
            attention_mask: `[b, s]`, 0 where a token is padding.
            position_ids: `[3, b, s]`.

        Returns:
            `[b, s, hidden]`.
        """
        decoder = self.model.language_model
        rotary = decoder.rotary_emb(hidden, position_ids)
        mask = create_causal_mask(
            config=self.config, inputs_embeds=hidden, attention_mask=attention_mask, past_key_values=None
        )
        for layer in decoder.layers.children():
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
        return hidden


class Join(DecoderStage):
    """Rank 3: puts the features of the other modalities in their places; the first third of the decoder."""

    def forward(self, audio: Tensor | None, vision: Tensor | None, text: TextOutput) -> Carried:
        """Merge and decode.

        Args:
            audio: `[audio tokens, hidden]`, or None when the microbatch has no audio.
            vision: `[image tokens, hidden]`, or None when it has no image.
            text: what the text root returned.

        Returns:
            hidden states `[b, s, hidden]`, attention mask `[b, s]`, position ids `[3, b, s]`.
        """
        embeddings, audio_mask, image_mask, attention_mask, position_ids = text
        # In the whole model's order: audio, then images.
        embeddings = _put_in_place(embeddings, audio_mask, audio, "audio")
        embeddings = _put_in_place(embeddings, image_mask, vision, "image")
        return self.decode(embeddings, attention_mask, position_ids), attention_mask, position_ids


class Middle(DecoderStage):
    """Rank 4: the second third of the decoder."""

    def forward(self, carried: Carried) -> Carried:
        """Hidden states `[b, s, hidden]`, attention mask `[b, s]` and position ids `[3, b, s]`, in and out."""
        hidden, attention_mask, position_ids = carried
        return self.decode(hidden, attention_mask, position_ids), attention_mask, position_ids


class Last(DecoderStage):
    """Rank 5: the last third of the decoder, the final norm and the projection to the vocabulary."""

    def __init__(self, whole: Qwen2_5OmniThinkerForConditionalGeneration, layers: range) -> None:
        super().__init__(whole, layers, "model.language_model.norm", "lm_head")

    def forward(self, carried: Carried) -> Tensor:
        """Logits `[b, s, vocabulary]`, from what `Middle` returned."""
        return self.lm_head(self.model.language_model.norm(self.decode(*carried)))


def _put_in_place(embeddings: Tensor, mask: Tensor, features: Tensor | None, name: str) -> Tensor:
    """`embeddings` `[b, s, hidden]` with `features` `[tokens, hidden]` where `mask` `[b, s]` is True.

    Raises:
        ValueError: there are more or fewer features than placeholders. `masked_scatter` itself would drop the surplus
            in silence, and the features of another microbatch might go unnoticed.
    """
    places, found = int(mask.sum()), 0 if features is None else len(features)
    if places != found:
        raise ValueError(f"{places} {name} placeholders in the text, and {found} {name} tokens came for them")
    if features is None:
        return embeddings
    return embeddings.masked_scatter(mask.unsqueeze(-1), features.to(embeddings.dtype))
