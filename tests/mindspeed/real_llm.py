"""One process inside a real MindSpeed-LLM on a CPU: `python -m tests.mindspeed.real_llm OUT TASK ...`; see `real_mm`."""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

from tests.mindspeed.real_mm import fake_what_is_missing, find

THEIR_LDT = "mindspeed_llm.core.layerwise_disaggregated_training"
PLAIN = ["--num-layers", "4", "--tensor-model-parallel-size", "1", "--seq-length", "16", "--micro-batch-size", "1"]
SPLIT = [*PLAIN, "--layerwise-disaggregated-training", "--pipeline-model-parallel-size", "2", "--ldt-layers", "1,2,1"]


def import_with(arguments: list[str], rank: int, port: int) -> None:
    fake_what_is_missing()
    sys.argv[1:] = arguments
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    import patches.mindspeed

    patches.mindspeed.install_llm()
    patches.mindspeed.install_llm()
    __import__("mindspeed_llm")


def features(switch: bool, rank: int, port: int) -> dict[str, Any]:
    """What `import mindspeed_llm` leaves, with the switch and without."""
    import torch.distributed

    before = dict(vars(torch.distributed))
    import_with(SPLIT if switch else PLAIN, rank, port)
    from mindspeed.features_manager.features_manager import MindSpeedFeaturesManager
    from mindspeed.patch_utils import MindSpeedPatchesManager
    from mindspeed_llm.tasks.megatron_adaptor_v2 import FeatureAdaptor

    import patches.mindspeed
    from patches import manager

    names = [type(feature).__name__ for feature in MindSpeedFeaturesManager.FEATURES_LIST]
    # Its own patches are applied once more when a configuration is changed.
    FeatureAdaptor.execute()
    from megatron.core.pipeline_parallel import get_forward_backward_func, schedules

    info = MindSpeedPatchesManager.patches_info
    ours = {p.target: getattr(find(p.target), "_ldt_patches", ()) for p in patches.mindspeed.FOR_LLM}
    parsed = FeatureAdaptor.get_mindspeed_llm_args()
    return {
        "features": names,
        "ours": [target for target, marks in ours.items() if marks.count(target) == 1],
        "declared": [patch.target for patch in patches.mindspeed.FOR_LLM],
        "forward_backward": schedules.get_forward_backward_func.__module__,
        "is Megatron's": not hasattr(schedules.get_forward_backward_func, "__wrapped__"),
        "by name": get_forward_backward_func is schedules.get_forward_backward_func,
        "theirs": [p for p, i in info.items() if any(f.__module__.startswith(THEIR_LDT) for f in i.wrappers)],
        "applied by us": manager.applied_targets(),
        "environment": (os.environ["RANK"], os.environ["WORLD_SIZE"]),
        "argv": sys.argv[1:],
        "their switch": getattr(parsed, "layerwise_disaggregated_training", "absent"),
        "our switch": getattr(parsed, "ldt_schedules", "absent"),
        "distributed by us": [
            name
            for name, value in vars(torch.distributed).items()
            if before.get(name) is not value and "ldt_schedules" in str(getattr(value, "__module__", ""))
        ],
    }


def refusal(what: str) -> dict[str, Any]:
    """The message of install_llm(), or of the import after it."""
    fake_what_is_missing()
    sys.argv[1:] = PLAIN
    if what == "too late":
        __import__("mindspeed_llm")
    import patches.mindspeed
    from patches import manager

    if what == "version":
        manager._version = lambda package: "0.14.0"
    try:
        patches.mindspeed.install_llm()
        __import__("mindspeed_llm")
    except manager.PatchError as error:
        return {"message": str(error)}
    return {"message": "accepted"}


def main() -> None:
    out, task, arguments = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    answer = {"features": features, "refusal": refusal}[task](*arguments)
    Path(out).write_bytes(pickle.dumps(answer))


if __name__ == "__main__":
    main()
