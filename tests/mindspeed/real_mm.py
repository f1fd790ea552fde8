"""One process inside a real MindSpeed-MM on a CPU: `python -m tests.mindspeed.real_mm OUT TASK ...`; the answer goes to OUT.

A process of its own, because importing MindSpeed replaces parts of torch. Packages that exist for accelerators only, and
those that the tests do not touch, are fakes; `MINDSPEED_DEPS_PATH` has the others.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.mindspeed import fakes

ACCELERATOR_ONLY = ("torch_npu", "torchair", "acl")
UNTOUCHED = (
    "torchvision",
    "decord",
    "bs4",
    "sentencepiece",
    "pandarallel",
    "beartype",
    "sqlalchemy",
    "sklearn",
    "scipy",
)
KEY = "layerwise_disaggregated_training"
THEIRS = "mindspeed_mm.patchs.layerwise_disaggregated_training"


def fake_what_is_missing() -> None:
    os.environ["LDT_DEVICE"] = "cpu"
    missing = [name for name in UNTOUCHED if importlib.util.find_spec(name) is None]
    fakes.install([*ACCELERATOR_ONLY, *missing])
    sys.argv = [sys.argv[0], "--transformer-impl", "local", "--seq-length", "10"]


def import_in_order() -> Any:
    """As pretrain_vlm.py does; the list manager of MM."""
    fake_what_is_missing()
    importlib.import_module("mindspeed.megatron_adaptor")
    importlib.import_module("mindspeed_mm")
    return importlib.import_module("mindspeed_mm.patchs.patch_manager").PatchesManager


def set_arguments(**changes: Any) -> Any:
    """What MM's patch manager and train step read of the arguments; the key of the model json is set."""
    from megatron.training import global_vars
    from megatron.training.arguments import parse_args

    args = global_vars._GLOBAL_ARGS or parse_args(ignore_unknown_args=True)
    patch = SimpleNamespace(to_dict=lambda: {KEY: True})
    args.mm = SimpleNamespace(model=SimpleNamespace(patch=patch))
    args.data_parallel_size = 1
    for name in ("hetero_parallel", "op_cal_tflops", "profile_npu"):
        setattr(args, name, False)
    for name, value in changes.items():
        setattr(args, name, value)
    global_vars._GLOBAL_ARGS = args
    return args


def theirs_registered() -> list[str]:
    """The paths at which MindSpeed's patch manager holds something of MM's own list."""
    from megatron.training.utils import print_rank_0
    from mindspeed.patch_utils import MindSpeedPatchesManager

    return sorted(
        path
        for path, info in MindSpeedPatchesManager.patches_info.items()
        if any(function.__module__.startswith(THEIRS) for function in (*info.wrappers, info.patch_func) if function)
        or (path.endswith("print_rank_last") and info.patch_func is print_rank_0)
    )


def take_over() -> dict[str, Any]:
    """The key taken over and applied by MM's own manager."""
    lists = import_in_order()
    import torch.distributed
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import schedules
    from mindspeed.patch_utils import MindSpeedPatchesManager
    from mindspeed_mm.patchs import validate_args_patch
    from mindspeed_mm.patchs.layerwise_disaggregated_training import parallel_state_patch

    import patches.mindspeed

    distributed = dict(vars(torch.distributed))
    initialize = parallel_state.initialize_model_parallel
    patches.mindspeed.install()
    patches.mindspeed.install()
    once = len(lists.configs[KEY])
    set_arguments()
    lists.apply_patches_from_config()
    lists.apply_patches_from_config()
    parallel_state_patch.install_ldt_init_model_parallel_patch()
    args = SimpleNamespace(world_size=3, tensor_model_parallel_size=2, data_parallel_size=5)
    for step in (validate_args_patch.pre_validate_args_for_vtp, validate_args_patch.post_validate_args_for_vtp):
        step(args)
    from megatron.core.pipeline_parallel import get_forward_backward_func

    targets = [patch.target.replace(":", ".") for patch in patches.mindspeed.FOR_MM]
    return {
        "registered": once,
        "declared": len(patches.mindspeed.FOR_MM),
        "wrappers": {p: len(MindSpeedPatchesManager.patches_info[p].wrappers) for p in targets},
        "ours at": [p for p in targets if MindSpeedPatchesManager.patches_info[p].final_patch_func is find(p)],
        "marked": [
            patch.target for patch in patches.mindspeed.FOR_MM if patch.target in find(patch.target)._ldt_patches
        ],
        "theirs left": theirs_registered(),
        "by name": get_forward_backward_func is schedules.get_forward_backward_func,
        "args": vars(args),
        "initialize is Megatron's": parallel_state.initialize_model_parallel.__wrapped__ is initialize,
        "distributed changed": [n for n, v in vars(torch.distributed).items() if distributed.get(n) is not v],
    }


def find(target: str) -> Any:
    """What stands at a target, written with a colon or MindSpeed's way."""
    owner, _, name = target.replace(":", ".").rpartition(".")
    module, _, class_name = owner.rpartition(".")
    return getattr(sys.modules[owner] if owner in sys.modules else getattr(sys.modules[module], class_name), name)


def take_back() -> dict[str, Any]:
    """Their list was applied first: it must be gone, and ours lie on Megatron's own functions."""
    lists = import_in_order()
    import torch.distributed
    from megatron.core.optimizer import clip_grads
    from megatron.training import utils

    import patches.mindspeed

    barrier, norm = torch.distributed.barrier, clip_grads.get_grad_norm_fp32
    set_arguments()
    lists.apply_patches_from_config()
    before = theirs_registered()
    replaced = torch.distributed.barrier is not barrier
    patches.mindspeed.install()
    lists.apply_patches_from_config()
    return {
        "before": before,
        "barrier was replaced": replaced,
        "barrier is torch's": torch.distributed.barrier is barrier,
        "left": theirs_registered(),
        "print_rank_last is Megatron's": utils.print_rank_last.__name__,
        "norm wraps Megatron's": clip_grads.get_grad_norm_fp32.__wrapped__ is norm,
    }


def refusal(what: str) -> dict[str, Any]:
    """The message of install() at the wrong moment, or on a Megatron or MM that has changed."""
    if what == "too early":
        fake_what_is_missing()
        importlib.import_module("mindspeed.megatron_adaptor")
    else:
        lists = import_in_order()
        from megatron.core import package_info, parallel_state
        from megatron.core.pipeline_parallel import schedules
        from mindspeed_mm.patchs.layerwise_disaggregated_training import parallel_state_patch

        if what == "too late":
            parallel_state_patch.install_ldt_init_model_parallel_patch()
        elif what == "renamed":
            del schedules.get_forward_backward_func, parallel_state_patch.post_validate_args_for_vtp
            del parallel_state.is_pipeline_last_stage
        elif what == "no key":
            del lists.configs[KEY]
        assert package_info.__version__ == "0.12.1"
    import patches.mindspeed
    from patches import manager

    if what == "version":
        manager._version = lambda package: "0.18.0"
    try:
        patches.mindspeed.install()
    except manager.PatchError as error:
        return {"message": str(error), "applied": manager.applied_targets()}
    return {"message": "accepted", "applied": manager.applied_targets()}


def train(case: Any, global_rank: int, ports: dict[str, int]) -> dict[str, Any]:
    """A rank of a split run, or the whole model: MM's patch manager, then MM's train step, on the same chunks."""
    lists = import_in_order()
    import patches.mindspeed
    from patches import cpu, manager

    manager.apply(cpu.PATCHES)
    patches.mindspeed.install()
    set_arguments()
    lists.apply_patches_from_config()
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
    from megatron.core.timers import Timers
    from megatron.core.utils import get_model_config
    from megatron.training import global_vars
    from mindspeed_mm import training

    from tests.mindspeed.two_laps import run_rank

    case = case_of(case)
    batch = case.num_microbatches * 2
    init_num_microbatches_calculator(global_rank, None, batch, 2, 1)
    global_vars._GLOBAL_TIMERS = Timers(log_level=0, log_option="minmax")

    def train_step(step: Any, forward_step: Any, iterators: list[Any], model: list[Any]) -> Any:
        set_arguments(seq_length=step.seq_length, micro_batch_size=step.micro_batch_size)
        if step.forward_only:
            return None
        config = get_model_config(model[0])
        reduced, skipped, *_ = training.train_step(forward_step, iterators, model, None, None, config, None)
        assert not skipped
        return reduced

    return run_rank(case, global_rank, ports, train_step, evaluate=False)


def vision(case: Any, global_rank: int, ports: dict[str, int]) -> dict[str, Any]:
    """The same with MM's own model and its own forward step."""
    from tests.mindspeed.real_vision import train

    return train(case, global_rank, ports)


def case_of(fields: dict[str, Any]) -> Any:
    """After MindSpeed is imported: the case's module imports Megatron."""
    from tests.mindspeed.two_laps import Case

    return Case(**fields)


def main() -> None:
    out, task, arguments = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    tasks = {"take_over": take_over, "take_back": take_back, "refusal": refusal, "train": train, "vision": vision}
    answer = tasks[task](*arguments)
    Path(out).write_bytes(pickle.dumps(answer))


if __name__ == "__main__":
    main()
