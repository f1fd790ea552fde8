"""What is refused before anything is loaded, and what it is told."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron.huggingface.directory import INDEX, SINGLE, open_directory
from ldt_schedules.megatron.huggingface.loading import load
from ldt_schedules.megatron.huggingface.safetensors_file import DTYPES, TensorInfo, write_safetensors
from ldt_schedules.megatron.huggingface.sizes import Sizes
from tests.huggingface.test_round_trip import rewrite
from tests.huggingface.tiny import contents, make


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("made")
    return {"one file": make(root / "one"), "sharded": make(root / "many", shard="10KB")}


@pytest.fixture
def one(made: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(made["one file"], tmp_path / "hf")


@pytest.fixture
def sharded(made: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(made["sharded"], tmp_path / "hf")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere is no directory; give a downloaded"):
        open_directory(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"has no config\.json; give a downloaded"):
        open_directory(tmp_path)


def test_pickles_are_not_read(one: Path) -> None:
    (one / SINGLE).unlink()
    (one / "notes.bin").unlink()
    with pytest.raises(ConfigError, match=r"holds neither model\.safetensors nor model\.safetensors\.index\.json"):
        open_directory(one)
    (one / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(ConfigError, match=r"holds pickles only \(pytorch_model\.bin\), .* opening one runs its code"):
        open_directory(one)


def test_an_unknown_architecture(one: Path) -> None:
    for named, shown in (["MistralForCausalLM"], "'MistralForCausalLM'"), ([], "None"), (None, "None"):
        edit(one / "config.json", architectures=named)
        with pytest.raises(ConfigError, match=f"{shown}; known are .*Qwen2_5_VLForConditionalGeneration.* Another"):
            _ = open_directory(one).settings


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_damaged_config(one: Path, content: str) -> None:
    (one / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json is no JSON"):
        open_directory(one)


@pytest.mark.parametrize("kept", [0, 5, 100, 3000, -1])
def test_a_truncated_file(one: Path, kept: int) -> None:
    whole = (one / SINGLE).read_bytes()
    (one / SINGLE).write_bytes(whole[:kept])
    with pytest.raises(ConfigError, match=r"model\.safetensors is no whole safetensors file \(.*\); download or copy"):
        open_directory(one)


def test_a_git_lfs_pointer(one: Path) -> None:
    (one / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n")
    with pytest.raises(ConfigError, match=r"is a git-lfs pointer, not the file; run `git lfs pull`"):
        open_directory(one)


def test_a_site_needs_the_files_with_its_own_tensors_alone(sharded: Path) -> None:
    """Every file away in turn: what it held cannot be loaded, all the rest can; a tensor of no model is still seen."""
    whole = open_directory(sharded)
    sizes = Sizes.of(whole.settings)
    pairs = whole.pairs(sizes)
    (sharded / "aside").mkdir()
    for file in sorted(set(whole.files.values())):
        file.rename(sharded / "aside" / file.name)
        part = open_directory(sharded, part=True)
        gone = {name for name, where in whole.files.items() if where == file}
        assert set(part.elsewhere) == gone and set(part.tensors) == set(whole.tensors) - gone
        for name, pair in part.pairs(sizes).items():
            assert pair.names == pairs[name].names
            if pair.tied_to is not None:
                continue
            parameter = [(name, torch.zeros(pair.shape))]
            if gone.isdisjoint(pair.names):
                load(part, parameter, sizes)
            else:
                with pytest.raises(ConfigError, match=f"lacks files with tensors of this process: {file.name}"):
                    load(part, parameter, sizes)
        (sharded / "aside" / file.name).rename(file)


def test_shards(sharded: Path) -> None:
    directory = open_directory(sharded)
    assert len(set(directory.files.values())) > 3
    assert {name: (t.shape, DTYPES[t.dtype]) for name, t in directory.tensors.items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in contents(sharded).items()
    }
    index = json.loads((sharded / INDEX).read_text())
    last = sorted(sharded.glob("*.safetensors"))[-1]
    (sharded / "aside").mkdir()
    last.rename(sharded / "aside" / last.name)
    with pytest.raises(ConfigError, match=f"lacks files that its index names: {last.name}; copy them there"):
        open_directory(sharded)
    save_file({"other": torch.zeros(1)}, last)
    with pytest.raises(ConfigError, match="names tensors that its files do not hold:\n  "):
        open_directory(sharded)
    first = sorted(sharded.glob("*.safetensors"))[0]
    shutil.copyfile(first, last)
    with pytest.raises(ConfigError, match=f"is in .*{first.name} and in .*{last.name}; one of them"):
        open_directory(sharded)
    edit(sharded / INDEX, weight_map={**index["weight_map"], "a": "../elsewhere.safetensors"})
    with pytest.raises(ConfigError, match=r"names files outside the directory: \.\./elsewhere\.safetensors"):
        open_directory(sharded)
    edit(sharded / INDEX, weight_map={})
    with pytest.raises(ConfigError, match="has no weight_map; download it again"):
        open_directory(sharded)


def test_all_differences_at_once(one: Path) -> None:
    missing = "model.layers.1.mlp.up_proj.weight"
    rewrite(
        one,
        {
            missing: None,
            "model.layers.2.input_layernorm.weight": torch.zeros(32),
            "visual.blocks.0.norm1.weight": torch.zeros(17),
            "model.norm.weight": torch.zeros(32, dtype=torch.int8),
        },
    )
    directory = open_directory(one)
    with pytest.raises(ConfigError) as raised:
        directory.pairs(Sizes.of(directory.settings))
    assert str(raised.value).splitlines() == [
        f"{one} does not fit the model (4 of 69 tensors):",
        f"  {missing}: missing",
        "  model.layers.2.input_layernorm.weight: not a tensor of this model",
        "  model.norm.weight: dtype I8, read are F64, F32, F16, BF16",
        "  visual.blocks.0.norm1.weight: [17], the model has [16]",
        "Give the model the sizes of its config.json, or another directory",
    ]


def test_another_model(one: Path) -> None:
    """A long list is cut, its length told."""
    directory = open_directory(one)
    sizes = Sizes.of(directory.settings)
    with pytest.raises(ConfigError, match=r"\(24 of 93 tensors\):(\n  .*: missing){20}\n  and 4 more\nGive"):
        directory.pairs(replace(sizes, num_layers=4))
    with pytest.raises(ConfigError, match=r"up_proj\.weight: \[48, 32\], the model has \[50, 32\]"):
        directory.pairs(replace(sizes, ffn_hidden_size=50))
    with pytest.raises(ConfigError, match=r"lm_head\.weight: missing"):
        rewrite(one, {"lm_head.weight": None})
        open_directory(one).pairs(sizes)


def test_slices(one: Path) -> None:
    directory, whole = open_directory(one), contents(one)
    with directory.reading() as read:
        for name, tensor in whole.items():
            matrix = tensor if tensor.dim() == 1 else tensor.flatten(1)
            for rows in (slice(0, len(tensor)), slice(1, 3), slice(2, 2)):
                assert torch.equal(read(name, rows, slice(None)), matrix[rows])
                if tensor.dim() > 1:
                    assert torch.equal(read(name, rows, slice(3, 8)), matrix[rows, 3:8])


def test_a_written_file_is_as_safetensors_would_write_it(tmp_path: Path) -> None:
    """Mixed dtypes, odd lengths and empty tensors, put in any order: read back by safetensors, and as long as its own file."""
    tensors = {
        f"{name}.{kind}": torch.randn(shape).to(dtype)
        for kind, dtype in DTYPES.items()
        for name, shape in {"z": (3,), "empty": (0, 4), "m": (3, 5), "five": (1, 1, 3, 1, 7)}.items()
    }
    infos = {name: TensorInfo(tuple(tensor.shape), name.split(".")[1]) for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    with write_safetensors(tmp_path / "ours", infos) as writer:
        for name in sorted(tensors):
            writer.put(name, tensors[name])
    with safe_open(tmp_path / "ours", framework="pt") as opened:
        assert all(torch.equal(opened.get_tensor(name), tensor) for name, tensor in tensors.items())
        assert opened.metadata() == {"format": "pt"}
    data = [(tmp_path / one).read_bytes() for one in ("ours", "theirs")]
    ours, theirs = (one[8 + int.from_bytes(one[:8], "little") :] for one in data)
    assert len(ours) == len(theirs)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_tensor_that_is_never_written(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="never written: \\['b'\\]"),
        write_safetensors(tmp_path / "file", {name: TensorInfo((1,), "F32") for name in "ab"}) as writer,
    ):
        writer.put("a", torch.zeros(1))
    assert list(tmp_path.iterdir()) == []
