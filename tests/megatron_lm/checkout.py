"""Real Megatron-LM checkouts, where the environment names some, and runs of their scripts under a real torchrun.

    MEGATRON_LM_PATH     one checkout or several, with the path separator between (core_v0.16.1, core_v0.12.1, ...)
    MEGATRON_CORE_PATH   folders of `pip install --target`, for checkouts of another version than is installed

A checkout has no compiled dataset helpers and a wheel has. So a test runs the checkout's scripts and `megatron.training`
over the wheel's `megatron.core` of the same version.
"""

from __future__ import annotations

import functools
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from ldt_schedules.comm.ports import free_ports

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 300

Figures = dict[str, tuple[float, ...]]
"""`iteration 3` -> (lm loss, grad norm, then zeros and parameter norm where they are logged);
`validation iteration 5 on test set` -> (lm loss,)."""


def words(text: str) -> tuple[str, ...]:
    """Arguments, as a shell would split them."""
    return tuple(text.split())


def _paths(variable: str) -> list[Path]:
    return [Path(path) for path in os.environ.get(variable, "").split(os.pathsep) if path]


def core_paths() -> list[Path]:
    """Folders with a megatron-core of another version than the installed one."""
    return [path for path in _paths("MEGATRON_CORE_PATH") if path.is_dir()]


def core_version(core: Path) -> str:
    """Of a folder `megatron/core`, without importing it."""
    return str(runpy.run_path(str(core / "package_info.py"))["__version__"])


CHECKOUTS = [
    pytest.param(path, id=core_version(path / "megatron" / "core"))
    for path in _paths("MEGATRON_LM_PATH")
    if path.is_dir()
] or [
    pytest.param(
        None,
        marks=pytest.mark.skip("MEGATRON_LM_PATH names no Megatron-LM checkout (core_v0.12.1 to core_v0.16.1)"),
        id="no checkout",
    )
]


def _cores() -> dict[str, Path]:
    import megatron.core

    found = [
        Path(megatron.core.__file__).parent,
        *(path / "megatron" / "core" for path in core_paths()),
    ]
    return {core_version(core): core for core in found}


@functools.lru_cache
def assembled(checkout: Path, into: Path) -> Path:
    """The checkout over the wheel's core; its files are copied or linked, none is changed."""
    version = core_version(checkout / "megatron" / "core")
    if version not in _cores():
        pytest.skip(f"megatron-core {version} is neither installed nor in MEGATRON_CORE_PATH")
    made = into / f"megatron-lm-{version}"
    (made / "megatron").mkdir(parents=True)
    for entry in checkout.iterdir():
        if entry.is_file():
            shutil.copy(entry, made)  # Python puts the folder of the file itself on the path, not that of a link to it
        elif entry.name != "megatron":
            (made / entry.name).symlink_to(entry)
    for entry in (checkout / "megatron").iterdir():
        (made / "megatron" / entry.name).symlink_to(_cores()[version] if entry.name == "core" else entry)
    return made


@dataclass(frozen=True)
class Finished:
    """A launch that has ended."""

    code: int
    output: str

    @property
    def figures(self) -> Figures:
        return figures(self.output)

    @property
    def complaint(self) -> str:
        """What went wrong, without Megatron's pages of arguments."""
        told = [line for line in self.output.splitlines() if line.startswith(("[rank", "ldt:", "  "))]
        return "\n".join(line for line in told if " ...." not in line)[-5000:] or self.output[-3000:]

    def require(self, *iterations: int) -> Figures:
        """The figures of a run that went well and logged these iterations: Megatron may fail with exit code 0."""
        assert self.code == 0, self.complaint
        missing = [number for number in iterations if f"iteration {number}" not in self.figures]
        assert not missing, f"iterations {missing} are not in the log:\n{self.complaint}"
        return self.figures


def figures(output: str) -> Figures:
    """What Megatron's console shows of the training and the evaluation, to all printed digits."""
    found: Figures = {}
    number = r"([-+.\dEe]+|nan|inf)"
    # Processes write a line and its end apart, so two of them may share a line.
    for line in re.split(r"\n|(?= \[20\d\d-)|(?= iteration +\d+/)", output):
        if training := re.search(rf"iteration +(\d+)/.*lm loss: {number} \|.*grad norm: {number} \|", line):
            more = [match[1] for match in re.finditer(rf"(?:num zeros|params norm): {number} \|", line)]
            found[f"iteration {training[1]}"] = tuple(map(float, (training[2], training[3], *more)))
        if evaluation := re.search(rf"validation loss at (iteration .*?) \| lm loss value: {number} \|", line):
            found[f"validation {evaluation[1].strip()}"] = (float(evaluation[2]),)
    return found


def torchrun(processes: int, module: str, *arguments: object, folder: Path, **environment: str) -> Finished:
    """Start `module` with `arguments` in so many processes of a real torchrun, and wait."""
    with started(processes, module, *arguments, folder=folder, **environment) as launch:
        output, _ = launch.communicate(timeout=TIMEOUT_S)
        return Finished(launch.returncode, output)


@contextmanager
def started(
    processes: int, module: str, *arguments: object, folder: Path, **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """The same while it runs; nothing of it runs afterwards."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(port), "-m", module, *map(str, arguments)]
    # A checkout has a package `tests` as well, so what stands here is run as a module of its own.
    given = environment.pop("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    path = os.pathsep.join(filter(None, [str(ROOT), str(Path(__file__).parent), given]))
    settings = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    launch = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, **settings, "PYTHONPATH": path, "LDT_DEVICE": "cpu", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        yield launch
    finally:
        if launch.poll() is None:
            launch.terminate()  # torchrun ends its processes, which have sessions of their own
            launch.wait(60)
