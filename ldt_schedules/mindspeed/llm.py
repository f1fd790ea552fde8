"""MindSpeed-LLM: one feature of ours in the place of its three.

`import mindspeed_llm` sets MindSpeed's list of features, parses the command line and applies everything, all at once. So the
list is changed on its way in, and at that moment, before anything is parsed, the process becomes one of its own site.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron_lm.flags import SWITCH
from ldt_schedules.mindspeed import site
from ldt_schedules.mindspeed.registration import Registrar
from patches import manager
from patches.manager import Patch, PatchError

FEATURE_NAME = "ldt_schedules"
"""Also the name under which the switch is found in the arguments. Not upstream's: MindSpeed-LLM branches on that."""
_GET_MODEL = "megatron.training.training.get_model"
_OURS_ALONE = (
    "megatron.core.pipeline_parallel.schedules.get_forward_backward_func",
    "megatron.core.pipeline_parallel.schedules.forward_backward_pipelining_without_interleaving",
    _GET_MODEL,
)
THEIR_FEATURES = ("UShapedSplitFeature", "VTPFeature", "VirtualDPFeature")


def announce(patches: tuple[Patch, ...]) -> None:
    """Apply `patches`, after which MindSpeed-LLM finds our feature. A second call changes nothing.

    Raises:
        PatchError: mindspeed_llm is imported already, or something does not fit what is installed.
    """
    if {patch.target for patch in patches} <= set(manager.applied_targets()):
        return
    if "mindspeed_llm" in sys.modules:
        raise PatchError(
            "mindspeed_llm is imported already and has applied its own features; call patches.mindspeed.install_llm() "
            "before `import mindspeed_llm`"
        )
    manager.apply(patches)


def with_our_feature(original: Callable[[list[Any]], None]) -> Callable[[list[Any]], None]:
    """For `set_features_list`: their three out, ours in, and the site entered before arguments are parsed."""

    @functools.wraps(original)
    def set_features_list(features_list: list[Any]) -> None:
        if not any(type(feature).__module__.startswith("mindspeed_llm") for feature in features_list):
            original(features_list)  # MindSpeed's own list, without those of MindSpeed-LLM
            return
        names = [type(feature).__name__ for feature in features_list]
        missing = [name for name in THEIR_FEATURES if name not in names]
        if missing:
            raise PatchError(f"this MindSpeed-LLM has no feature {', '.join(missing)}; it was renamed or taken out")
        others = [feature for feature in features_list if type(feature).__name__ not in THEIR_FEATURES]
        original([*others, make_feature(site.enter())])

    return set_features_list


def refuse_other_schedules(foreign: Any) -> None:
    """Our feature comes last: what others have registered by now would lose its effect, or take ours away.

    Raises:
        ConfigError: with each function of theirs.
    """
    found = []
    for path in _OURS_ALONE:
        info = foreign.patches_info.get(path)
        if info is None:
            continue
        # Wrappers of get_model run the one below them; what chooses a schedule does not.
        others = [info.patch_func, *(info.wrappers if path != _GET_MODEL else ())]
        found += [f"{path} by {f.__module__}.{f.__name__}" for f in others if f and not f.__name__.startswith("ldt_")]
    if found:
        raise ConfigError(
            f"with {SWITCH} no other feature of MindSpeed may replace the schedule or the building of the model:\n  "
            + "\n  ".join(found)
            + "\nleave out the flag that switches it on"
        )


def make_feature(switched_on: bool) -> Any:
    """Our feature, a `MindSpeedFeature`. Made here because its base class exists only where MindSpeed does.

    Args:
        switched_on: the switch stood on the command line, from which it is gone by the time that MindSpeed reads it.
    """
    from mindspeed.features_manager.feature import MindSpeedFeature

    class LdtSchedulesFeature(MindSpeedFeature):  # type: ignore[misc]
        """Registers our declared patches where the switch is given, and nothing at all where it is not."""

        def __init__(self) -> None:
            super().__init__(FEATURE_NAME, optimization_level=0)

        def is_need_apply(self, args: Any) -> bool:
            """The base class says yes to every feature of level 0."""
            return bool(getattr(args, FEATURE_NAME, False))

        def register_args(self, parser: Any) -> None:
            if SWITCH in parser._option_string_actions:
                return
            parser.add_argument_group(title=FEATURE_NAME).add_argument(
                SWITCH,
                dest=FEATURE_NAME,
                action="store_true",
                default=switched_on,
                help="Train over two sites (LDT Schedules).",
            )

        def register_patches(self, patch_manager: Any, args: Any) -> None:
            if self.is_need_apply(args):
                from patches.mindspeed import FOR_LLM

                refuse_other_schedules(patch_manager)
                Registrar(FOR_LLM).register(patch_manager)
                site.prepare()

    return LdtSchedulesFeature()
