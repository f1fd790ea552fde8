"""An unsplit run of Megatron-LM on a CPU, the reference of the tests: no patch of a split model is applied.

With LDT_TEST_KEYS=layer its checkpoints have a key for each layer, as stock Megatron writes them for models whose layers
differ; such a checkpoint both sites of a split model can read.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from typing import Any

from ldt_schedules.megatron_lm.script import prepare_script, run_script


def main() -> None:
    prepare_script(sys.argv[1], sys.argv[2:])
    from ldt_schedules.megatron_lm.cpu import prepare_for_cpu

    prepare_for_cpu()
    if os.environ.get("LDT_TEST_PATCHES") != "applied":
        _without_patches_of_a_split_model()
    if os.environ.get("LDT_TEST_KEYS") == "layer":
        _a_key_for_each_layer()
        _write_with_a_new_torch()
    run_script(sys.argv[0])


def _without_patches_of_a_split_model() -> None:
    """What is left is the CPU adaptor and, of the others, that a GPU is not demanded."""
    import megatron.training.initialize as initialize
    import megatron.training.training as training

    from patches import manager, megatron_core, megatron_training

    manager.revert((*megatron_core.PATCHES, *megatron_training.PATCHES))
    original = initialize.initialize_megatron

    def without_cuda(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **{**kwargs, "allow_no_cuda": True})

    training.initialize_megatron = without_cuda


def _a_key_for_each_layer() -> None:
    from megatron.core.transformer.transformer_block import TransformerBlock

    original = TransformerBlock.sharded_state_dict

    def sharded_state_dict(self: Any, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        return original(self, prefix, sharded_offsets, {**(metadata or {}), "non_homogeneous_layers": True})

    TransformerBlock.sharded_state_dict = sharded_state_dict


def _write_with_a_new_torch() -> None:
    """megatron-core 0.12 writes checkpoints with a function of torch that has one parameter more since torch 2.8."""
    import megatron.core
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    write = filesystem_async._write_item
    if megatron.core.__version__.startswith("0.12") and "serialization_format" in inspect.signature(write).parameters:
        from torch.distributed.checkpoint.filesystem import SerializationFormat

        as_before = {"serialization_format": SerializationFormat.TORCH_SAVE}
        filesystem_async._write_item = functools.partial(write, **as_before)


if __name__ == "__main__":
    main()
