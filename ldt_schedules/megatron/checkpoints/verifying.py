"""Is a checkpoint what was written? Its manifest has the digest of every file; the site's processes share the reading."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron.checkpoints.site_directory import MANIFEST, Manifest, problems_of, read_manifest
from ldt_schedules.megatron.checkpoints.strategies import gathered
from ldt_schedules.megatron.checkpoints.torch_dist import COMMON, METADATA


def verify(step: Path) -> Manifest | None:
    """Read every file of a step and compare. A collective of the site. None where there is no manifest (Megatron's own).

    Raises:
        ConfigError: on every process: a file is missing, cut off or changed; all are named.
    """
    if not (step / MANIFEST).is_file():
        return None
    manifest = read_manifest(step)
    mine = sorted(manifest.files.items())[dist.get_rank() :: dist.get_world_size()]
    unlisted = [f"{step / MANIFEST}: has no {name}" for name in (METADATA, COMMON) if name not in manifest.files]
    problems = unlisted + [problem for everybody in gathered(problems_of(step, mine)) for problem in everybody]
    if problems:
        raise ConfigError(
            "the checkpoint is damaged; use another step, or copy it again:\n  " + "\n  ".join(sorted(problems))
        )
    return manifest
