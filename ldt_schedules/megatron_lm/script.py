"""Runs the user's training script as the program of this process."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

from ldt_schedules.errors import ConfigError


def prepare_script(path: str, arguments: list[str]) -> None:
    """Set `sys.argv` and the import path as `python SCRIPT ARGUMENTS` does.

    Raises:
        ConfigError: there is no such file.
    """
    if not Path(path).is_file():
        raise ConfigError(f"{path} is no file; give the path of Megatron-LM's pretrain_gpt.py, or of a script like it")
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(Path(path).resolve().parent))


def run_script(path: str) -> None:
    """Run it in a fresh `__main__`.

    Not by runpy: child processes that are spawned (Megatron's checkpoint writers) import the parent's main module again,
    by its spec. With ours they load this package; with the script's they would load all of Megatron.
    """
    main = ModuleType("__main__")
    main.__file__ = path
    main.__spec__ = sys.modules["__main__"].__spec__
    code = compile(Path(path).read_bytes(), path, "exec")
    sys.modules["__main__"] = main
    exec(code, main.__dict__)
