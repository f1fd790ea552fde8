"""The random states of a process: what dropout draws from, and what a user's own code might."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

from ldt_schedules import device


def random_states() -> dict[str, Any]:
    """Of plain types and tensors, so that they can be read without running anything."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "kind": device.device_type(),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": dict(get_cuda_rng_tracker().get_states()),
        "python": random.getstate(),
        "numpy": (str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
    }


def set_random_states(states: dict[str, Any]) -> bool:
    """Go on where `random_states` was called. False, and nothing done, on a device of another kind: its states differ."""
    if states["kind"] != device.device_type():
        return False
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state(states["device"])
    get_cuda_rng_tracker().set_states(states["tracker"])
    random.setstate(states["python"])
    kind, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    return True


def seed_after(seed: int, iteration: int) -> None:
    """Where the old states fit no process of today: other numbers than those that the first steps drew."""
    torch.manual_seed(seed + iteration)
    model_parallel_cuda_manual_seed(seed + iteration)
