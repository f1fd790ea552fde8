"""Saves a site's steps, while training waits or while it goes on. Everything here is a collective of the site.

copies in memory ── files ── index ── digests, manifest ── name ── older steps removed
training waits     background          training waits again, for a moment
"""

from __future__ import annotations

import shutil
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from ldt_schedules import device
from ldt_schedules.megatron.checkpoints import site_directory
from ldt_schedules.megatron.checkpoints.site_directory import FileInfo, Manifest, Saved
from ldt_schedules.megatron.checkpoints.site_state import Trainee, state_to_save
from ldt_schedules.megatron.checkpoints.strategies import SaveInParts, on_first


@dataclass
class _Pending:
    """A step that is being written."""

    manifest: Manifest
    part: Path
    strategy: SaveInParts
    waited_s: float
    request: Any = None
    thread: threading.Thread | None = None

    def is_written(self) -> bool:
        return self.thread is None or not self.thread.is_alive()


@dataclass
class SiteSaver:
    """One process's end of it.

    Args:
        manifest: of this site and run; its step and files are filled in.
        keep: the newest steps that stay; 0: all.
        in_background: write while training goes on.
    """

    directory: Path
    manifest: Manifest
    keep: int = 0
    in_background: bool = False
    _pending: _Pending | None = field(default=None, init=False)

    def save(self, trainee: Trainee, iteration: int, consumed_samples: int) -> list[Saved]:
        """Begin a step; what was begun before is ended first. Gives those that became complete.

        Raises:
            ConfigError: on every process of the site: no space left, or the step is there already.
        """
        complete, start = self.finish(), time.perf_counter()
        part = on_first(lambda: site_directory.begin(self.directory, iteration))
        manifest = replace(self.manifest, iteration=iteration, consumed_samples=consumed_samples)
        pending = _Pending(manifest, part, SaveInParts(), 0.0)
        try:
            pending.request = dist_checkpointing.save(
                state_to_save(trainee, iteration),
                str(part),
                pending.strategy,
                async_sharded_save=self.in_background,
                # It would warn of a process that has no layers, and whose common state is shorter. The first one's is kept.
                preprocess_common_before_consistancy_check=lambda common: {},
            )
        except Exception:
            self._give_up(part)
            raise
        if self.in_background:
            # A thread, not the fork that Megatron's own caller makes: forked from a process with a link's threads, a child
            # may wait for ever for a lock that one of them held.
            pending.thread = threading.Thread(target=pending.request.async_fn, name="save-checkpoint", daemon=True)
            pending.thread.start()
        pending.waited_s = time.perf_counter() - start
        self._pending = pending
        return complete if self.in_background else [*complete, *self.finish()]

    def poll(self) -> list[Saved]:
        """End what is written on every process, without waiting."""
        if self._pending is None:
            return []
        written = torch.tensor([int(self._pending.is_written())], device=device.current_device())
        dist.all_reduce(written, op=dist.ReduceOp.MIN)
        return self.finish() if bool(written.item()) else []

    def finish(self) -> list[Saved]:
        """Wait until the step that was begun is complete."""
        pending, self._pending = self._pending, None
        if pending is None:
            return []
        start = time.perf_counter()
        if pending.thread is not None:
            pending.thread.join()
        try:
            for finalize in pending.request.finalize_fns if pending.request is not None else ():
                finalize()
            path = on_first(lambda: self._publish(pending))
        except Exception:
            self._give_up(pending.part)
            raise
        total = sum(file.num_bytes for file in pending.strategy.written)
        waited_s = pending.waited_s + time.perf_counter() - start
        return [Saved(pending.manifest.iteration, str(path), total, waited_s)]

    def _publish(self, pending: _Pending) -> Path:
        known = {file.name: FileInfo(file.num_bytes, file.sha256) for file in pending.strategy.written}
        files = site_directory.describe_files(pending.part, known)
        path = site_directory.publish(pending.part, replace(pending.manifest, files=files))
        # While this process writes in the background it may be two steps ahead of one of the other site.
        site_directory.forget_older(self.directory, self.keep + (self.in_background and self.keep > 0))
        return path

    def _give_up(self, part: Path) -> None:
        """What is half written only takes space."""
        if dist.get_rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
