"""A run that starts from a Hugging Face directory, and gives one back.

`model.hf: DIR` stands for the sizes of the model, its tokenizer and its first weights. Each site reads a directory of its own;
the cloud's need not have more than config.json, preprocessor_config.json (of a vision-language model), the index and the files
with tensors of its layers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldt_schedules.errors import ConfigError
from ldt_schedules.planning.lap_layers import LLM, VIT, LapLayers
from ldt_schedules.planning.layers import stage_of_layer
from ldt_schedules.planning.layout import EDGE_RANK, Layout
from ldt_schedules.topology import Site

if TYPE_CHECKING:
    import torch

    from ldt_schedules.megatron.huggingface.directory import HuggingFaceDirectory
    from ldt_schedules.megatron.huggingface.sizes import Sizes
    from ldt_schedules.topology import Place
    from ldt_schedules.training.config import TrainConfig

_TOKENIZERS, _PROCESSOR = ("tokenizer.json", "vocab.json"), "preprocessor_config.json"


def with_sizes(content: dict[str, Any]) -> dict[str, Any]:
    """A config's content, completed from the directory that `model.hf` names.

    Raises:
        ConfigError: the directory cannot be read, is of an unknown architecture, or says otherwise than the config.
    """
    sections = {name: {} if content.get(name) is None else content[name] for name in ("model", "vision", "data")}
    if not all(isinstance(section, Mapping) for section in sections.values()):
        return content  # what is wrong with it is said when the config is read
    path = sections["model"].get("hf")
    if not isinstance(path, str):
        return content
    from ldt_schedules.megatron.huggingface.directory import open_directory

    try:
        settings = open_directory(Path(path), part=True).settings
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    completed, of_text = dict(content), {"num_layers": 0}
    for section in ("model", "vision"):
        given, found = sections[section], settings.get(section, of_text)
        for key, value in found.items():
            if key in given and given[key] not in (None, value):
                raise ConfigError(
                    f"{section}.{key} is {given[key]!r}, but {path}/config.json says {value!r}; leave it out, or change it there"
                )
        completed[section] = {**given, **found}
    if "vision" in settings:
        completed["vision"] = {**_pixel_bounds(Path(path)), **completed["vision"]}
    data = dict(sections["data"])
    if "tokenizer" not in data and any((Path(path) / name).is_file() for name in _TOKENIZERS):
        data["tokenizer"] = path
    return {**completed, "data": data}


def _pixel_bounds(path: Path) -> dict[str, int]:
    """How large images may be, by the directory's image processor; nothing where it does not say."""
    file = path / _PROCESSOR
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        size = content.get("size") or {}
        found = {
            "min_pixels": content.get("min_pixels") or size.get("min_pixels") or size.get("shortest_edge"),
            "max_pixels": content.get("max_pixels") or size.get("max_pixels") or size.get("longest_edge"),
        }
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); download it again") from None
    return {key: value for key, value in found.items() if isinstance(value, int)}


def vocab_rows(config: TrainConfig) -> int:
    """Rows of the directory's embedding: often more than the tokenizer has ids. 0 without a directory."""
    return 0 if config.model.hf is None else int(_directory(config, Site.CLOUD).settings["vocab_size"])


def load_weights(config: TrainConfig, model: torch.nn.Module, place: Place, rows: int) -> None:
    """Fill this process's parameters. `rows` are those of the embedding here; of no meaning in the cloud.

    Raises:
        ConfigError: tensors are missing, too many or of another shape.
    """
    from ldt_schedules.megatron.chunks import global_parameters
    from ldt_schedules.megatron.huggingface.loading import load

    directory = _directory(config, place.site)
    load(directory, global_parameters(model), _sizes(directory, place, rows), _tensor_parallel())


def check_save(config: TrainConfig, site: Site) -> None:
    """Before training: after it a refusal would cost the result. Raises ConfigError."""
    if config.train.save_hf is None:
        return
    from ldt_schedules.megatron.huggingface.saving import check_target

    check_target(Path(config.train.save_hf), _directory(config, site))


def save_weights(config: TrainConfig, model: torch.nn.Module, place: Place, rows: int) -> None:
    """Write this process's part of `train.save_hf`: one file a pipeline rank; the edge adds the index and config.json.

    A collective of the tensor-parallel group; the first replica writes.
    """
    if config.train.save_hf is None or place.data_rank or place.context_rank:
        return
    from ldt_schedules.megatron.chunks import global_parameters
    from ldt_schedules.megatron.huggingface.saving import save

    directory = _directory(config, place.site)
    save(
        Path(config.train.save_hf),
        directory,
        global_parameters(model),
        _sizes(directory, place, rows),
        lambda name: holder(config.lap_layers if config.has_vision else config.layer_split, config.layout, name),
        place.pipeline_rank,
        _tensor_parallel(),
    )


def holder(layers: LapLayers | tuple[int, ...], layout: Layout, name: str) -> int:
    """The pipeline rank, of the first domain, that holds a parameter of the whole model; what is in no layer is the edge's.

    Args:
        layers: of each stage; of a vision-language model those of both laps.
    """
    tower, _, rest = name.partition("decoder.layers.")
    if not rest:
        return EDGE_RANK
    layer = int(rest.partition(".")[0])
    if isinstance(layers, LapLayers):
        stage = layers.stage_of(VIT if tower == "vision." else LLM, layer)
    else:
        stage = stage_of_layer(layers, layer)
    return layout.stages[stage].ranks[0]


def _directory(config: TrainConfig, site: Site) -> HuggingFaceDirectory:
    from ldt_schedules.megatron.huggingface.directory import open_directory

    assert config.model.hf is not None
    return open_directory(Path(config.model.hf), part=site is Site.CLOUD)


def _sizes(directory: HuggingFaceDirectory, place: Place, rows: int) -> Sizes:
    from ldt_schedules.megatron.huggingface.sizes import Sizes

    return Sizes.of(directory.settings, rows if place.site is Site.EDGE else None)


def _tensor_parallel() -> Any:
    from megatron.core import parallel_state

    from ldt_schedules.megatron.huggingface.loading import TensorParallel

    return TensorParallel(
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_group(),
    )
