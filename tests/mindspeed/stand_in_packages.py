"""`mindspeed`, `mindspeed_mm` and `mindspeed_llm` as modules made here: the names that we touch, and what they do by contract."""

from __future__ import annotations

import sys
import types
from typing import Any

from tests.mindspeed import stand_in

MM_LDT = "mindspeed_mm.patchs.layerwise_disaggregated_training"
KEY = "layerwise_disaggregated_training"


def module(name: str, **names: Any) -> types.ModuleType:
    """A package of that name in sys.modules, with its parents."""
    parent, _, last = name.rpartition(".")
    if parent and parent not in sys.modules:
        module(parent)
    made = sys.modules.setdefault(name, types.ModuleType(name))
    made.__path__ = []
    vars(made).update(names)
    if parent:
        setattr(sys.modules[parent], last, made)
    return made


class Feature:
    """The base class of features: one of level 0 always applies, whatever its flag says."""

    def __init__(self, feature_name: str, optimization_level: int = 2) -> None:
        self.feature_name, self.optimization_level = feature_name, optimization_level

    def is_need_apply(self, args: Any) -> bool:
        return self.optimization_level == 0 or bool(getattr(args, self.feature_name, False))

    def register_args(self, parser: Any) -> None:
        pass

    def register_patches(self, patch_manager: Any, args: Any) -> None:
        pass


class FeaturesManager:
    FEATURES_LIST: list[Any] = []  # noqa: RUF012

    @classmethod
    def set_features_list(cls, features_list: list[Any]) -> None:
        cls.FEATURES_LIST[:] = features_list


def mindspeed() -> stand_in.PatchManager:
    """MindSpeed imported; its patch manager."""
    manager = stand_in.PatchManager()
    module("mindspeed.megatron_adaptor")
    module("mindspeed.patch_utils", MindSpeedPatchesManager=manager)
    module("mindspeed.features_manager.feature", MindSpeedFeature=Feature)
    module("mindspeed.features_manager.features_manager", MindSpeedFeaturesManager=FeaturesManager)
    return manager


def mindspeed_mm(manager: stand_in.PatchManager, theirs: list[tuple[str, Any]]) -> stand_in.ConfigPatches:
    """MindSpeed-MM imported; its manager of lists, with `theirs` for the key."""
    lists = stand_in.ConfigPatches(manager, theirs)

    def pre_validate_args_for_vtp(args: Any) -> None:
        args.world_size = 1000

    def post_validate_args_for_vtp(args: Any) -> None:
        args.data_parallel_size = 0

    functions = (pre_validate_args_for_vtp, post_validate_args_for_vtp)
    module(f"{MM_LDT}.parallel_state_patch", **{function.__name__: function for function in functions})
    module("mindspeed_mm.patchs.validate_args_patch", **{function.__name__: function for function in functions})
    module("mindspeed_mm.patchs.patch_manager", PatchesManager=lists)
    return lists


def llm_features(*names: str) -> list[Feature]:
    """Features as MindSpeed-LLM's own, one of each class name."""
    made = []
    for name in names:
        cls = type(name, (Feature,), {"__module__": "mindspeed_llm.features_manager"})
        made.append(cls(name, 0))
    return made
