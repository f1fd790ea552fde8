"""Tiny models of text as transformers makes and writes them, and what transformers computes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.parity.case import batches

VOCABULARY = 168
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn, betas": {**YARN, "beta_fast": 4.0, "beta_slow": 0.5, "attention_factor": 1.3},
}
_OWN: dict[str, dict[str, Any]] = {"Qwen2": {}, "Qwen3": {"head_dim": 12}, "Llama": {}}
ARCHITECTURES = tuple(_OWN)
"""Of transformers' `<name>Config` and `<name>ForCausalLM`. A head of Qwen3 is wider than hidden_size / heads, 8."""


def config_of(architecture: str, tied: bool = False, rope: str = "default", theta: float = 1e4, **more: Any) -> Any:
    import transformers

    given = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 256,
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": tied,
        "rope_parameters": {"rope_theta": theta, **ROPES[rope]},
        **_OWN[architecture],
        **more,
    }
    return getattr(transformers, f"{architecture}Config")(**given)


def make(
    path: Path, architecture: str, *, dtype: torch.dtype = torch.float32, shard: str | None = None, **config: Any
) -> Path:
    """Random weights, norms and biases too, saved by transformers."""
    import transformers

    torch.manual_seed(5)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config_of(architecture, **config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.25 * torch.randn_like(parameter) + (1.0 if "norm" in name else 0.0))
    options: dict[str, Any] = {} if shard is None else {"max_shard_size": shard}
    model.to(dtype).save_pretrained(path, **options)
    return path


def _keep_float64() -> None:
    """transformers rounds to float32 in norms, and where YaRN lengthens rotated queries and keys, also in a float64 model.

    A comparison at 1e-9 would end there. So both are written anew, in the dtype that they are given; the angles stay float32.
    """
    from transformers.models.llama import modeling_llama
    from transformers.models.qwen2 import modeling_qwen2
    from transformers.models.qwen3 import modeling_qwen3

    def norm(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def angles(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        half = position_ids[..., None].float() * self.inv_freq.float()
        whole = torch.cat([half, half], dim=-1)
        return whole.cos().to(x.dtype) * self.attention_scaling, whole.sin().to(x.dtype) * self.attention_scaling

    for name, module in {"Llama": modeling_llama, "Qwen2": modeling_qwen2, "Qwen3": modeling_qwen3}.items():
        getattr(module, f"{name}RMSNorm").forward = norm
        getattr(module, f"{name}RotaryEmbedding").forward = angles


def _model(folder: str, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")


@dataclass(frozen=True)
class Computed:
    """What transformers computes on `batch()`.

    Attributes:
        logits: `[b, s, vocabulary]` of each model.
        loss, gradients: of the model that learns, by its own names.
    """

    logits: list[np.ndarray]
    loss: float
    gradients: dict[str, np.ndarray]


def compute(folders: list[str], learning: str, precision: str) -> Computed:
    """In a process of its own: float64 changes transformers."""
    if precision == "fp64":
        _keep_float64()
    dtype, given = {"fp32": torch.float32, "fp64": torch.float64}[precision], batch()
    with torch.no_grad():
        found = [_model(one, dtype)(given["tokens"]).logits.double().numpy() for one in folders]
    model = _model(learning, dtype)
    logits = model(given["tokens"]).logits
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), given["labels"], reduction="none")
    loss = (losses * given["loss_mask"]).sum() / given["loss_mask"].sum()
    loss.backward()
    return Computed(found, float(loss), {name: one.grad.numpy() for name, one in model.named_parameters()})


def batch() -> dict[str, torch.Tensor]:
    """Two samples of 12 tokens, `[2, 12]`."""
    return next(batches(0, range(1)))
