"""A pytest plugin under which Megatron-LM's own unit tests run on a CPU: `pytest -p unit_tests_plugin ...`.

With LDT_TEST_PATCHES=applied the patches of a split model are in place as well, and no session: the switch is off.
Done at import, before the checkout's conftest loads Megatron.
"""

from __future__ import annotations

import os
from datetime import timedelta

import pytest

from ldt_schedules.megatron_lm.cpu import prepare_for_cpu
from patches import manager, megatron_core, megatron_training

prepare_for_cpu()
if os.environ.get("LDT_TEST_PATCHES") != "applied":
    manager.revert((*megatron_core.PATCHES, *megatron_training.PATCHES))


def pytest_collection_finish(session: pytest.Session) -> None:
    import torch

    from tests.unit_tests.test_utilities import Utils

    def initialize_distributed() -> None:
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", timeout=timedelta(minutes=1))
        Utils.inited = True

    Utils.initialize_distributed = staticmethod(initialize_distributed)
