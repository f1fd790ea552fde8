"""One command line in, each site's own out: flags, sites, arguments, refusals."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron_lm import flags
from ldt_schedules.megatron_lm.describe import description
from ldt_schedules.megatron_lm.environment import launched_as
from ldt_schedules.megatron_lm.refusals import (
    HONOURED,
    HONOURED_VALUES,
    REASONS,
    refuse_what_a_u_cannot_honour,
)
from ldt_schedules.megatron_lm.site_arguments import EDGE_ONLY_FLAGS, given_flags, site_arguments, without
from ldt_schedules.megatron_lm.sites import sites
from ldt_schedules.topology import Site
from tests.megatron_lm.checkout import words

ON = "--layerwise-disaggregated-training --num-layers 12 "


def parsed(text: str) -> flags.Flags:
    return flags.parse((ON + text).split())


@pytest.mark.parametrize(
    "written", ["--ldt-layers 2,4,5,1", "--num-layer-list 2,4,5,1", "--ldt-layers Et*2|t*4|t*5|tL"]
)
def test_layers_as_three_kinds_of_users_write_them(written: str) -> None:
    assert parsed(f"--pipeline-model-parallel-size 3 {written}").layers == (2, 4, 5, 1)


def test_layers_are_even_when_nothing_is_said() -> None:
    assert parsed("--pipeline-model-parallel-size 3").layers == (3, 3, 3, 3)


@pytest.mark.parametrize(
    "text, told",
    [
        ("", "--pipeline-model-parallel-size is 1; it counts the edge"),
        ("--pipeline-model-parallel-size 1", "at least 2"),
        ("--pipeline-model-parallel-size 3 --ldt-layers 2,4,6", "describe 3 stages"),
        ("--pipeline-model-parallel-size 3 --ldt-layers 2,4,5,2", "= 13, but the model has 12"),
        ("--pipeline-model-parallel-size 3 --ldt-layers 2,,4", "whole numbers"),
        ("--pipeline-model-parallel-size 3 --ldt-link cloud", "write HOST:PORT"),
        ("--pipeline-model-parallel-size 3 --ldt-link cloud:99999", "write HOST:PORT"),
        ("--pipeline-model-parallel-size 3 --ldt-site middle", "invalid choice"),
        ("--pipeline-model-parallel-size three", "invalid int value"),
        ("--pipeline-model-parallel-size 3 --num-virtual-stages-per-pipeline-rank 4", "has no virtual pipeline"),
    ],
)
def test_mistakes_are_told(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told.replace("(", r"\(")):
        parsed(text)


def test_the_number_of_layers_must_be_on_the_command_line() -> None:
    with pytest.raises(ConfigError, match="--num-layers is missing"):
        flags.parse(["--layerwise-disaggregated-training", "--pipeline-model-parallel-size", "3"])


def test_upstreams_virtual_stages_are_accepted_and_said_to_be_ignored() -> None:
    read = parsed("--pipeline-model-parallel-size 3 --num-virtual-stages-per-pipeline-rank 2")
    assert "--num-virtual-stages-per-pipeline-rank" not in read.others
    assert "ignored" in description(sites(read, 0, 3))


def test_what_is_not_ours_goes_through_in_order() -> None:
    read = parsed(
        "--pipeline-model-parallel-size 3 --lr 1e-3 --lr-warmup-fraction=.01 --rampup-batch-size 2 2 8 --x -1"
    )
    assert read.others == words("--lr 1e-3 --lr-warmup-fraction=.01 --rampup-batch-size 2 2 8 --x -1")


@pytest.mark.parametrize("ranks", range(2, 7))
@pytest.mark.parametrize("tensor", itertools.product((1, 2, 4), repeat=2))
@pytest.mark.parametrize("data", [(1, 1), (1, 2), (2, 2), (2, 6)])
def test_one_launch_and_two_launches_make_the_same_sites(
    ranks: int, tensor: tuple[int, int], data: tuple[int, int]
) -> None:
    edge, cloud = tensor[0] * data[0], tensor[1] * data[1] * (ranks - 1)
    text = f"--pipeline-model-parallel-size {ranks} --tensor-model-parallel-size {tensor[1]} --ldt-layers "
    text += ",".join(["12", *["0"] * ranks])
    text += f" --ldt-edge-tensor-model-parallel-size {tensor[0]} --ldt-edge-world-size {edge}"
    apart = text + f" --ldt-cloud-world-size {cloud} --ldt-link cloud:29600"
    places = []
    for rank in range(edge + cloud):
        together = sites(parsed(text), rank, edge + cloud)
        site, counts = together.place.site, {Site.EDGE: edge, Site.CLOUD: cloud}
        alone = sites(parsed(f"{apart} --ldt-site {site}"), together.place.site_rank, counts[site])
        assert (alone.topology, alone.place) == (together.topology, together.place)
        assert (together.together, alone.together) == (True, False)
        places.append(together.place)
    assert [place.site for place in places] == [Site.EDGE] * edge + [Site.CLOUD] * cloud
    assert together.topology.edge.data, together.topology.cloud.data == data


@pytest.mark.parametrize(
    "text, processes, told",
    [
        ("", 4, "the cloud has 3 processes"),
        (
            "--tensor-model-parallel-size 2",
            5,
            "the cloud has 3 processes, but a replica of its part of the model takes 4",
        ),
        ("--ldt-edge-world-size 3 --ldt-edge-tensor-model-parallel-size 2", 5, "the edge has 3 processes"),
        ("--ldt-edge-world-size 3", 3, "the cloud has 0 processes"),
        ("--ldt-edge-world-size 2", 8, "not a multiple of the edge's 2"),
        ("--ldt-cloud-world-size 4", 3, "--ldt-cloud-world-size is 4, but 3 processes"),
        ("--ldt-site cloud", 2, "--ldt-link HOST:PORT"),
        ("--ldt-site cloud --ldt-link a:1 --ldt-cloud-world-size 4", 2, "launched with 2 processes"),
        ("--ldt-site edge --ldt-link a:1 --ldt-edge-tensor-model-parallel-size 2", 3, "the edge has 3 processes"),
    ],
)
def test_process_counts_that_do_not_fit_are_told(text: str, processes: int, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        sites(parsed(f"--pipeline-model-parallel-size 3 {text}"), 0, processes)


def test_a_count_that_does_not_fit_shows_each_sites_view() -> None:
    with pytest.raises(ConfigError) as told:
        sites(parsed("--pipeline-model-parallel-size 3 --tensor-model-parallel-size 2"), 0, 5)
    assert "edge: TP 2 x context 1 x pipeline 1" in str(told.value)
    assert "cloud: TP 2 x context 1 x pipeline 2" in str(told.value)


def arguments_of(site: Site, text: str, ranks: int = 3) -> dict[str, str | None]:
    read = parsed(f"--pipeline-model-parallel-size {ranks} {text}")
    edge = read.edge_tensor_size
    found = sites(read, 0 if site is Site.EDGE else edge, edge + read.cloud_tensor_size * (ranks - 1))
    assert found.place.site is site
    return given_flags(site_arguments(found))


def test_each_site_gets_plain_parallel_sizes() -> None:
    text = "--tensor-model-parallel-size 4 --ldt-edge-tensor-model-parallel-size 2 --sequence-parallel"
    edge, cloud = arguments_of(Site.EDGE, text), arguments_of(Site.CLOUD, text)
    assert (edge["--tensor-model-parallel-size"], edge["--pipeline-model-parallel-size"]) == ("2", "1")
    assert (cloud["--tensor-model-parallel-size"], cloud["--pipeline-model-parallel-size"]) == ("4", "2")
    assert "--sequence-parallel" in edge and "--sequence-parallel" in cloud
    assert not any(flag.startswith("--ldt") or "disaggregated" in flag for flag in {*edge, *cloud})
    assert (edge["--rerun-mode"], cloud["--rerun-mode"]) == ("disabled", "disabled")


def test_a_single_tensor_rank_has_no_sequence_parallelism() -> None:
    text = "--tensor-model-parallel-size 2 --ldt-edge-tensor-model-parallel-size 1 --sequence-parallel"
    assert "--sequence-parallel" not in arguments_of(Site.EDGE, text)
    assert "--sequence-parallel" in arguments_of(Site.CLOUD, text)


def test_the_cloud_is_told_of_no_data_and_no_tokenizer() -> None:
    told = " ".join(f"{flag} /secret/{number} /secret/more" for number, flag in enumerate(EDGE_ONLY_FLAGS))
    edge, cloud = (arguments_of(site, f"--lr 0.1 {told} --wandb-project=secret --seed 1") for site in Site)
    assert {*EDGE_ONLY_FLAGS} <= {*edge}
    assert "secret" not in str(cloud) and (cloud["--lr"], cloud["--seed"]) == ("0.1", "1")
    assert cloud["--tokenizer-type"] == "NullTokenizer"


def test_only_the_edge_ties_embeddings() -> None:
    assert "--untie-embeddings-and-output-weights" not in arguments_of(Site.EDGE, "")
    assert "--untie-embeddings-and-output-weights" in arguments_of(Site.CLOUD, "")
    assert "--untie-embeddings-and-output-weights" in arguments_of(Site.EDGE, "--untie-embeddings-and-output-weights")


@pytest.mark.parametrize("num_layers", range(1, 13))
@pytest.mark.parametrize("ranks", range(2, 7))
def test_megatrons_division_of_the_layers_comes_out(num_layers: int, ranks: int) -> None:
    """Its rule: with a first stage of x layers the others share the rest; else all share all."""
    layers = ",".join(map(str, [num_layers, *[0] * ranks]))
    text = f"--layerwise-disaggregated-training --num-layers {num_layers} --pipeline-model-parallel-size {ranks}"
    read = flags.parse(f"{text} --ldt-layers {layers}".split())
    given = given_flags(site_arguments(sites(read, ranks - 1, ranks)))
    stages = ranks - 1
    first = given.get("--decoder-first-pipeline-num-layers")
    if first is None:
        assert num_layers % stages == 0
    else:
        assert int(first) > 0 and (num_layers - int(first)) % (stages - 1) == 0


def test_checkpoints_get_a_folder_for_each_site(tmp_path: Path) -> None:
    for site in Site:
        given = arguments_of(site, f"--save {tmp_path}/out --load={tmp_path}/out")
        assert given["--save"] == given["--load"] == f"{tmp_path}/out/{site}" and "--no-load-rng" not in given


def test_a_checkpoint_of_the_whole_model_is_read_by_both(tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    for site in Site:
        assert arguments_of(site, f"--load {tmp_path} --save {tmp_path}")["--load"] == str(tmp_path)
        given = arguments_of(site, f"--load {tmp_path} --save {tmp_path}")
        assert given["--save"] == f"{tmp_path}/{site}" and "--no-load-rng" in given


def test_a_flag_goes_with_all_its_values() -> None:
    line = words("--keep 1 --data-path 0.3 a 0.7 b --lr -1 --split=1,2 --on")
    assert tuple(without(line, ("--data-path", "--split"))) == words("--keep 1 --lr -1 --on")


def test_refusals_name_each_flag_and_let_the_users_own_pass() -> None:
    known = {*HONOURED, *REASONS, *HONOURED_VALUES, "--new-in-megatron-1"}
    refuse_what_a_u_cannot_honour(["--lr", "1", "--my-own", "2", "--optimizer", "sgd"], known)
    with pytest.raises(ConfigError) as told:
        refuse_what_a_u_cannot_honour(
            ["--num-experts", "8", "--new-in-megatron-1", "--optimizer=muon", "--ldt-layer", "1"], known
        )
    lines = str(told.value).splitlines()[1:-1]
    assert [line.split()[0].rstrip(":") for line in lines] == [
        "--num-experts",
        "--new-in-megatron-1",
        "--optimizer",
        "--ldt-layer",
    ]
    assert "did you mean --ldt-layers" in lines[-1]


def test_a_cloud_stage_without_layers_cannot_be_saved_or_loaded() -> None:
    refuse_what_a_u_cannot_honour(["--save", "here"], HONOURED, (0, 2, 2, 0))
    refuse_what_a_u_cannot_honour(["--lr", "1"], HONOURED, (1, 0, 2, 1))
    with pytest.raises(ConfigError, match="--save: .*a cloud stage of --ldt-layers has 0 layers"):
        refuse_what_a_u_cannot_honour(["--save", "here"], HONOURED, (1, 0, 2, 1))


def test_every_refusal_says_why_and_none_is_honoured_as_well() -> None:
    assert not HONOURED & REASONS.keys()
    assert HONOURED_VALUES.keys() <= HONOURED
    assert all(len(reason) > 20 for reason in REASONS.values())


def test_a_process_without_a_launcher_is_told_to_use_one() -> None:
    with pytest.raises(ConfigError, match="MASTER_ADDR, MASTER_PORT are not set: start the processes with a launcher"):
        launched_as({"RANK": "0", "WORLD_SIZE": "2"})
