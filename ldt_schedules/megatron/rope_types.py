"""Which numbers a kind of scaled rotary angles needs; `rotary.py` says what it does with them.

Apart from the formulas, because a config is read without torch.
"""

from __future__ import annotations

SCALING_KEYS: dict[str, tuple[set[str], set[str]]] = {
    "linear": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, set()),
    "yarn": ({"factor", "original_max_position_embeddings"}, {"beta_fast", "beta_slow", "attention_factor"}),
}
"""Type -> keys that it needs, and keys that it may have; named as transformers names them."""
