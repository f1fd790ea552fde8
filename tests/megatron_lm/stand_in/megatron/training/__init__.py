"""A small stand-in of Megatron-LM's `megatron.training`, written from its call contract.

It has what the patches of `patches/megatron_training.py` name, with the parameters of core_v0.16.1, and the order of calls
of the real loop: arguments, world, model, optimizer, data, steps, evaluation. The layers, the parallel groups, the
schedules, DistributedDataParallel and the optimizers are the real ones of megatron-core. So the launcher can be tested
where no checkout is at hand; `test_real_checkout.py` runs the real loop.
"""

from typing import Any

_args: Any = None


def get_args() -> Any:
    assert _args is not None, "arguments are not initialized"
    return _args


def set_args(args: Any) -> None:
    global _args
    _args = args
