"""From the user's config to the two that are run: what they change, and nothing else.

Dropout is off, because the two runs draw from different generators. The learning rate starts at its peak: a warm-up
starts at 0, where a weight that is never updated would pass. With Adam the peak is at most 1e-4, a usual rate of large
models: what Adam makes of rounding grows with the rate, and with the weights the gradients of the next steps part. In
fp64 nothing is clipped: megatron-core clips no float64. All else, the optimizer too, is the user's.
"""

from __future__ import annotations

from typing import Any

from ldt_schedules.errors import ConfigError
from ldt_schedules.training.config import TrainConfig

_DROPOUTS = ("attention_dropout", "hidden_dropout")
_HIGHEST_ADAM_LR = 1e-4
_NEEDS_TENSOR_PARALLEL = "tp_comm_"
"""So begin the fields of megatron-core's config that it refuses where there is no tensor parallelism."""


def split_config(config: TrainConfig) -> TrainConfig:
    """The run over both sites.

    Raises:
        ConfigError: there is no cloud, hence nothing to verify.
    """
    if config.num_pipeline_ranks == 1:
        raise ConfigError(
            "sites.cloud.pipeline_ranks is 0: the edge is alone, and there is nothing to verify; set it to 1 or more"
        )
    megatron = {**config.model.megatron, **{key: 0.0 for key in _DROPOUTS if key in config.model.megatron}}
    content = config.model_dump()
    content["model"] |= {"dropout": 0.0, "megatron": megatron}
    content["train"] |= {"eval_interval": 0, "trace_iterations": 0, "warmup_iterations": 0}
    # Which samples make a microbatch must not depend on the number of replicas: the other run has one.
    content["train"] |= {"encoder_dp_balance": False, "save_hf": None}
    if config.train.optimizer == "adam":
        content["train"] |= {key: min(content["train"][key], _HIGHEST_ADAM_LR) for key in ("lr", "min_lr")}
    if config.model.precision == "fp64":
        content["train"]["clip_grad"] = 0.0
    return TrainConfig.model_validate(content)


def whole_config(split: TrainConfig) -> TrainConfig:
    """The same model, data and batches in one process; `split` is from `split_config`.

    Its vocabulary is to be padded for `split`'s edge, not for itself: pass that to `open_process`.
    """
    megatron = {k: v for k, v in split.model.megatron.items() if not k.startswith(_NEEDS_TENSOR_PARALLEL)}
    alone: dict[str, Any] = {"edge": {}, "cloud": {"pipeline_ranks": 0}}
    content = split.model_dump()
    content["sites"], content["layers"] = alone, None
    content["schedule"]["table"] = None
    content["model"]["megatron"] = megatron
    content["train"] |= {"distributed_optimizer": False, "overlap_grad_reduce": False}
    return TrainConfig.model_validate(content)
