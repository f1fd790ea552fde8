"""Logits, losses and gradients against transformers' Qwen2.5-VL; under the oldest megatron-core too."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.helpers.workers import site_ports
from tests.megatron_lm.checkout import ROOT, core_paths
from tests.vision_language.reference import in_a_world
from tests.vision_language.tiny import BATCHES

pytest.importorskip("transformers", reason="transformers is not installed")

ALONE = """
import json, torch
from tests.helpers import preload
from tests.helpers.workers import site_ports
from tests.vision_language.reference import in_a_world
print(json.dumps(in_a_world(0, site_ports(), (torch.float32, torch.float64))))
"""


def check(single: dict[str, dict[str, float]], double: dict[str, dict[str, float]]) -> None:
    assert list(single) == list(double) == list(BATCHES)
    for batch, found in single.items():
        assert found["size"] > 1, "logits that are hardly there prove nothing"
        assert found["logits"] <= 1e-4, (batch, found)
    for batch, found in double.items():
        apart = {name: value for name, value in found.items() if name != "size" and not value <= 1e-9}
        assert not apart, (batch, apart)


def test_logits_and_gradients_are_those_of_transformers(workers):
    """In float32 to 1e-4, in float64 to 1e-9; without an image the gradients of ViT and projector are zeros, not absent."""
    ((single, double),) = workers.run(in_a_world, [(0, site_ports(), (torch.float32, torch.float64))])
    check(single, double)


def test_under_the_oldest_core_too():
    if not core_paths():
        pytest.skip("MEGATRON_CORE_PATH names no folder of `pip install --target FOLDER megatron-core==0.12.1`")
    done = subprocess.run(
        [sys.executable, "-c", ALONE],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (core_paths()[0], ROOT))), "LDT_DEVICE": "cpu"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    single, double = json.loads(done.stdout.splitlines()[-1])
    check(single, double)
