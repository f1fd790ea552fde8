"""Which of Megatron's flags a U can honour; the others are refused by name, before anything expensive.

An allow-list: a flag that nobody has thought through for two sites (and each version of Megatron brings some) is refused
and not silently half-honoured. Flags that are not Megatron's at all, a user's own, pass.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Sequence

from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron_lm.flags import SWITCH
from ldt_schedules.megatron_lm.site_arguments import SITE_FOLDER_FLAGS, given_flags

_NETWORK = """
--hidden-size --ffn-hidden-size --num-attention-heads --num-query-groups --group-query-attention --kv-channels
--attention-dropout --hidden-dropout --attention-backend --softmax-type --normalization --norm-epsilon
--apply-layernorm-1p --disable-bias-linear --add-qkv-bias --qk-layernorm --swiglu --quick-geglu --squared-relu
--openai-gelu --glu-linear-offset --activation-func-clamp-value --fp32-residual-connection
--apply-residual-connection-post-layernorm --apply-query-key-layer-scaling --max-position-embeddings
--position-embedding-type --no-position-embedding --use-rotary-position-embeddings --rotary-base --rotary-percent
--rotary-interleaved --rotary-seq-len-interpolation-factor --use-rope-scaling --rope-scaling-factor --rope-type
--make-vocab-size-divisible-by --padded-vocab-size --init-method-std --embedding-init-method-std
--init-method-xavier-uniform --no-initialization --use-cpu-initialization --spec --transformer-impl --use-mcore-models
"""
_ARITHMETIC = """
--fp16 --bf16 --loss-scale --initial-loss-scale --min-loss-scale --loss-scale-window --hysteresis
--attention-softmax-in-fp32 --accumulate-allreduce-grads-in-fp32 --grad-reduce-in-bf16 --fp16-lm-cross-entropy
--disable-bf16-reduced-precision-matmul --deterministic-mode --use-flash-attn --no-masked-softmax-fusion
--no-bias-gelu-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion --no-persist-layer-norm
--no-gradient-accumulation-fusion --cross-entropy-loss-fusion --cross-entropy-fusion-impl --disable-jit-fuser
--no-async-tensor-model-parallel-allreduce --calculate-per-token-loss --recompute-activations --recompute-granularity
--recompute-method --recompute-num-layers --recompute-modules
"""
_TRAINING = """
--micro-batch-size --global-batch-size --rampup-batch-size --train-iters --train-samples --exit-interval
--exit-signal-handler --exit-signal --optimizer --lr --min-lr --lr-decay-style --lr-wsd-decay-style --lr-decay-iters
--lr-decay-samples --lr-wsd-decay-iters --lr-wsd-decay-samples --lr-warmup-fraction --lr-warmup-iters
--lr-warmup-samples --lr-warmup-init --override-opt_param-scheduler --use-checkpoint-opt_param-scheduler
--start-weight-decay --end-weight-decay --weight-decay-incr-style --weight-decay --clip-grad --adam-beta1 --adam-beta2
--adam-eps --sgd-momentum --decoupled-lr --decoupled-min-lr --seed --data-parallel-random-init --te-rng-tracker
--no-check-for-nan-in-loss-and-grad --check-for-large-grads --empty-unused-memory-level --manual-gc
--manual-gc-interval --no-manual-gc-eval --train-sync-interval --eval-iters --eval-interval --skip-train --test-mode
--result-rejected-tracker-filename --rerun-mode
"""
_PARALLEL = """
--distributed-backend --distributed-timeout-minutes --local-rank --use-distributed-optimizer --overlap-grad-reduce
--overlap-param-gather --no-align-grad-reduce --no-align-param-gather --ddp-num-buckets --ddp-bucket-size
--ddp-average-in-collective --ddp-pad-buckets-for-high-nccl-busbw --disable-gloo-process-groups
--no-overlap-p2p-communication --nccl-communicator-config-path --cp-comm-type
"""
_FILES_AND_LOGS = """
--data-path --train-data-path --valid-data-path --test-data-path --data-args-path --per-split-data-args-path
--per-dataset-sequences-path --data-cache-path --split --mock-data --seq-length --num-workers --reset-position-ids
--eod-mask-loss --no-create-attention-mask-in-dataloader --no-mmap-bin-files --num-dataset-builder-threads
--mid-level-dataset-surplus --allow-ambiguous-pad-tokens --dataloader-type --dataloader-fast-cache-load
--dataloader-defer-npy-index-mmap --object-storage-cache-path --fim-data --fim-rate --fim-spm-rate --fim-split-sample
--fim-fragment-rate --fim-no-prefix --fim-prefix-token --fim-middle-token --fim-suffix-token --fim-pad-token
--fim-eod-token --vocab-size --vocab-file --merge-file --vocab-extra-ids --tokenizer-type --tokenizer-model
--tokenizer-metadata --tokenizer-special-tokens --legacy-tokenizer --tiktoken-pattern --tiktoken-num-special-tokens
--tiktoken-special-tokens --tokenizer-sentencepiece-legacy --tokenizer-hf-use-fast
--tokenizer-hf-include-special-tokens --trust-remote-code --save --save-interval --save-retain-interval --load
--finetune --ckpt-step --exit-on-missing-checkpoint --ckpt-format --no-ckpt-fully-parallel-save
--ckpt-fully-parallel-save --ckpt-fully-parallel-load --ckpt-assume-constant-structure --dist-ckpt-strictness
--auto-detect-ckpt-format --use-dist-ckpt --no-save-optim --no-save-rng --no-load-optim --no-load-rng --log-interval
--log-params-norm --log-num-zeros-in-grad --log-throughput --log-progress --timing-log-level --timing-log-option
--tensorboard-dir --tensorboard-log-interval --tensorboard-queue-size --log-timers-to-tensorboard
--no-log-loss-scale-to-tensorboard --log-validation-ppl-to-tensorboard --log-memory-to-tensorboard
--log-world-size-to-tensorboard --log-memory-interval --no-barrier-with-level-1-timing --wandb-project
--wandb-exp-name --wandb-save-dir --wandb-entity --logging-level --no-one-logger --profile --profile-step-start
--profile-step-end --use-pytorch-profiler --profile-ranks --record-memory-history --memory-snapshot-path
"""

HONOURED = frozenset(" ".join((_NETWORK, _ARITHMETIC, _TRAINING, _PARALLEL, _FILES_AND_LOGS)).split())
"""Megatron's flags that mean on two sites what they mean in one world."""

_LAYERS = "the split has its own flag: give --ldt-layers, which reads counts and Megatron's layout language"
_MOE = (
    "experts are not supported yet: they make Megatron's optimizer a chain of several, and a site with experts would join "
    "the gradient norm more often than one without; train a dense model"
)
_FSDP = "head and tail share one DistributedDataParallel at the edge; use --use-distributed-optimizer"
_MASK = (
    "masks and sequence boundaries do not reach the middle layers yet, which attend causally over the whole sequence"
)

_NOTHING_TO_LOAD = (
    "Megatron cannot load a process without parameters, and a cloud stage of --ldt-layers has 0 layers; give it some"
)

REASONS = {
    "--pipeline-model-parallel-layout": _LAYERS,
    "--decoder-first-pipeline-num-layers": _LAYERS,
    "--decoder-last-pipeline-num-layers": _LAYERS,
    "--num-layers-per-virtual-pipeline-stage": _LAYERS,
    "--account-for-embedding-in-pipeline-split": _LAYERS,
    "--account-for-loss-in-pipeline-split": _LAYERS,
    "--num-experts": _MOE,
    "--expert-model-parallel-size": _MOE,
    "--moe-layer-freq": _MOE,
    "--mtp-num-layers": "multi-token prediction needs the embedding in the tail's layers; leave it out",
    "--use-torch-fsdp2": _FSDP,
    "--use-megatron-fsdp": _FSDP,
    "--use-custom-fsdp": _FSDP,
    "--sft": _MASK,
    "--reset-attention-mask": _MASK,
    "--hybrid-context-parallel": _MASK,
    "--yaml-cfg": "both sites are made from the command line; write the arguments there",
    "--use-checkpoint-args": "the checkpoint's parallel sizes would replace the site's own; write the arguments out",
    "--exit-duration-in-mins": "each site would stop by its own clock; use --exit-interval or --exit-signal-handler",
    "--adlr-autoresume": "each site would be resumed on its own; use --exit-signal-handler",
    "--full-validation": "only the edge knows how long the validation set is; give --eval-iters",
    "--multiple-validation-sets": "only the edge knows how many there are; give one",
    "--decrease-batch-size-if-needed": "the sites may have different replica counts and would decrease differently",
    "--iterations-to-skip": "skipping reads batches in every process, and the cloud has none",
    "--inprocess-restart": "a site cannot restart inside a running link",
    "--enable-cuda-graph": "a captured step cannot wait for the other site",
    "--cuda-graph-impl": "a captured step cannot wait for the other site",
}
"""Why, for flags that people are likely to try."""

HONOURED_VALUES = {
    "--optimizer": ("adam", "sgd"),
    "--rerun-mode": ("disabled",),
    "--position-embedding-type": ("learned_absolute", "rope", "none"),
    "--dataloader-type": ("single", "cyclic"),
}
"""Flags of which only these values have been thought through."""


def refuse_what_a_u_cannot_honour(
    others: Sequence[str], megatron_flags: Collection[str], layers: Sequence[int] = ()
) -> None:
    """Check the arguments that go through to Megatron.

    Args:
        others: the command line without what `flags.parse` took.
        megatron_flags: every flag that this version of Megatron knows.
        layers: of head, cloud stages and tail.

    Raises:
        ConfigError: with one line for each flag that cannot be honoured.
    """
    given = given_flags(others)
    problems = list(_problems(given, megatron_flags))
    if 0 in layers[1:-1]:
        problems += [f"{flag}: {_NOTHING_TO_LOAD}" for flag in SITE_FOLDER_FLAGS if flag in given]
    if problems:
        raise ConfigError(
            f"with {SWITCH} these arguments cannot be honoured:\n  " + "\n  ".join(problems) + "\nleave them out"
        )


def _problems(given: dict[str, str | None], megatron_flags: Collection[str]) -> Iterator[str]:
    for flag, value in given.items():
        if flag.startswith("--ldt-"):
            near = difflib.get_close_matches(flag, ["--ldt-layers", "--ldt-link", "--ldt-site", "--ldt-plan"], n=1)
            yield f"{flag}: there is no such flag" + (f"; did you mean {near[0]}?" if near else "")
        elif flag in HONOURED_VALUES and value not in HONOURED_VALUES[flag]:
            yield f"{flag} {value}: of its values a split model can have {', '.join(HONOURED_VALUES[flag])}"
        elif flag in REASONS:
            yield f"{flag}: {REASONS[flag]}"
        elif flag in megatron_flags and flag not in HONOURED:
            yield f"{flag}: nobody has checked what it means on two sites"
