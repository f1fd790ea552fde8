"""What the workers are forked with: the imports that take seconds."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import megatron.core.distributed
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.models.gpt.gpt_model
    import megatron.core.optimizer
    import megatron.core.pipeline_parallel  # noqa: F401
    import torch  # noqa: F401
    from megatron.core.transformer.moe import moe_utils

# megatron-core 0.16.1 reads this name even where transformer-engine, which defines it, is not installed.
vars(moe_utils).setdefault("te_general_gemm", None)
