"""A pytest plugin under which Megatron-LM's own unit tests run on a CPU: `pytest -p unit_tests_plugin ...`.

With LDT_TEST_PATCHES=applied the patches of a split model are in place as well, and no session: the switch is off.
Done at import, before the checkout's conftest loads Megatron.
"""

from __future__ import annotations

import functools
import os

import pytest

from ldt_schedules.megatron_lm.cpu import prepare_for_cpu
from patches import manager, megatron_core, megatron_training

os.environ["WORLD_SIZE"] = "8"  # see initialize_distributed below
prepare_for_cpu()
if os.environ.get("LDT_TEST_PATCHES") != "applied":
    manager.revert((*megatron_core.PATCHES, *megatron_training.PATCHES))


def pytest_collection_finish(session: pytest.Session) -> None:
    import torch
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from tests.unit_tests.test_utilities import Utils

    def initialize_distributed() -> None:
        """A world of 8 in one process: these tests ask for groups of 8, and send nothing that they look at."""
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
        Utils.inited = True

    Utils.initialize_distributed = staticmethod(initialize_distributed)
    Utils.initialize_model_parallel = staticmethod(
        functools.partial(Utils.initialize_model_parallel, create_gloo_process_groups=False)
    )
