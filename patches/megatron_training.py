"""What the U needs of Megatron-LM's training loop. Declarations only: the code is in ldt_schedules.megatron_lm.

Checked on Megatron-LM core_v0.12.1 to core_v0.16.1, whose `megatron.training` has no version of its own: that of
megatron-core counts, and the parameters tell the rest.
"""

from __future__ import annotations

from patches.declaring import megatron
from patches.manager import Patch

_START = (
    "extra_args_provider",
    "args_defaults",
    "ignore_unknown_args",
    "allow_no_cuda",
    "skip_mpu_initialization",
    "get_embedding_ranks",
    "get_position_embedding_ranks",
    "parsed_args",
)
PRETRAIN = (
    "train_valid_test_dataset_provider",
    "model_provider",
    "model_type",
    "forward_step_func",
    "process_non_loss_data_func",
    "extra_args_provider",
    "args_defaults",
    "get_embedding_ranks",
    "get_position_embedding_ranks",
    "non_loss_data_func",
)

PATCHES: tuple[Patch, ...] = (
    megatron(
        "training.initialize:initialize_megatron",
        "megatron_lm.joining:join_after",
        "the link is joined when the site's world is open, and before anything asks which stage this is",
        (_START, (*_START, "store")),
    ),
    megatron(
        "training.training:get_model",
        "megatron_lm.model:get_model_of_site",
        "it asks the user's provider for a whole model, or for stages of one world's pipeline",
        (
            ("model_provider_func", "model_type", "wrap_with_ddp"),
            ("model_provider_func", "model_type", "wrap_with_ddp", "config", "pg_collection"),
        ),
    ),
    megatron(
        "training.training:setup_model_and_optimizer",
        "megatron_lm.joining:agree_after_loading",
        "sites that loaded different iterations would train on, with a plausible loss",
        (
            (
                "model_provider_func",
                "model_type",
                "no_wd_decay_cond",
                "scale_lr_cond",
                "lr_mult",
                "checkpointing_context",
            ),
            ("model_provider_func", "model_type", "checkpointing_context"),
        ),
    ),
    megatron(
        "training.training:build_train_valid_test_data_iterators",
        "megatron_lm.loop:no_data_in_the_cloud",
        "the cloud has no data to open, but must know whether the edge trains, validates and tests",
        (("build_train_valid_test_datasets_provider",),),
    ),
    megatron(
        "training.training:pretrain",
        "megatron_lm.joining:leave_after",
        "a process that ends takes its connections along; it must be the last to need them",
        (PRETRAIN, (*PRETRAIN, "store", "inprocess_call_wrapper")),
    ),
    megatron(
        "training.utils:calc_params_l2_norm",
        "megatron_lm.loop:parameter_norm_of_both_sites",
        "--log-params-norm: the norm of the whole model needs the other site's part",
        (("model", "force_create_fp32_copy"),),
    ),
    megatron(
        "training.dist_signal_handler:DistributedSignalHandler.signals_received",
        "megatron_lm.loop:signals_of_both_sites",
        "--exit-signal-handler: a signal to one site must stop both, at the same iteration",
        (("self",),),
    ),
)
