"""Which step a user means: a directory of one step, or one of several, of which the newest counts.

Both are given by their path:

    checkpoints/iter_0000050        a step
    checkpoints                     the newest: iter_0000050, or `release`, which has no number and no optimizer
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron.checkpoints.site_directory import LATEST, MANIFEST, newest_step, read_manifest, step_name
from ldt_schedules.megatron.checkpoints.torch_dist import FORMAT, METADATA
from ldt_schedules.megatron.checkpoints.torch_dist_writer import write_file

RELEASE = "release"


@dataclass(frozen=True)
class Step:
    """A complete step. Its iteration is 0 if it is a release."""

    path: Path
    iteration: int


def directory_name(iteration: int) -> str:
    """As Megatron-LM names it."""
    return step_name(iteration) if iteration else RELEASE


def find_step(path: Path) -> Step:
    """The step itself, or of a directory of steps the one that its `latest_checkpointed_iteration.txt` names, as Megatron does.

    Raises:
        ConfigError: there is none.
    """
    found, named = steps_in(path).values(), newest_step(path)
    return next((step for step in found if step.path == named), max(found, key=lambda step: step.iteration))


def common_step(first: Path, second: Path) -> tuple[Step, Step]:
    """The newest step that both have of one run, as their manifests say; the newest of all if there is no such.

    Raises:
        ConfigError: they have none in common (both are named), or a manifest is damaged.
    """
    ours, theirs = steps_in(first), steps_in(second)
    both = ours.keys() & theirs.keys()
    if not both:
        raise ConfigError(
            f"{first} has step {_numbers(ours)} and {second} step {_numbers(theirs)}: weights of different steps are no "
            "model; give two checkpoints of the same step"
        )
    of_one_run = (number for number in sorted(both, reverse=True) if same_run(ours[number], theirs[number]))
    chosen = next(of_one_run, max(both))
    return ours[chosen], theirs[chosen]


def same_run(*steps: Step) -> bool:
    """Do the manifests name one run? A step without a manifest, of Megatron-LM's own loop, does not say."""
    return len({read_manifest(step.path).run for step in steps if (step.path / MANIFEST).is_file()}) < 2


def steps_in(path: Path) -> dict[int, Step]:
    """Every complete step of a directory of steps, or the one that `path` is, by number.

    Raises:
        ConfigError: there is none.
    """
    if not path.is_dir():
        raise ConfigError(f"{path} is no directory; give a checkpoint, or a directory with steps (iter_0000050)")
    inside = {} if _is_step(path) else {one.name: one for one in path.iterdir() if _is_step(one)}
    candidates = inside or {path.resolve().name: path}
    found = {number: Step(one, number) for name, one in candidates.items() if (number := _number(name)) is not None}
    if not inside and not _is_step(path):
        raise ConfigError(
            f"{path} holds no complete step: no {FORMAT} in it, nor in a directory iter_… of it; give one of Megatron's "
            "distributed checkpoints (--ckpt-format torch_dist)"
        )
    return found or {0: Step(path, 0)}


def write_latest(directory: Path, iteration: int) -> None:
    """The file in which Megatron looks for the newest step."""
    write_file(directory / LATEST, (str(iteration) if iteration else RELEASE).encode())


def _is_step(path: Path) -> bool:
    return (path / FORMAT).is_file() and (path / METADATA).is_file() and not path.name.startswith(".")


def _number(name: str) -> int | None:
    """None of a directory that is named by its user."""
    number = name.removeprefix("iter_")
    return int(number) if name != number and number.isdigit() else 0 if name == RELEASE else None


def _numbers(steps: dict[int, Step]) -> str:
    return ", ".join(str(number) for number in sorted(steps)[-3:])
