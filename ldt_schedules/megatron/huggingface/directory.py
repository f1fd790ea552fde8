"""A Hugging Face directory: what it holds, and slices of its tensors.

    config.json                        the architecture and its sizes
    model.safetensors                  all tensors, or
    model.safetensors.index.json       name -> file, beside model-00001-of-0000N.safetensors, ...

Only safetensors are read. A pickle (`pytorch_model.bin`) runs whatever its author wrote into it when it is opened.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron.huggingface.architectures import architecture_of
from ldt_schedules.megatron.huggingface.mapping import Architecture, Pair, Read
from ldt_schedules.megatron.huggingface.safetensors_file import DTYPES, TensorInfo
from ldt_schedules.megatron.huggingface.sizes import Sizes

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_MAX_LISTED = 20


@dataclass(frozen=True)
class HuggingFaceDirectory:
    """From `open_directory`; nothing of a tensor is read but its shape.

    Attributes:
        config: the content of config.json.
        tensors: name -> shape and dtype.
        files: name -> the file that holds it.
        elsewhere: name -> a file that the index names and that is not here: another site's, if `open_directory` was asked
            for a part.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    files: Mapping[str, Path]
    elsewhere: Mapping[str, Path] = field(default_factory=dict)

    @cached_property
    def architecture(self) -> Architecture:
        """Raises ConfigError, see `architecture_of`."""
        return architecture_of(self.config)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Of config.json in our config keys; see `Architecture.settings`."""
        try:
            return self.architecture.settings(self.config)
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {error}") from error

    def pairs(self, sizes: Sizes) -> dict[str, Pair]:
        """Megatron's name -> its pair, for every parameter of the whole model.

        Raises:
            ConfigError: tensors are missing, not of the model, of another shape or dtype; all of them are listed.
        """
        pairs = self.architecture.pairs(sizes, {*self.tensors, *self.elsewhere})
        expected = {
            name: shape
            for pair in pairs.values()
            if pair.tied_to is None
            for name, shape in zip(pair.names, pair.shapes, strict=True)
        }
        copies = {copy: pair.shapes[0] for pair in pairs.values() for copy in pair.copies if copy in self.tensors}
        here = {name: shape for name, shape in {**expected, **copies}.items() if name not in self.elsewhere}
        problems = _differences(self.tensors, here)
        if problems:
            raise ConfigError(
                f"{self.path} does not fit the model ({len(problems)} of {len(expected)} tensors):\n"
                + _listed(problems)
                + "\nGive the model the sizes of its config.json, or another directory"
            )
        return pairs

    @contextmanager
    def reading(self) -> Iterator[Read]:
        """A function that reads a slice of a tensor; files are opened when they are first needed."""
        opened: dict[Path, Any] = {}
        with ExitStack() as stack:

            def read(name: str, rows: slice, columns: slice) -> torch.Tensor:
                path = self.files[name]
                if path not in opened:
                    opened[path] = stack.enter_context(safe_open(path, framework="pt"))
                tensor, dims = opened[path].get_slice(name), len(self.tensors[name].shape)
                if dims == 2:
                    values: torch.Tensor = tensor[rows, columns]
                    return values
                values = tensor[rows]
                return values if dims == 1 else values.flatten(1)[:, columns]

            yield read


def open_directory(path: str | Path, part: bool = False) -> HuggingFaceDirectory:
    """Read what a directory says of itself.

    Args:
        part: files that the index names may be missing, for a site that holds some of the layers only.

    Raises:
        ConfigError: it is none, has no config.json or no safetensors, or a file of it is missing or damaged.
    """
    path = Path(path)
    if not path.is_dir():
        raise ConfigError(f"{path} is no directory; give a downloaded Hugging Face model")
    config = _json(path / CONFIG)
    tensors: dict[str, TensorInfo] = {}
    files: dict[str, Path] = {}
    promised = _promised(path)
    elsewhere = {name: file for name, file in promised.items() if name and not file.is_file()}
    if elsewhere and not part:
        files_there = sorted({file.name for file in elsewhere.values()})
        raise ConfigError(f"{path} lacks files that its index names: {', '.join(files_there)}; copy them there")
    for file in sorted(set(promised.values()) - set(elsewhere.values())):
        for name, info in _headers(file).items():
            if name in files:
                raise ConfigError(f"{name} is in {files[name]} and in {file}; one of them is of another model")
            tensors[name], files[name] = info, file
    absent = sorted(name for name in promised if name and name not in tensors and name not in elsewhere)
    if absent:
        raise ConfigError(f"{path / INDEX} names tensors that its files do not hold:\n" + _listed(absent))
    return HuggingFaceDirectory(path, config, tensors, files, elsewhere)


def _promised(path: Path) -> dict[str, Path]:
    """Tensor -> file, by the index; of a single file `"" -> file`."""
    if (path / SINGLE).is_file():
        return {"": path / SINGLE}
    if (path / INDEX).is_file():
        named = _json(path / INDEX).get("weight_map")
        if not isinstance(named, dict) or not named:
            raise ConfigError(f"{path / INDEX} has no weight_map; download it again")
        outside = sorted({str(file) for file in named.values() if Path(str(file)).name != file})
        if outside:
            raise ConfigError(f"{path / INDEX} names files outside the directory: {', '.join(outside)}")
        return {name: path / file for name, file in named.items()}
    pickles = sorted(one.name for pattern in _PICKLES for one in path.glob(pattern))
    if pickles:
        raise ConfigError(
            f"{path} holds pickles only ({', '.join(pickles[:3])}), and those are not read: opening one runs its code. "
            f"Save the model as safetensors (save_pretrained of transformers does)"
        )
    raise ConfigError(f"{path} holds neither {SINGLE} nor {INDEX}; give a directory with a model's weights")


def _headers(file: Path) -> dict[str, TensorInfo]:
    with file.open("rb") as opened:
        if opened.read(20).startswith(b"version https://git-"):
            raise ConfigError(f"{file} is a git-lfs pointer, not the file; run `git lfs pull` in its directory")
    try:
        with safe_open(file, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 - no mapping
            return {name: TensorInfo(tuple(one.get_shape()), one.get_dtype()) for name, one in slices.items()}
    except SafetensorError as error:
        raise ConfigError(f"{file} is no whole safetensors file ({error}); download or copy it again") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path.parent} has no {path.name}; give a downloaded Hugging Face model") from None
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is no JSON object; download it again")
    return content


def _differences(tensors: Mapping[str, TensorInfo], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    problems = [f"{name}: missing" for name in expected if name not in tensors]
    problems += [f"{name}: not a tensor of this model" for name in tensors if name not in expected]
    for name, shape in expected.items():
        info = tensors.get(name)
        if info is not None and info.shape != shape:
            problems.append(f"{name}: {list(info.shape)}, the model has {list(shape)}")
        if info is not None and info.dtype not in DTYPES:
            problems.append(f"{name}: dtype {info.dtype}, read are {', '.join(DTYPES)}")
    return problems


def _listed(problems: list[str]) -> str:
    shown = [f"  {one}" for one in problems[:_MAX_LISTED]]
    if len(problems) > _MAX_LISTED:
        shown.append(f"  and {len(problems) - _MAX_LISTED} more")
    return "\n".join(shown)
