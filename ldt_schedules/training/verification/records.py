"""The files that tell what a step left behind: each process writes two after every step.

    DIR/step-0002/edge-rank0.safetensors    gradient/NAME, weight/NAME: this process's slices, float32 or float64
    DIR/step-0002/edge-rank0.json           losses, gradient norm, was there an update, fingerprints of its weights

Step 0 holds the weights before the first one. NAME is the parameter's in the whole model. Tensors are written by the
first data-parallel replica only: of the others their fingerprints must be the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from ldt_schedules.training.verification.joining import Partition, join

Kind = Literal["gradient", "weight"]

_Tensors = tuple[Any, frozenset[str]]  # an open safetensors file, and the names in it


@dataclass(frozen=True)
class ProcessRecord:
    """What one process says of one step.

    Attributes:
        losses: of each of its microbatches, nats a token; empty where no loss is computed.
        grad_norm: of both sites; None where it was not computed.
        stepped: was there an update?
        fingerprints: of this process's weights by the parameter's name.
        partition: of those parameters that are cut over the tensor-parallel processes.
    """

    site: str
    site_rank: int
    tensor_rank: int
    data_rank: int
    losses: list[float]
    grad_norm: float | None
    stepped: bool
    fingerprints: dict[str, str]
    partition: dict[str, Partition]


def step_directory(directory: Path, step: int) -> Path:
    return directory / f"step-{step:04d}"


def fingerprint(weight: np.ndarray) -> str:
    """Equal for equal bits."""
    return hashlib.sha256(np.ascontiguousarray(weight).data).hexdigest()[:32]


def write(directory: Path, step: int, record: ProcessRecord, tensors: Mapping[Kind, Mapping[str, np.ndarray]]) -> None:
    """Write both files of a process; without tensors only the JSON."""
    place = step_directory(directory, step)
    place.mkdir(parents=True, exist_ok=True)
    stem = place / f"{record.site}-rank{record.site_rank}"
    flat = {f"{kind}/{name}": tensor for kind, named in tensors.items() for name, tensor in named.items()}
    if flat:
        save_file(flat, stem.with_suffix(".safetensors"))
    stem.with_suffix(".json").write_text(json.dumps(asdict(record)), encoding="utf-8")


def _read(path: Path) -> ProcessRecord:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    content["partition"] = {name: Partition(**cut) for name, cut in content["partition"].items()}
    return ProcessRecord(**content)


class StepRecord:
    """One step of one run, all processes together; from `open_step`.

    Attributes:
        processes: what each said, the edge's first.
    """

    def __init__(self, processes: list[ProcessRecord], files: dict[tuple[str, int], _Tensors]) -> None:
        self.processes = processes
        self._files = files

    @cached_property
    def _holders(self) -> dict[str, list[ProcessRecord]]:
        """Who wrote a parameter, by tensor rank."""
        holders: dict[str, list[ProcessRecord]] = {}
        for process in sorted(self.processes, key=lambda one: one.tensor_rank):
            if (process.site, process.site_rank) in self._files:
                for name in process.fingerprints:
                    if name in process.partition or process.tensor_rank == 0:
                        holders.setdefault(name, []).append(process)
        return holders

    @property
    def losses(self) -> list[float]:
        """Of the step's microbatches in order: replica d of D has microbatches d, d + D, ..."""
        replicas = [one.losses for one in sorted(self.processes, key=lambda one: one.data_rank) if one.losses]
        return [loss for microbatches in zip(*replicas, strict=True) for loss in microbatches]

    @property
    def names(self) -> list[str]:
        """Every parameter of the whole model."""
        return sorted(self._holders)

    def site(self, name: str) -> str:
        """The site that holds the parameter."""
        return self._holders[name][0].site

    def partition(self, name: str) -> tuple[Partition | None, int]:
        """How the parameter is cut, and over how many processes."""
        holders = self._holders[name]
        return holders[0].partition.get(name), len(holders)

    def tensor(self, kind: Kind, name: str) -> np.ndarray | None:
        """The whole tensor; None where there is none (the gradient of a frozen parameter, or of step 0)."""
        holders = self._holders[name]
        files = [self._files[one.site, one.site_rank] for one in holders]
        slices = [file.get_tensor(key) for file, keys in files if (key := f"{kind}/{name}") in keys]
        return join(slices, holders[0].partition.get(name)) if slices else None

    def differing_copies(self) -> list[str]:
        """Parameters whose copies, on replicas or on tensor-parallel processes that do not share it, are not equal."""
        copies: dict[tuple[str, int], set[str]] = {}
        for process in self.processes:
            for name, print_ in process.fingerprints.items():
                cut_at = process.tensor_rank if name in process.partition else -1
                copies.setdefault((name, cut_at), set()).add(print_)
        return sorted({name for (name, _), prints in copies.items() if len(prints) > 1})


@contextmanager
def open_step(directory: Path, step: int) -> Iterator[StepRecord]:
    """The record of a step; tensors are read from its files when they are asked for."""
    paths = sorted(step_directory(directory, step).glob("*.json"))
    processes = sorted(map(_read, paths), key=lambda one: (one.site != "edge", one.site_rank))
    with ExitStack() as opened:
        files = {}
        for one in processes:
            path = step_directory(directory, step) / f"{one.site}-rank{one.site_rank}.safetensors"
            if path.exists():
                tensors = opened.enter_context(safe_open(path, framework="numpy"))
                files[one.site, one.site_rank] = tensors, frozenset(tensors.keys())
        yield StepRecord(processes, files)
