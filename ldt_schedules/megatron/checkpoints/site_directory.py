"""A site's directory of checkpoints: one directory a step, complete or not there at all.

    checkpoints/edge/
      iter_0000050/                    complete: it got its name when everything in it was on the disk
        .metadata __0_0.distcp common.pt metadata.json      megatron-core's format
        ldt.json                       whose it is: site, step, run; size and SHA-256 of every file
      .iter_0000100.part/              being written, or left by a process that was killed while writing
      abandoned_iter_0000150/          of a run that had gone further than the step from which this one goes on
      latest_checkpointed_iteration.txt

A directory gets its name by one rename, which a file system does or does not do. So whatever happens while a step is saved, the
steps before it are whole. Names are Megatron-LM's.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from ldt_schedules.errors import ConfigError

MANIFEST = "ldt.json"
LATEST = "latest_checkpointed_iteration.txt"
_STEP = re.compile(r"^iter_([0-9]{7,18})\Z")
_LATEST_STEP = re.compile(r"[0-9]{1,18}")
_STRICT = ConfigDict(strict=True, extra="forbid")
_ASIDE = "abandoned_"
_BLOCK = 1 << 22
_PROBE_BYTES = 1 << 22
_FORMAT = 1


@dataclass(frozen=True)
class FileInfo:
    """Of a file of a checkpoint."""

    __pydantic_config__ = _STRICT

    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
        site: `edge` or `cloud`.
        run: from one start to its end: both sites' checkpoints have it, and no other run's.
        sizes: of the site's world, tensor, data, pipeline, context: random states fit these alone.
        consumed_samples: over all replicas, since the beginning of the training.
        settings: what both sites had agreed on (config keys and the schedule's hash).
        versions: of what wrote it.
    """

    __pydantic_config__ = _STRICT

    site: Literal["edge", "cloud"]
    iteration: int
    run: str
    sizes: Mapping[str, int]
    consumed_samples: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, FileInfo] = field(default_factory=dict)
    format: int = _FORMAT


_READER = TypeAdapter(Manifest)


@dataclass(frozen=True)
class Saved:
    """A step that is complete.

    Attributes:
        num_bytes: of this site.
        waited_s: how long training stood still for it.
    """

    iteration: int
    path: str
    num_bytes: int
    waited_s: float


def step_name(iteration: int) -> str:
    """As Megatron-LM names it."""
    return f"iter_{iteration:07d}"


def steps(directory: Path) -> list[int]:
    """Complete steps, the oldest first; none of a directory that is not there."""
    found = (_STEP.match(path.name) for path in directory.iterdir()) if directory.is_dir() else ()
    return sorted(int(one[1]) for one in found if one and (directory / one[0] / MANIFEST).is_file())


def newest_step(path: Path) -> Path:
    """The step that is meant by a step's own directory, or by one of steps (Megatron-LM's `--load`).

    Raises:
        ConfigError: neither.
    """
    if (path / "metadata.json").is_file() or not (path / LATEST).is_file():
        return path  # what it is else, the reader says
    try:
        named = (path / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path / LATEST} cannot be read ({error}); give a step's own directory") from None
    if named == "release":
        return path / named
    if not _LATEST_STEP.fullmatch(named):
        raise ConfigError(
            f"{path / LATEST} says {named[:40]!r}, which is no step; correct it, or give a step's own directory"
        )
    return path / step_name(int(named))


def begin(directory: Path, iteration: int) -> Path:
    """An empty directory to write a step into.

    Raises:
        ConfigError: it cannot be made, or the step is there already.
    """
    if (directory / step_name(iteration)).exists():
        raise ConfigError(
            f"{directory / step_name(iteration)} is there already; remove it, or save to another directory"
        )
    part = directory / f".{step_name(iteration)}.part"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if part.exists():
            shutil.rmtree(part)
        part.mkdir()
        # The small files are megatron-core's to write, on one process, and the others would wait for it: so no surprise there.
        (part / "probe").write_bytes(bytes(_PROBE_BYTES))
        (part / "probe").unlink()
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise ConfigError(f"{part} cannot be written: {error.strerror}") from None
    return part


def publish(part: Path, manifest: Manifest) -> Path:
    """Give a written step its name. Everything in it must be on the disk.

    Raises:
        ConfigError: no space left.
    """
    target = part.parent / step_name(manifest.iteration)
    try:
        _write(part / MANIFEST, json.dumps(asdict(manifest), indent=1))
        sync_tree(part)
        os.rename(part, target)
        _sync(part.parent)
        _replace(part.parent / LATEST, str(manifest.iteration))
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror}") from None
    return target


def incomplete(directory: Path) -> list[str]:
    """Directories named as a step that are none: copied half, or another program's."""
    named = (path.name for path in directory.iterdir()) if directory.is_dir() else ()
    return sorted(name for name in named if _STEP.match(name) and not (directory / name / MANIFEST).is_file())


def set_aside(directory: Path, iteration: int) -> list[str]:
    """Rename what an earlier run saved after `iteration`, from where this one goes on; their new names.

    Under their old ones they would be taken for this run's: as the newest, or as the other half of a step of this run.
    """
    renamed = []
    for newer in (step for step in steps(directory) if step > iteration):
        old = directory / step_name(newer)
        aside = old.with_name(_ASIDE + old.name)
        shutil.rmtree(aside, ignore_errors=True)
        old.rename(aside)
        renamed.append(aside.name)
    if renamed:
        _replace(directory / LATEST, str(iteration))
    return renamed


def forget_older(directory: Path, keep: int) -> None:
    """Remove what killed processes left, and all but the newest `keep` steps, with what was set aside; 0 keeps all."""
    for left in directory.glob(".iter_*.part"):
        shutil.rmtree(left, ignore_errors=True)
    if not keep:
        return
    for aside in directory.glob(f"{_ASIDE}iter_*"):
        shutil.rmtree(aside, ignore_errors=True)
    for iteration in steps(directory)[:-keep]:
        old = directory / step_name(iteration)
        # Not half a step under its own name, should this process die here.
        gone = directory / f".{old.name}.part"
        os.rename(old, gone)
        shutil.rmtree(gone, ignore_errors=True)


def sync_tree(directory: Path) -> None:
    """To the disk: every file of a directory, then their names."""
    for path in (*directory.iterdir(), directory):
        _sync(path)


def read_manifest(step: Path, site: str | None = None) -> Manifest:
    """Raises ConfigError: there is none, it is damaged, or of the other site."""
    path = step / MANIFEST
    try:
        manifest = _READER.validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{step} is no checkpoint of a site: it has no {MANIFEST}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path} is damaged ({where[:200]}: {first['msg'][:200]}); use an older step") from None
    if manifest.format != _FORMAT:
        raise ConfigError(f"{path} is of format {manifest.format}, known is {_FORMAT}; use the version that wrote it")
    named = _STEP.match(step.resolve().name)
    if named and int(named[1]) != manifest.iteration:
        raise ConfigError(
            f"{step} was saved after step {manifest.iteration}; give it its name, {step_name(manifest.iteration)}"
        )
    if site is not None and manifest.site != site:
        raise ConfigError(
            f"{step} is the {manifest.site}'s checkpoint, this is the {site}; give the {site}'s own directory"
        )
    return manifest


def describe_files(directory: Path, known: Mapping[str, FileInfo]) -> dict[str, FileInfo]:
    """Of every file there; digests that are known are not computed again."""
    names = sorted(path.name for path in directory.iterdir() if path.name != MANIFEST)
    return {name: known[name] if name in known else _describe(directory / name) for name in names}


def problems_of(step: Path, files: Iterable[tuple[str, FileInfo]]) -> list[str]:
    """What is wrong with files of a step: missing, of another size, or with another content."""
    return [f"{step / name}: {problem}" for name, info in files if (problem := _problem(step, name, info))]


def _problem(step: Path, name: str, info: FileInfo) -> str:
    path = step / name
    if Path(name).name != name or path.is_symlink():
        return "not a file of the checkpoint's own"
    if not path.is_file():
        return "missing"
    if path.stat().st_size != info.num_bytes:
        return f"{path.stat().st_size} bytes, {info.num_bytes} were written"
    return "" if _describe(path) == info else "its content is not what was written"


def _describe(path: Path) -> FileInfo:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return FileInfo(path.stat().st_size, digest.hexdigest())


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.part")
    _write(partial, text)
    os.replace(partial, path)


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """To the disk: a file's content, or the names in a directory."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
