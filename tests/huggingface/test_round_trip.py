"""A directory -> parameters of Megatron's names, cut and split -> a directory: byte-identical in every tensor."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from ldt_schedules.errors import ConfigError, LdtError
from ldt_schedules.megatron.huggingface.directory import INDEX, SINGLE, open_directory
from ldt_schedules.megatron.huggingface.loading import TensorParallel, load
from ldt_schedules.megatron.huggingface.saving import check_target, file_names, save
from ldt_schedules.megatron.huggingface.sizes import Sizes
from tests.huggingface.tiny import assert_same, contents, empty_parameters, make

_CLOUD = {"vision.decoder.layers.1.": 1, "language.decoder.layers.0.": 2, "language.decoder.layers.1.": 1}


def two_sites(name: str) -> int:
    """The edge has both ends and the projector, cloud ranks 1 and 2 the middle layers of the ViT and of the language model."""
    return next((rank for start, rank in _CLOUD.items() if name.startswith(start)), 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shard", [None, "10KB"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("published", [True, False])
def test_split_over_two_sites(
    tmp_path: Path, dtype: torch.dtype, shard: str | None, tied: bool, published: bool
) -> None:
    source = open_directory(make(tmp_path / "hf", tied=tied, dtype=dtype, published=published, shard=shard))
    assert ((tmp_path / "hf" / INDEX).exists(), "lm_head.weight" in source.tensors) == (shard is not None, not tied)
    sizes = Sizes.of(source.settings, padded_vocab_size=176)
    parameters = empty_parameters(source, sizes)
    if tied:
        del parameters["language.output_layer.weight"]
    for rank in range(3):
        held = {name: values for name, values in parameters.items() if two_sites(name) == rank}
        load(source, held.items(), sizes)
        assert not any(values.isnan().any() for values in held.values())
        site = "edge" if rank == 0 else "cloud"
        save(tmp_path / site, source, held.items(), sizes, two_sites, rank)
    assert not (tmp_path / "cloud" / INDEX).exists()
    for path in (tmp_path / "cloud").iterdir():
        path.rename(tmp_path / "edge" / path.name)
    saved = open_directory(tmp_path / "edge")
    assert_same(contents(tmp_path / "hf"), contents(tmp_path / "edge"))
    assert saved.tensors == source.tensors and len(set(saved.files.values())) == 3
    assert saved.config == source.config
    assert sorted(path.name for path in (tmp_path / "edge").iterdir() if path.suffix != ".safetensors") == [
        "config.json",
        "generation_config.json",
        INDEX,
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_reads_what_is_saved(tmp_path: Path, tied: bool) -> None:
    from transformers import Qwen2_5_VLForConditionalGeneration

    source = open_directory(make(tmp_path / "hf", tied=tied))
    sizes = Sizes.of(source.settings)
    parameters = empty_parameters(source, sizes)
    load(source, parameters.items(), sizes)
    for rank in range(3):
        held = [(name, values) for name, values in parameters.items() if two_sites(name) == rank]
        save(tmp_path / "saved", source, held, sizes, two_sites, rank)
    first, second = (
        Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / one, dtype=torch.bfloat16).state_dict()
        for one in ("hf", "saved")
    )
    assert_same(first, second)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (8, 4), (4, 1), (12, 4), (8, 8)])
def test_tensor_parallel_slices_make_the_whole(tmp_path: Path, heads: int, groups: int, size: int) -> None:
    """No process groups here: what each process reads, put together by the table, is the directory."""
    source = open_directory(make(tmp_path / "hf", heads=heads, groups=groups, layers=1))
    sizes = Sizes.of(source.settings, padded_vocab_size=192)
    processes = []
    for rank in range(size):
        parameters = empty_parameters(source, sizes, size)
        load(source, parameters.items(), sizes, TensorParallel(rank, size))
        processes.append(parameters)
    again = {}
    for name, pair in source.pairs(sizes).items():
        parts = [parameters[name] for parameters in processes]
        assert not any(part.isnan().any() for part in parts)
        if pair.cut_dim(parts[0].shape, size) is None:
            assert all(torch.equal(part, parts[0]) for part in parts)
            parts = parts[:1]
        again.update(zip(pair.names, pair.unpack(parts, [torch.bfloat16] * len(pair.names)), strict=True))
    assert_same(contents(tmp_path / "hf"), again)


@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_is_mapped_once(tmp_path: Path, tied: bool, published: bool) -> None:
    source = open_directory(make(tmp_path / "hf", tied=tied, published=published))
    pairs = source.pairs(Sizes.of(source.settings))
    counts = Counter(name for pair in pairs.values() if pair.tied_to is None for name in pair.names)
    assert set(counts) == set(source.tensors) and set(counts.values()) == {1}
    assert all(name == pair.megatron for name, pair in pairs.items())
    assert len(pairs) == 6 + 3 + 3 * 10 + 2 * 7
    assert source.tensors["lm_head.weight"].shape == (168, 32) if not tied else "lm_head.weight" not in counts


def test_a_tied_weight_under_either_name(tmp_path: Path) -> None:
    """megatron-core's output layer and embedding are one parameter then; a module may name it by either."""
    source = open_directory(make(tmp_path / "hf", tied=True))
    sizes = Sizes.of(source.settings)
    parameters = empty_parameters(source, sizes)
    load(source, parameters.items(), sizes)
    embedding = parameters.pop("language.embedding.word_embeddings.weight")
    assert torch.equal(embedding, parameters["language.output_layer.weight"])
    save(tmp_path / "saved", source, parameters.items(), sizes, lambda name: 0, 0)
    assert_same(contents(tmp_path / "hf"), contents(tmp_path / "saved"))


def rewrite(path: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Set or, with None, remove tensors of a one-file directory."""
    from safetensors.torch import save_file

    tensors = {**contents(path), **change}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path / SINGLE)


def test_a_tied_directory_that_holds_the_output_layer_too(tmp_path: Path) -> None:
    path = make(tmp_path / "hf", tied=True)
    embedding = contents(path)["model.embed_tokens.weight"]
    rewrite(path, {"lm_head.weight": embedding.clone()})
    source = open_directory(path)
    sizes = Sizes.of(source.settings)
    parameters = empty_parameters(source, sizes)
    load(source, parameters.items(), sizes)
    save(tmp_path / "saved", source, parameters.items(), sizes, lambda name: 0, 0)
    assert_same(contents(path), contents(tmp_path / "saved"))
    rewrite(path, {"lm_head.weight": embedding + 1})
    with pytest.raises(
        ConfigError, match=r"ties the embeddings, but lm_head\.weight differs .* Set tie_word_embeddings"
    ):
        load(open_directory(path), parameters.items(), sizes)


def test_dtypes_differ_within_a_directory(tmp_path: Path) -> None:
    path = make(tmp_path / "hf")
    tensors = contents(path)
    wide = {name: values.float() for name, values in tensors.items() if "norm" in name or "k_proj" in name}
    rewrite(path, {**wide, "model.norm.weight": torch.rand(32).double()})
    source = open_directory(path)
    sizes = Sizes.of(source.settings)
    parameters = empty_parameters(source, sizes, dtype=torch.float64)
    load(source, parameters.items(), sizes)
    save(tmp_path / "saved", source, parameters.items(), sizes, lambda name: 0, 0)
    assert_same(contents(path), contents(tmp_path / "saved"))


def test_only_what_a_process_holds_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One cloud rank of a sharded directory, one of two tensor-parallel processes: bytes read are bytes held."""
    from ldt_schedules.megatron.huggingface import mapping

    source = open_directory(make(tmp_path / "hf", shard="10KB"))
    sizes = Sizes.of(source.settings)
    held = {name: p for name, p in empty_parameters(source, sizes, 2).items() if "language.decoder.layers.1" in name}
    read_numbers = []
    original = mapping.Part.fill

    def counting(self: mapping.Part, target: torch.Tensor, read: mapping.Read) -> None:
        def counted(name: str, rows: slice, columns: slice) -> torch.Tensor:
            values = read(name, rows, columns)
            read_numbers.append((name, values.numel()))
            return values

        original(self, target, counted)

    monkeypatch.setattr(mapping.Part, "fill", counting)
    load(source, held.items(), sizes, TensorParallel(1, 2))
    assert {name.split(".")[2] for name, _ in read_numbers} == {"1"}
    assert sum(count for _, count in read_numbers) == sum(values.numel() for values in held.values())


def test_parameters_that_do_not_fit(tmp_path: Path) -> None:
    source = open_directory(make(tmp_path / "hf"))
    sizes = Sizes.of(source.settings)
    wrong = [("language.nonsense", torch.empty(3)), ("vision.patch_embed.weight", torch.empty(5, 96))]
    with pytest.raises(
        LdtError, match=r"language\.nonsense is not in the table\n.*patch_embed\.weight is \[5, 96\] on"
    ):
        load(source, wrong, sizes)
    with pytest.raises(
        LdtError, match=r"pipeline rank 1 does not hold what it should save: missing \['language\.decoder"
    ):
        save(tmp_path / "saved", source, [], sizes, two_sites, 1)


def test_targets_that_are_refused(tmp_path: Path) -> None:
    source = open_directory(make(tmp_path / "hf"))
    (tmp_path / "link").symlink_to(tmp_path / "hf")
    for target in (tmp_path / "hf", tmp_path / "link"):
        with pytest.raises(ConfigError, match="is the directory from which the model is loaded; save to another"):
            check_target(target, source)
    with pytest.raises(ConfigError, match="is a file; name a directory"):
        check_target(tmp_path / "hf" / "config.json", source)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / SINGLE).touch()
    with pytest.raises(ConfigError, match=r"holds a model\.safetensors, which would be read instead"):
        check_target(tmp_path / "old", source)
    check_target(tmp_path / "new" / "deeper", source)


def test_a_failure_leaves_no_file(tmp_path: Path) -> None:
    source = open_directory(make(tmp_path / "hf"))
    sizes = Sizes.of(source.settings)
    parameters = empty_parameters(source, sizes)
    parameters["vision.patch_embed.weight"] = torch.empty(16, 96, device="meta")
    with pytest.raises(NotImplementedError, match="meta"):
        save(tmp_path / "saved", source, parameters.items(), sizes, lambda name: 0, 0)
    assert list((tmp_path / "saved").iterdir()) == []


def test_ranks_without_tensors_have_no_file(tmp_path: Path) -> None:
    source = open_directory(make(tmp_path / "hf"))
    pairs = source.pairs(Sizes.of(source.settings))
    names = file_names(pairs, lambda name: 3 if name.startswith("language.decoder") else 0)
    assert names == {0: "model-00001-of-00002.safetensors", 3: "model-00002-of-00002.safetensors"}


def test_the_index_counts_bytes(tmp_path: Path) -> None:
    source = open_directory(make(tmp_path / "hf", shard="10KB"))
    sizes = Sizes.of(source.settings)
    parameters = empty_parameters(source, sizes)
    save(tmp_path / "saved", source, parameters.items(), sizes, lambda name: 0, 0)
    theirs, ours = (json.loads((tmp_path / one / INDEX).read_text()) for one in ("hf", "saved"))
    assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
