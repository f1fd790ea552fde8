"""What is installed on this machine, and whether it is what this project is made for.

Which versions are wanted is not written down a second time: megatron-core's are those that the patches declare, all others
those that this package was installed with (its metadata, from pyproject.toml). Whatever cannot be imported is told with
its error; nothing here needs torch or Megatron to be there.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import platform
import re
import socket
import warnings
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet

from ldt_schedules import __version__
from patches.declaring import MEGATRON_VERSIONS

_OURSELVES = "ldt-schedules"
_NEEDED = {"torch": "torch", "megatron-core": "megatron.core", "numpy": "numpy", "pydantic": "pydantic"}
_OPTIONAL = {
    "transformers": "transformers",
    "transformer-engine": "transformer_engine",
    "safetensors": "safetensors",
    "matplotlib": "matplotlib",
}
_TRIED = ("torch", "megatron-core", "transformer-engine")
"""These are imported: where a library below them is missing, their version alone does not tell."""


@dataclass(frozen=True)
class Component:
    """One package.

    Attributes:
        version: None: it is not installed.
        wanted: as pip writes it; empty: any.
        problem: what is wrong with it, if something is.
    """

    name: str
    version: str | None
    wanted: str
    problem: str | None


@dataclass(frozen=True)
class Device:
    """An accelerator."""

    name: str
    memory_bytes: int


@dataclass(frozen=True)
class Installation:
    """This machine.

    Attributes:
        device_type: cuda, npu or cpu; None where torch cannot say.
        backends: of torch.distributed.
        problem: why torch could not be asked for its devices.
    """

    host: str
    system: str
    cores: int
    memory_bytes: int | None
    components: tuple[Component, ...]
    device_type: str | None
    devices: tuple[Device, ...]
    backends: tuple[str, ...]
    problem: str | None

    @property
    def problems(self) -> list[str]:
        """Everything that a run would stumble over."""
        found = [f"{one.name}: {one.problem}" for one in self.components if one.problem is not None]
        return found if self.problem is None else [*found, self.problem]

    def figures(self) -> dict[str, Any]:
        """Of JSON types."""
        return {**asdict(self), "problems": self.problems}


def inspect_installation() -> Installation:
    """Look at this machine. Imports torch and Megatron, if they can be."""
    components = (_ourselves(), _python(), *_packages())
    try:
        device_type, devices, backends = _devices()
        problem = None
    except Exception as error:
        device_type, devices, backends, problem = None, (), (), f"devices: {_in_words(error)}"
        if any(one.name == "torch" and one.problem for one in components):
            problem = None  # told already
    return Installation(
        host=socket.gethostname(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cores=usable_cores(),
        memory_bytes=_memory(),
        components=components,
        device_type=device_type,
        devices=devices,
        backends=backends,
        problem=problem,
    )


def installed_versions() -> dict[str, str]:
    """Package -> version of what decides how a run computes; nothing is imported."""
    found = {name: _version(name) for name in (*_NEEDED, "transformers", "transformer-engine")}
    there = {name: version for name, version in found.items() if version is not None}
    return {_OURSELVES: __version__, "python": platform.python_version(), **there}


def usable_cores() -> int:
    """Of this process: fewer than the machine's where it was given fewer."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _ourselves() -> Component:
    return Component(_OURSELVES, __version__, "", None)


def _python() -> Component:
    version, wanted = platform.python_version(), ""
    with contextlib.suppress(metadata.PackageNotFoundError):  # run from a checkout that was not installed
        wanted = str(metadata.metadata(_OURSELVES)["Requires-Python"] or "")
    return Component("python", version, wanted, _out_of_range("python", version, wanted))


def _packages() -> list[Component]:
    wanted, found = _wanted(), []
    for name, module in {**_NEEDED, **_OPTIONAL}.items():
        version, problem = _version(name), None
        if version is None:
            if name in _OPTIONAL:
                continue
            problem = f"not installed; pip install {_quoted(name, wanted.get(name, ''))}"
        else:
            problem = _out_of_range(name, version, wanted.get(name, ""))
            if problem is None and name in _TRIED:
                problem = _import_problem(module)
        found.append(Component(name, version, wanted.get(name, ""), problem))
    return found


def _wanted() -> dict[str, str]:
    """Package -> versions, as this project was installed with them."""
    found = {}
    try:
        declared = metadata.requires(_OURSELVES) or []
    except metadata.PackageNotFoundError:
        declared = []
    for line in declared:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if requirement.specifier:
            found[requirement.name.lower()] = str(requirement.specifier)
    return {**found, "megatron-core": MEGATRON_VERSIONS}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _out_of_range(name: str, version: str, wanted: str) -> str | None:
    # torch calls itself 2.6.0+cu124, a nightly 2.9.0.dev…: both are what they say.
    if not wanted or SpecifierSet(wanted).contains(version, prereleases=True):
        return None
    if name == "python":
        return f"{version} is not {wanted}; make a virtual environment with another Python"
    return f"{version} is not {wanted}; pip install {_quoted(name, wanted)}"


def _quoted(name: str, wanted: str) -> str:
    return f"'{name}{wanted}'" if wanted else name


def _import_problem(module: str) -> str | None:
    """Why it cannot be imported, in one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Megatron logs what it does without; that is no matter here.
        logging.disable(logging.WARNING)
        try:
            importlib.import_module(module)
        except Exception as error:
            return f"import {module} fails: {_in_words(error)}"
        finally:
            logging.disable(logging.NOTSET)
    return None


def _devices() -> tuple[str, tuple[Device, ...], tuple[str, ...]]:
    import torch.distributed as dist

    from ldt_schedules import device

    kind = device.device_type()
    backends = []
    if dist.is_available():
        backends += ["gloo"] if dist.is_gloo_available() else []
        backends += ["nccl"] if dist.is_nccl_available() else []
        backends += ["mpi"] if dist.is_mpi_available() else []
        backends += ["hccl"] if kind == "npu" else []
    return kind, tuple(Device(name, size) for name, size in device.found_devices()), tuple(backends)


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def _in_words(error: Exception) -> str:
    text = re.sub(r"\s+", " ", str(error)).strip()
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
