"""Our declared patches against the Megatron that is installed, in a process of their own."""

import importlib

_MODULES = (
    "megatron.core.pipeline_parallel",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.transformer.transformer_block",
    "megatron.core.transformer.transformer_layer",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.optimizer.optimizer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.parallel_state",
    "megatron.core.tensor_parallel.random",
)


def _snapshot(names: tuple[str, ...]) -> dict[tuple[str, str], int]:
    return {
        (name, attribute): id(value)
        for name in names
        for attribute, value in vars(importlib.import_module(name)).items()
        if not attribute.startswith("__")
    }


def apply_and_revert() -> dict[str, object]:
    import torch.distributed
    from megatron.core.optimizer.optimizer import FP32Optimizer, MixedPrecisionOptimizer

    import patches
    from patches import cpu, manager, megatron_core

    distributed_before = {name: id(value) for name, value in vars(torch.distributed).items()}
    methods_before = (FP32Optimizer.prepare_grads, MixedPrecisionOptimizer.prepare_grads)
    tensor_before = (torch.Tensor.type, torch.Tensor.to, torch.Tensor.cuda, torch.zeros, torch.cuda.current_device)
    before = _snapshot(_MODULES)
    patches.apply_all()
    patches.apply_all()
    during = _snapshot(_MODULES)
    from megatron.core.pipeline_parallel import get_forward_backward_func, schedules

    by_name = get_forward_backward_func is schedules.get_forward_backward_func
    targets = manager.applied_targets()
    import ldt_schedules.megatron.forward_backward
    import ldt_schedules.megatron.world  # noqa: F401

    distributed_during = {name: id(value) for name, value in vars(torch.distributed).items()}
    patches.revert_all()
    return {
        "changed": sorted({f"{m}:{a}" for (m, a), value in before.items() if during[m, a] != value}),
        "by_name": by_name,
        "targets": targets,
        "declared": [patch.target for patch in cpu.PATCHES + megatron_core.PATCHES],
        "restored": _snapshot(_MODULES) == before
        and (FP32Optimizer.prepare_grads, MixedPrecisionOptimizer.prepare_grads) == methods_before
        and (torch.Tensor.type, torch.Tensor.to, torch.Tensor.cuda, torch.zeros, torch.cuda.current_device)
        == tensor_before,
        "distributed_untouched": distributed_before == distributed_during,
    }


def test_every_patch_takes_effect_and_revert_restores_megatron(workers):
    (seen,) = workers.run(apply_and_revert, [()], bare=True)
    assert seen["targets"] == tuple(seen["declared"])
    assert seen["by_name"], "the package's by-name import still holds Megatron's own function"
    assert "megatron.core.transformer.transformer_block:get_transformer_layer_offset" in seen["changed"]
    assert "megatron.core.optimizer.optimizer:get_grad_norm_fp32" in seen["changed"]
    assert seen["restored"]


def test_no_attribute_of_torch_distributed_is_replaced(workers):
    (seen,) = workers.run(apply_and_revert, [()], bare=True)
    assert seen["distributed_untouched"]
