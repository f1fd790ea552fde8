"""MindSpeed-MM: takes over the model-json key `patch.layerwise_disaggregated_training`.

MM holds a list of patches for each key and applies those of the keys that the model's json sets. Its train step looks at the
same key to read the loss on the first stage, so the key stays and its list becomes ours. Wrappers stack, so a list of theirs
that was applied already is taken back first. Before that, while arguments are checked, MM forges the world size and
replaces `initialize_model_parallel`; both stop here, because each site is a stock world.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from ldt_schedules.mindspeed.registration import Pair, Registrar, dotted, wrapper_of
from patches import manager
from patches.manager import Patch, PatchError

KEY = "layerwise_disaggregated_training"
_WRAPPED = "_ldt_wrapped"
"""The attribute by which MM tells that `initialize_model_parallel` is taken care of."""


def take_over(patches: tuple[Patch, ...], startup: tuple[Patch, ...]) -> None:
    """Replace MM's list for the key by `patches`, and apply `startup` now. A second call changes nothing.

    Raises:
        PatchError: called at the wrong moment, or something does not fit what is installed.
    """
    lists, foreign = _imported()
    _refuse_too_late(startup)
    ours = [(dotted(patch), wrapper_of(patch)) for patch in patches]
    if lists.configs[KEY] != ours:
        _take_back(foreign, lists.configs[KEY])  # first: what is verified must be Megatron's, not theirs
    Registrar((*startup, *patches)).verify()
    manager.apply(startup)
    lists.configs[KEY] = ours


def _imported() -> tuple[Any, Any]:
    """MM's manager of lists and MindSpeed's of patches, which the user's script must have imported."""
    missing = [name for name in ("mindspeed.megatron_adaptor", "mindspeed_mm") if name not in sys.modules]
    if missing:
        raise PatchError(
            f"{' and '.join(missing)} must be imported before patches.mindspeed.install(). The order is: "
            "import mindspeed.megatron_adaptor; import mindspeed_mm; patches.mindspeed.install(); pretrain(...)"
        )
    from mindspeed.patch_utils import MindSpeedPatchesManager
    from mindspeed_mm.patchs.patch_manager import PatchesManager

    if KEY not in PatchesManager.configs:
        raise PatchError(
            f"this MindSpeed-MM has no patch key {KEY!r} (it has {', '.join(sorted(PatchesManager.configs))}); "
            "releases 26.1.0 and later have it"
        )
    return PatchesManager, MindSpeedPatchesManager


def _refuse_too_late(startup: tuple[Patch, ...]) -> None:
    from megatron.core import parallel_state

    applied = set(manager.applied_targets())
    if any(patch.target in applied for patch in startup):
        return
    if getattr(parallel_state.initialize_model_parallel, _WRAPPED, False):
        raise PatchError(
            "MindSpeed-MM has replaced initialize_model_parallel already, so the process groups are not those of one "
            "site; call patches.mindspeed.install() before pretrain()"
        )


def _take_back(foreign: Any, theirs: list[Pair]) -> None:
    """Undo what was registered from `theirs`: MindSpeed would lay our wrappers on top of it."""
    for path, function in theirs:
        registered = foreign.patches_info.get(path)
        if registered is None:
            continue
        if function in registered.wrappers:
            foreign.remove_wrappers(path, function.__name__)
            registered.is_applied = False
        elif registered.patch_func is function:
            foreign.register_patch(path, None, force_patch=True)
    foreign.apply_patches()


def arguments_stay(original: Callable[[Any], None]) -> Callable[[Any], None]:
    """For MM's two steps around Megatron's check of the arguments: a site's own numbers are right as they are."""

    def leave_arguments(args: Any) -> None:
        del args

    return functools.update_wrapper(leave_arguments, original)


def left_alone(original: Callable[..., None]) -> Callable[..., None]:
    """For `initialize_model_parallel`: Megatron's own, with the mark that keeps MM from replacing it."""

    @functools.wraps(original)
    def initialize_model_parallel(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)

    setattr(initialize_model_parallel, _WRAPPED, True)
    return initialize_model_parallel
