"""Our declarations in MindSpeed's patch manager (a stand-in), and what is refused before anything is registered."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.mindspeed import stand_in
from tests.mindspeed import stand_in_packages as packages

BARRIER, NORM = "torch.distributed.barrier", "megatron.core.optimizer.clip_grads.get_grad_norm_fp32"
SCHEDULE = "megatron.core.pipeline_parallel.schedules.get_forward_backward_func"


def depth(function: Any) -> int:
    """How many of our replacements lie on each other."""
    count = 0
    while function is not None:
        if "ldt_schedules" in function.__code__.co_filename:
            count += 1
        function = getattr(function, "__wrapped__", None)
    return count


def registered_twice() -> dict[str, Any]:
    from megatron.core.optimizer import clip_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func as by_name_before
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy

    from ldt_schedules.mindspeed.registration import Registrar
    from patches import mindspeed

    foreign = stand_in.PatchManager()
    original = schedules.get_forward_backward_func
    Registrar(mindspeed.FOR_MM).register(foreign)
    Registrar(mindspeed.FOR_MM).register(foreign)
    foreign.apply_patches()
    for info in foreign.patches_info.values():
        info.is_applied = False
    foreign.apply_patches()
    from megatron.core.pipeline_parallel import get_forward_backward_func as by_name

    return {
        "wrappers": {path: [w.__name__ for w in info.wrappers] for path, info in foreign.patches_info.items()},
        "declared": [patch.target.replace(":", ".") for patch in mindspeed.FOR_MM],
        "depth": depth(clip_grads.get_grad_norm_fp32),
        "by name": by_name is schedules.get_forward_backward_func is not by_name_before,
        "on Megatron's": schedules.get_forward_backward_func.__wrapped__ is original,
        "static": isinstance(vars(VocabParallelCrossEntropy)["calculate_logits_max"], staticmethod),
    }


def test_a_declaration_becomes_one_wrapper(workers):
    """Their manager knows a wrapper by the end of its name and by its identity; twice must not be two."""
    (seen,) = workers.run(registered_twice, [()], bare=True)
    assert list(seen["wrappers"]) == seen["declared"]
    assert all(len(names) == 1 and names[0].endswith("_wrapper") for names in seen["wrappers"].values())
    assert seen["depth"] == 1
    assert seen["by name"] and seen["on Megatron's"]
    assert seen["static"], "called on an object, a plain function would get the object as its first argument"


def ours_was_first() -> dict[str, Any]:
    from megatron.core.optimizer import clip_grads

    import patches
    from ldt_schedules.mindspeed.registration import Registrar
    from patches import mindspeed

    os.environ["LDT_DEVICE"] = "cpu"
    patches.apply_all()
    foreign = stand_in.PatchManager()
    Registrar(mindspeed.FOR_MM).register(foreign)
    foreign.apply_patches()
    return {"depth": depth(clip_grads.get_grad_norm_fp32)}


def test_what_our_own_manager_has_applied_is_left_alone(workers):
    """Twice would join the gradient norm of the sites twice: a factor of the root of 2."""
    (seen,) = workers.run(ours_was_first, [()], bare=True)
    assert seen["depth"] == 1


def their_wrapper_in_between() -> dict[str, Any]:
    """A feature of theirs wraps or replaces the same target, before or after ours."""
    import functools

    from megatron.core.optimizer import clip_grads

    from ldt_schedules.mindspeed.registration import Registrar
    from patches import mindspeed

    def counting_wrapper(function: Any) -> Any:
        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return counted

    def of_theirs(grads_for_norm: Any, norm_type: float = 2, grad_stats_parallel_group: Any = None) -> float:
        return 7.0

    foreign, answers = stand_in.PatchManager(), {}
    foreign.register_patch(NORM, counting_wrapper)
    Registrar(mindspeed.FOR_MM).register(foreign)
    foreign.apply_patches()
    answers["below a wrapper"] = depth(clip_grads.get_grad_norm_fp32)
    foreign.register_patch(NORM, of_theirs, force_patch=True)
    foreign.apply_patches()
    answers["over a replacement"] = depth(clip_grads.get_grad_norm_fp32)
    answers["which is called"] = clip_grads.get_grad_norm_fp32([])
    return answers


def test_other_features_patch_the_same_target(workers):
    (seen,) = workers.run(their_wrapper_in_between, [()], bare=True)
    assert seen == {"below a wrapper": 1, "over a replacement": 1, "which is called": 7.0}


def refused(change: dict[str, Any]) -> dict[str, Any]:
    from megatron.core import parallel_state

    from ldt_schedules.mindspeed.registration import Registrar
    from patches import megatron_core
    from patches.manager import PatchError

    bad = replace(megatron_core.PATCHES[3], **change)
    also = replace(megatron_core.PATCHES[4], target="megatron.core.no_such_module:name")
    foreign = stand_in.PatchManager()
    before = set(vars(parallel_state))
    try:
        Registrar((megatron_core.PATCHES[0], bad, also)).register(foreign)
    except PatchError as error:
        return {
            "message": str(error),
            "registered": list(foreign.patches_info),
            "new": set(vars(parallel_state)) - before,
        }
    return {"message": "accepted"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"target": "megatron.core.parallel_state:is_first"},
            "parallel_state:is_first: does not exist in megatron-core",
        ),
        ({"versions": "<0.12"}, "parallel_state:is_pipeline_first_stage: megatron-core is"),
        ({"signatures": (("other",),)}, "parallel_state:is_pipeline_first_stage: takes"),
    ],
)
def test_every_misfit_is_named_and_nothing_is_registered(workers, change, message):
    (seen,) = workers.run(refused, [(change,)], bare=True)
    assert message in seen["message"]
    assert "megatron.core.no_such_module:name: does not exist" in seen["message"]
    assert seen["registered"] == [] and not seen["new"]


def test_their_manager_would_have_made_the_missing_name():
    """The trap that makes the check necessary: this is what two of their own patches did."""
    foreign = stand_in.PatchManager()
    foreign.register_patch("tests.mindspeed.stand_in.no_such_function", lambda: 1)
    foreign.apply_patches()
    assert stand_in.no_such_function() == 1  # type: ignore[attr-defined]
    del stand_in.no_such_function  # type: ignore[attr-defined]


def mm_took_over(applied_before: bool) -> dict[str, Any]:
    import torch.distributed
    from megatron.core import parallel_state
    from megatron.core.optimizer import clip_grads
    from megatron.core.pipeline_parallel import schedules

    from ldt_schedules.mindspeed import mm
    from patches import mindspeed

    def barrier_wrapper(function: Any) -> Any:
        return lambda *args: function(*args)

    def forged_schedule() -> None:
        raise AssertionError("theirs was called")

    barrier, schedule = torch.distributed.barrier, schedules.get_forward_backward_func
    foreign = packages.mindspeed()
    theirs = [(BARRIER, barrier_wrapper), (SCHEDULE, forged_schedule), (NORM, barrier_wrapper)]
    lists = packages.mindspeed_mm(foreign, theirs)
    if applied_before:
        lists.apply_patches_from_config({packages.KEY: True})
        assert torch.distributed.barrier is not barrier
    startup = tuple(replace(patch, versions=">=0.12.1") for patch in mindspeed.MM_STARTUP)
    mm.take_over(mindspeed.FOR_MM, startup)
    mm.take_over(mindspeed.FOR_MM, startup)
    lists.apply_patches_from_config({packages.KEY: True, "another_key": True})
    args = SimpleNamespace(world_size=3, data_parallel_size=1)
    checks = sys.modules["mindspeed_mm.patchs.validate_args_patch"]
    checks.pre_validate_args_for_vtp(args)
    checks.post_validate_args_for_vtp(args)
    return {
        "barrier": torch.distributed.barrier is barrier,
        "schedule": schedules.get_forward_backward_func.__wrapped__ is schedule,
        "depth": depth(clip_grads.get_grad_norm_fp32),
        "others": len(lists.configs["another_key"]),
        "args": vars(args),
        "left alone": getattr(parallel_state.initialize_model_parallel, "_ldt_wrapped", False),
    }


@pytest.mark.parametrize("applied_before", [False, True])
def test_the_key_of_the_model_json_is_ours(workers, applied_before):
    """Wrappers stack, so a list of theirs that was applied already must be taken back and not only replaced."""
    (seen,) = workers.run(mm_took_over, [(applied_before,)], bare=True)
    assert seen == {
        "barrier": True,
        "schedule": True,
        "depth": 1,
        "others": 0,
        "args": {"world_size": 3, "data_parallel_size": 1},
        "left alone": True,
    }


def mm_refused(what: str) -> str:
    from megatron.core import parallel_state

    from patches import mindspeed
    from patches.manager import PatchError

    foreign = packages.mindspeed()
    if what != "too early":
        lists = packages.mindspeed_mm(foreign, [])
        if what == "no key":
            del lists.configs[packages.KEY]
    try:
        if what == "too late":
            from ldt_schedules.mindspeed import mm

            parallel_state.initialize_model_parallel._ldt_wrapped = True
            mm.take_over(mindspeed.FOR_MM, ())
        else:
            mindspeed.install()
    except PatchError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("too early", "mindspeed_mm must be imported before patches.mindspeed.install()"),
        ("too late", "MindSpeed-MM has replaced initialize_model_parallel already"),
        ("no key", "this MindSpeed-MM has no patch key 'layerwise_disaggregated_training' (it has another_key)"),
        ("version", "post_validate_args_for_vtp: megatron-core is 0.16.1, checked on >=0.12.1,<0.13"),
    ],
)
def test_the_wrong_moment_or_version_is_refused(workers, what, message):
    (said,) = workers.run(mm_refused, [(what,)], bare=True)
    if what == "version" and "megatron-core is 0.16.1" not in said:
        pytest.skip("the megatron-core that is installed is one that MindSpeed is made for")
    assert message in said


def llm_list(switch: bool, given: list[str]) -> dict[str, Any]:
    """What `set_features_list` makes of MindSpeed-LLM's list, and what our feature then does."""
    from ldt_schedules.mindspeed import llm
    from patches import mindspeed
    from patches.manager import PatchError

    foreign = packages.mindspeed()
    llm.announce(tuple(replace(patch, versions=">=0.12.1") for patch in mindspeed.LLM_FEATURES))
    llm.announce(tuple(replace(patch, versions=">=0.12.1") for patch in mindspeed.LLM_FEATURES))
    sys.argv = ["pretrain_gpt.py", "--num-layers", "4", "--pipeline-model-parallel-size", "2", "--ldt-link", "h:1"]
    sys.argv += ["--seq-length", "16", "--ldt-site", "edge"] + ["--layerwise-disaggregated-training"] * switch
    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    packages.FeaturesManager.set_features_list([packages.Feature("mindspeeds_own")])
    own = [feature.feature_name for feature in packages.FeaturesManager.FEATURES_LIST]
    try:
        packages.FeaturesManager.set_features_list(packages.llm_features(*given))
    except PatchError as error:
        return {"message": str(error)}
    names = [type(feature).__name__ for feature in packages.FeaturesManager.FEATURES_LIST]
    ours = packages.FeaturesManager.FEATURES_LIST[-1]
    parser = argparse.ArgumentParser()
    ours.register_args(parser)
    ours.register_args(parser)
    args = parser.parse_known_args()[0]
    if not switch:
        ours.register_patches(foreign, args)
    return {
        "own": own,
        "names": names,
        "needed": ours.is_need_apply(args),
        "registered": len(foreign.patches_info),
        "argv": sys.argv,
    }


THEIRS = ["UShapedSplitFeature", "VTPFeature", "VirtualDPFeature"]


@pytest.mark.parametrize("switch", [False, True])
def test_our_feature_takes_the_place_of_three(workers, switch):
    """The base class applies a feature of level 0 with its flag off; arguments are registered more than once."""
    (seen,) = workers.run(llm_list, [(switch, ["Dataset", *THEIRS, "Qat"])], bare=True)
    assert seen["own"] == ["mindspeeds_own"]
    assert seen["names"] == ["Dataset", "Qat", "LdtSchedulesFeature"]
    assert seen["needed"] is switch
    assert seen["registered"] == 0
    assert ("--ldt-link" in seen["argv"]) is not switch, "the site's command line is plain Megatron's"


def test_the_site_is_entered_before_megatron_is_imported():
    """MindSpeed puts its modules in the place of Apex and Transformer Engine first; Megatron looks for them at import."""
    program = """
    import sys
    from tests.mindspeed import stand_in_packages, test_registration
    import patches.mindspeed
    seen = test_registration.llm_list(True, test_registration.THEIRS)
    assert seen["names"] == ["LdtSchedulesFeature"] and seen["needed"], seen
    assert not [name for name in sys.modules if name.partition(".")[0] == "megatron"]
    """
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr


def another_schedule(path: str, name: str) -> str:
    """Our feature, last in the list, after another has registered `name` at `path`."""
    from ldt_schedules.errors import ConfigError
    from ldt_schedules.mindspeed import llm

    foreign = packages.mindspeed()

    def theirs(function: Any = None) -> Any:
        return function

    theirs.__name__ = name
    foreign.register_patch(path, theirs)
    try:
        llm.refuse_other_schedules(foreign)
    except ConfigError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    ("path", "name", "refused"),
    [
        (SCHEDULE, "dualpipev_schedule", True),
        (SCHEDULE, "forward_backward_wrapper", True),
        ("megatron.training.training.get_model", "get_model", True),
        ("megatron.training.training.get_model", "get_model_wrapper", False),
        (NORM, "norm", False),
    ],
)
def test_another_feature_that_replaces_the_schedule_is_refused(workers, path, name, refused):
    """Theirs would lose its effect without a word, or take ours away."""
    (said,) = workers.run(another_schedule, [(path, name)], bare=True)
    assert (f"{path} by tests.mindspeed.test_registration.{name}" in said) is refused
    assert refused or said == "accepted"


def test_a_renamed_feature_is_refused_by_name(workers):
    (seen,) = workers.run(llm_list, [(False, ["Dataset", "UShapedSplitFeature", "VirtualDP2Feature"])], bare=True)
    assert "this MindSpeed-LLM has no feature VTPFeature, VirtualDPFeature" in seen["message"]


def test_mindspeed_llm_must_not_be_there_yet(monkeypatch):
    from patches import mindspeed
    from patches.manager import PatchError

    monkeypatch.setitem(sys.modules, "mindspeed_llm", packages.types.ModuleType("mindspeed_llm"))
    with pytest.raises(PatchError, match=r"call patches.mindspeed.install_llm\(\) before `import mindspeed_llm`"):
        mindspeed.install_llm()
