"""Text to token ids: bytes without any download, or a Hugging Face tokenizer."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from ldt_schedules.errors import ConfigError

HF_EXTRA = "pip install 'ldt-schedules[hf]'"


class Tokenizer(Protocol):
    """`vocab_size` counts every id that `encode` and `eod` can give; `eod` ends a document."""

    vocab_size: int
    eod: int

    def encode(self, text: str) -> np.ndarray:
        """The ids of one document, without `eod`; int64 or smaller."""
        ...


class ByteTokenizer:
    """Each byte of the UTF-8 text is a token, 0..255; 256 ends a document."""

    vocab_size = 257
    eod = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)


class HuggingFaceTokenizer:
    """Whatever `AutoTokenizer` loads from a directory or a model name.

    Raises:
        ConfigError: transformers is not installed, nothing loads under that name, or it has no end token.
    """

    def __init__(self, name: str) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise ConfigError(
                f"data.tokenizer {name!r} needs the package transformers, which is not installed: {HF_EXTRA}, "
                "or set data.tokenizer=bytes"
            ) from None
        try:
            self.inner: Any = AutoTokenizer.from_pretrained(name)
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"data.tokenizer {name!r} is not a directory or name of a Hugging Face tokenizer ({reason}); "
                "data.tokenizer=bytes works without one"
            ) from None
        if self.inner.eos_token_id is None:
            raise ConfigError(f"data.tokenizer {name!r} has no end-of-sequence token, which separates documents")
        self.eod = int(self.inner.eos_token_id)
        self.vocab_size = len(self.inner)

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self.inner(text, add_special_tokens=False)["input_ids"], dtype=np.int32)


def open_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names.

    Raises:
        ConfigError: it cannot be loaded.
    """
    return ByteTokenizer() if name == "bytes" else HuggingFaceTokenizer(name)
