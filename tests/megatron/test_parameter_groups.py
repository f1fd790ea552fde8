"""Weight decay after loading: by what a group is, not by its place in the checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ldt_schedules.errors import LdtError
from ldt_schedules.megatron.parameter_groups import IDENTITY, in_the_order_of
from tests.megatron_lm.checkout import core_paths

ROOT = Path(__file__).parents[2]

LOADING = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
import torch
from patches import cpu, manager, megatron_core
patched = [patch for patch in megatron_core.PATCHES if patch.target.endswith("Optimizer.load_state_dict")]
assert patched
manager.apply(cpu.PATCHES)
from megatron.core import parallel_state
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.optimizer import FP32Optimizer

def optimizer(*decays):
    groups = [
        {
            "params": [torch.nn.Parameter(torch.ones(2))], "weight_decay": decay, "wd_mult": float(decay > 0),
            "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False,
        }
        for decay in decays
    ]
    return FP32Optimizer(torch.optim.AdamW(groups, lr=0.1), OptimizerConfig(optimizer="adam"), None)

def loaded():
    whole, cloud = optimizer(0.01, 0.0), optimizer(0.0, 0.01)
    state, theirs = cloud.state_dict(), whole.state_dict()
    # What megatron-core's distributed checkpoints make of the two: numbers of the process, the rest of the file.
    state["param_groups"] = [
        {**group, "params": own["params"]} for group, own in zip(theirs["param_groups"], state["param_groups"])
    ]
    cloud.load_state_dict(state)
    return [group["weight_decay"] for group in cloud.param_groups]

torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
stock = loaded()
manager.apply(patched)
print(json.dumps({"stock": stock, "ours": loaded()}))
"""


def decays_after_loading(core: Path | None) -> dict[str, list[float]]:
    """Of the cloud's groups, biases first, from a checkpoint of a whole model, matrices first; without patches and with."""
    path = os.pathsep.join(str(folder) for folder in (core, ROOT) if folder is not None)
    done = subprocess.run(
        [sys.executable, "-c", LOADING],
        env={**os.environ, "PYTHONPATH": path, "LDT_DEVICE": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    loaded: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return loaded


def test_the_cloud_decays_its_matrices_after_loading_a_whole_models_optimizer() -> None:
    assert decays_after_loading(None) == {"stock": [0.0, 0.01], "ours": [0.0, 0.01]}


def test_under_the_oldest_core_too_which_alone_takes_them_by_position() -> None:
    if not core_paths():
        pytest.skip("MEGATRON_CORE_PATH names no folder of `pip install --target FOLDER megatron-core==0.12.1`")
    assert decays_after_loading(core_paths()[0]) == {"stock": [0.01, 0.0], "ours": [0.0, 0.01]}


def test_a_group_that_the_checkpoint_lacks_is_named() -> None:
    group = dict(zip(IDENTITY, (1.0, 1.0, False, False), strict=True))
    with pytest.raises(LdtError, match=r"--no-load-optim"):
        in_the_order_of([{**group, "is_decoupled_lr": True}], [{**group, "params": [0]}])
