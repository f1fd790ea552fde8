"""Hugging Face directories: into plain Megatron and back, into sites' parts and back, byte for byte."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron.checkpoints.torch_dist import open_checkpoint
from ldt_schedules.megatron.converting.from_huggingface import from_huggingface
from ldt_schedules.megatron.converting.huggingface_splitting import split_directory
from ldt_schedules.megatron.converting.splitting import split
from ldt_schedules.megatron.converting.to_huggingface import to_huggingface
from ldt_schedules.megatron.huggingface.directory import open_directory
from ldt_schedules.planning.lap_layers import LapLayers
from ldt_schedules.planning.layout import Layout
from ldt_schedules.topology import Site
from ldt_schedules.training.huggingface_model import holder
from ldt_schedules.training.vocabulary import Vocabulary
from tests.helpers.workers import Workers
from tests.huggingface import text, tiny
from tests.huggingface.tiny import assert_same, contents
from tests.megatron.plain import Run, run
from tests.megatron.test_convert_megatron import silent
from tests.parity.case import Case

pytest.importorskip("transformers", reason="transformers is not installed")

LAYERS = (1, 1, 1, 1)
LAPS = LapLayers((1, 1, 1), (0, 1, 1))


def holder_of(num_layers: int, num_vision_layers: int) -> Any:
    """Two cloud ranks of a model of text, one of a vision-language model."""
    if num_vision_layers:
        return lambda name: holder(LAPS, LAPS.layout(), name)
    assert num_layers == sum(LAYERS)
    return lambda name: holder(LAYERS, Layout.u(3), name)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("hf")
    found = {
        "llama, tied": text.make(folder / "llama", "Llama", tied=True),
        "qwen2.5, files": text.make(folder / "qwen2", "Qwen2", dtype=torch.bfloat16, shard="20KB"),
        "qwen3": text.make(folder / "qwen3", "Qwen3"),
        "vision": tiny.make(folder / "vision"),
        "vision, tied": tiny.make(folder / "vision-tied", tied=True, published=False, shard="20KB"),
    }
    for path in found.values():
        (path / "tokenizer.json").write_text("{}")
        (path / "preprocessor_config.json").write_text('{"max_pixels": 50176}')
    return found


NAMES = ("llama, tied", "qwen2.5, files", "qwen3", "vision", "vision, tied")


@pytest.mark.parametrize("name", NAMES)
def test_to_megatron_and_back(directories, tmp_path, name) -> None:
    """The files, too: every tensor lies in the file of its name."""
    source = directories[name]
    from_huggingface(source, tmp_path / "megatron", silent)
    to_huggingface([tmp_path / "megatron"], tmp_path / "again", source, silent)
    assert_same(contents(tmp_path / "again"), contents(source))
    files, again = (
        {name: path.name for name, path in open_directory(one).files.items()} for one in (source, tmp_path / "again")
    )
    assert files == again
    for path in (*source.glob("*.json"), *source.glob("*.jinja")):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", ["qwen3", "vision, tied"])
def test_to_sites_and_back(directories, tmp_path, name) -> None:
    """Directory -> plain Megatron -> a checkpoint for each site -> directory."""
    source = directories[name]
    from_huggingface(source, tmp_path / "megatron", silent)
    for site in Site:
        split(tmp_path / "megatron", site, holder_of, tmp_path / str(site), silent)
    cloud = open_checkpoint(tmp_path / "cloud" / "release").tensors
    assert cloud and not any("embedding" in key or "final_layernorm" in key for key in cloud)
    to_huggingface([tmp_path / "edge", tmp_path / "cloud"], tmp_path / "again", source, silent)
    assert_same(contents(tmp_path / "again"), contents(source))


@pytest.mark.parametrize("name", ["llama, tied", "qwen2.5, files", "vision"])
def test_a_directory_for_each_site(directories, tmp_path, name) -> None:
    """What the provider gets: middle layers, config.json, an index; in one directory both are the model again."""
    source, whole = directories[name], contents(directories[name])
    for site in Site:
        split_directory(source, site, holder_of, tmp_path / str(site), silent)
    edge, cloud = contents(tmp_path / "edge"), contents(tmp_path / "cloud")
    assert edge.keys() | cloud.keys() == whole.keys() and not edge.keys() & cloud.keys()
    assert {path.name for path in (tmp_path / "cloud").iterdir() if path.suffix != ".safetensors"} == {
        "config.json",
        "preprocessor_config.json",
        "model.safetensors.index.json",
    }
    assert (tmp_path / "edge" / "tokenizer.json").is_file()
    given = b"".join(path.read_bytes() for path in (tmp_path / "cloud").iterdir())
    for key, tensor in edge.items():
        if tensor.dim() == 2:
            assert tensor[1].contiguous().view(torch.uint8).numpy().tobytes() not in given, key
    opened = open_directory(tmp_path / "cloud", part=True)
    assert opened.tensors.keys() == cloud.keys() and opened.elsewhere.keys() == edge.keys()
    for path in (tmp_path / "cloud").glob("*.safetensors"):
        path.rename(tmp_path / "edge" / path.name)
    assert_same(contents(tmp_path / "edge"), whole)
    open_directory(tmp_path / "edge")


@dataclass(frozen=True)
class OfDirectory(Case):
    """The sizes of a directory's config.json."""

    settings: dict[str, Any] = field(default_factory=dict)

    def content(self) -> dict[str, Any]:
        given = super().content()
        given["model"] = {"seq_length": given["model"]["seq_length"], **self.settings["model"]}
        given["layers"], given["sites"]["cloud"]["pipeline_ranks"] = None, 1
        return given

    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.settings["vocab_size"])


@pytest.mark.parametrize(("name", "tensor"), [("llama, tied", 2), ("qwen3", 1)])
def test_stock_megatron_loads_and_saves_it(workers: Workers, directories, tmp_path, name, tensor) -> None:
    """Strictly, every tensor and every module's state; what it saves untrained is the directory again."""
    source = directories[name]
    from_huggingface(source, tmp_path / "megatron", silent)
    case = OfDirectory((4,), num_microbatches=1, optimizer="adam", settings=open_directory(source).settings)
    saved = tmp_path / "saved" / "iter_0000001"
    load = Run(
        case, tensor, first=1, steps=0, load=str(tmp_path / "megatron" / "release"), save=str(saved), finetune=True
    )
    run(workers, load)
    to_huggingface([tmp_path / "saved"], tmp_path / "again", source, silent)
    assert_same(contents(tmp_path / "again"), contents(source))


def test_another_model_than_the_directory_says(directories, tmp_path) -> None:
    from_huggingface(directories["qwen3"], tmp_path / "megatron", silent)
    with pytest.raises(ConfigError, match=r"is not of the model in .*llama: it has besides .*k_layernorm.weight"):
        to_huggingface([tmp_path / "megatron"], tmp_path / "again", directories["llama, tied"], silent)
    assert not (tmp_path / "again").exists()


def test_the_checkpoint_says_what_the_model_is(directories, tmp_path) -> None:
    from_huggingface(directories["qwen3"], tmp_path / "megatron", silent)
    common = open_checkpoint(tmp_path / "megatron" / "release").common
    given = vars(common["args"])
    assert (given["num_layers"], given["num_query_groups"], given["kv_channels"], given["swiglu"]) == (4, 2, 12, True)
    assert given["no_save_optim"] and "optimizer" not in common
    assert (tmp_path / "megatron" / "latest_checkpointed_iteration.txt").read_text() == "release"
