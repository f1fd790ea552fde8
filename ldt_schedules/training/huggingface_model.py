"""A run that starts from a Hugging Face directory, and gives one back.

`model.hf: DIR` stands for the sizes of the model, its tokenizer and its first weights. Each site reads a directory of its own:
of the cloud's only config.json and the tensors of its layers are looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldt_schedules.errors import ConfigError
from ldt_schedules.planning.lap_layers import LapLayers

if TYPE_CHECKING:
    import torch

    from ldt_schedules.megatron.huggingface.directory import HuggingFaceDirectory
    from ldt_schedules.megatron.huggingface.sizes import Sizes
    from ldt_schedules.topology import Place
    from ldt_schedules.training.config import TrainConfig

_TOKENIZER = "tokenizer.json"


def with_sizes(content: dict[str, Any]) -> dict[str, Any]:
    """A config's content, completed from the directory that `model.hf` names.

    Raises:
        ConfigError: the directory cannot be read, is of an unknown architecture, or says otherwise than the config.
    """
    path = (content.get("model") or {}).get("hf") if isinstance(content.get("model"), Mapping) else None
    if not isinstance(path, str):
        return content
    from ldt_schedules.megatron.huggingface.directory import open_directory

    settings = open_directory(Path(path)).settings
    completed = dict(content)
    for section in ("model", "vision"):
        given, found = dict(content.get(section) or {}), settings[section]
        for key, value in found.items():
            if key in given and given[key] not in (None, value):
                raise ConfigError(
                    f"{section}.{key} is {given[key]!r}, but {path}/config.json says {value!r}; leave it out, or change it there"
                )
        completed[section] = {**given, **found}
    data = dict(content.get("data") or {})
    if "tokenizer" not in data and (Path(path) / _TOKENIZER).is_file():
        data["tokenizer"] = path
    return {**completed, "data": data}


def vocab_rows(config: TrainConfig) -> int:
    """Rows of the directory's embedding: often more than the tokenizer has ids. 0 without a directory."""
    return 0 if config.model.hf is None else int(_directory(config).settings["vocab_size"])


def load_weights(config: TrainConfig, model: torch.nn.Module, place: Place, rows: int) -> None:
    """Fill this process's parameters. `rows` are those of the embedding here; of no meaning in the cloud.

    Raises:
        ConfigError: tensors are missing, too many or of another shape.
    """
    from ldt_schedules.megatron.chunks import global_parameters
    from ldt_schedules.megatron.huggingface.loading import load

    directory = _directory(config)
    load(directory, global_parameters(model), _sizes(directory, place, rows), _tensor_parallel())


def check_save(config: TrainConfig) -> None:
    """Before training: after it a refusal would cost the result. Raises ConfigError."""
    if config.train.save_hf is None:
        return
    from ldt_schedules.megatron.huggingface.saving import check_target

    check_target(Path(config.train.save_hf), _directory(config))


def save_weights(config: TrainConfig, model: torch.nn.Module, place: Place, rows: int) -> None:
    """Write this process's part of `train.save_hf`: one file a pipeline rank; the edge adds the index and config.json.

    A collective of the tensor-parallel group; the first replica writes.
    """
    if config.train.save_hf is None or place.data_rank or place.context_rank:
        return
    from ldt_schedules.megatron.chunks import global_parameters
    from ldt_schedules.megatron.huggingface.saving import save

    directory = _directory(config)
    save(
        Path(config.train.save_hf),
        directory,
        global_parameters(model),
        _sizes(directory, place, rows),
        lambda name: holder(config.lap_layers, name),
        place.pipeline_rank,
        _tensor_parallel(),
    )


def holder(layers: LapLayers, name: str) -> int:
    """The pipeline rank that holds a parameter of the whole model; what is in no layer is the edge's."""
    tower, _, rest = name.partition(".decoder.layers.")
    if not rest:
        return 0
    number, first = int(rest.partition(".")[0]), 0
    for index, count in enumerate(layers.vit if tower == "vision" else layers.llm):
        first += count
        if number < first:
            return index % layers.num_places
    raise AssertionError(f"{name}: there is no such layer")


def _directory(config: TrainConfig) -> HuggingFaceDirectory:
    from ldt_schedules.megatron.huggingface.directory import open_directory

    assert config.model.hf is not None
    return open_directory(Path(config.model.hf))


def _sizes(directory: HuggingFaceDirectory, place: Place, rows: int) -> Sizes:
    from ldt_schedules.megatron.huggingface.sizes import Sizes
    from ldt_schedules.topology import Site

    return Sizes.of(directory.settings, rows if place.site is Site.EDGE else None)


def _tensor_parallel() -> Any:
    from megatron.core import parallel_state

    from ldt_schedules.megatron.huggingface.loading import TensorParallel

    return TensorParallel(
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_group(),
    )
