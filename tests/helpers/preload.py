"""What the ranks are forked with: the imports that take seconds, our patches, and nothing that starts a thread.

To apply patches is to look through all that is loaded; in a forked process that copies it, page by page."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch._dynamo  # noqa: F401 - the optimizers load it at their first step
    from megatron.core.transformer.moe import moe_utils

    import ldt_schedules.megatron.world
    import ldt_schedules.training.loop  # noqa: F401
    import patches

# megatron-core 0.16.1 reads this name even where transformer-engine, which defines it, is not installed.
vars(moe_utils).setdefault("te_general_gemm", None)
patches.apply_all()
