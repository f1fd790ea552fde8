"""The sizes of a model from which a table knows the shape of every tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ldt_schedules.errors import ConfigError


@dataclass(frozen=True)
class VisionSizes:
    """Of a vision encoder and its projector.

    Attributes:
        patch_size: pixels of a patch's side.
        temporal_patch_size: frames of a patch.
        merge_size: patches of a side that become one token.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    in_channels: int = 3

    @property
    def qkv_size(self) -> int:
        return 3 * self.hidden_size

    @property
    def merged_size(self) -> int:
        """Width of the patches that become one token, put beside each other."""
        return self.hidden_size * self.merge_size**2


@dataclass(frozen=True)
class Sizes:
    """Of the whole model, before any parallelism.

    Attributes:
        head_dim: width of a head.
        vocab_size: rows of the embedding in the Hugging Face directory.
        padded_vocab_size: rows of the embedding in Megatron's model, a multiple of its tensor-parallel size.
        tied: the output layer uses the embedding's weight.
        vision: None of a model for text alone.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    padded_vocab_size: int
    tied: bool = False
    vision: VisionSizes | None = None

    def __post_init__(self) -> None:
        if self.padded_vocab_size < self.vocab_size:
            raise ConfigError(
                f"the embedding has {self.padded_vocab_size} rows, the Hugging Face directory's {self.vocab_size}; "
                f"give the model at least {self.vocab_size}"
            )

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_size(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return self.num_query_groups * self.head_dim

    @classmethod
    def of(cls, settings: Mapping[str, Any], padded_vocab_size: int | None = None) -> Sizes:
        """From what `Architecture.settings` gives.

        Args:
            padded_vocab_size: rows of Megatron's embedding; None: as many as the directory's.

        Raises:
            ConfigError: fewer rows than the directory's embedding has.
        """
        model, vision = settings["model"], settings.get("vision")
        vocab_size = settings["vocab_size"]
        shared = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
        patches = ("patch_size", "temporal_patch_size", "merge_size")
        return cls(
            **{key: model[key] for key in shared},
            num_query_groups=model["num_query_groups"],
            head_dim=model.get("head_dim") or model["hidden_size"] // model["num_attention_heads"],
            vocab_size=vocab_size,
            padded_vocab_size=vocab_size if padded_vocab_size is None else padded_vocab_size,
            tied=model["tie_embeddings"],
            vision=VisionSizes(**{key: vision[key] for key in (*shared, *patches)}) if vision else None,
        )
