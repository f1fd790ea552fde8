"""The cost model against real megatron-core stages: operations counted by torch, bytes counted as autograd saves them."""

from __future__ import annotations

from typing import Any

import pytest

from ldt_schedules.errors import ConfigError
from ldt_schedules.planning import plan, simulate
from ldt_schedules.planning.costs import Link
from ldt_schedules.planning.layout import Layout
from ldt_schedules.topology import Site
from ldt_schedules.training.config import TrainConfig
from ldt_schedules.training.cost_model import (
    GIB,
    activation_bytes,
    describe_costs,
    problem_of,
    stage_work,
    static_bytes,
)
from ldt_schedules.training.describe import ELEMENT_BYTES
from ldt_schedules.training.vocabulary import Vocabulary
from tests.helpers.workers import Workers, site_ports
from tests.training.measuring import Counted, count, of_both_sites, site_world

VOCABULARY = 512
SMALL = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 48}
RICH = {"num_query_groups": 2, "activation": "swiglu", "ffn_hidden_size": 160, "linear_bias": True}
ABSOLUTE = {"position_embedding": "learned_absolute"}

CASES: dict[str, dict[str, Any]] = {
    "plain": {"model": {}},
    "rich": {"model": RICH},
    "rich, layer norm, learned positions": {"model": {**RICH, **ABSOLUTE, "normalization": "LayerNorm"}},
    "layer norm, learned positions": {"model": {**ABSOLUTE, "normalization": "LayerNorm"}},
    "bf16": {"model": {"precision": "bf16"}},
    "bf16, rich, layer norm": {"model": {**RICH, "precision": "bf16", "normalization": "LayerNorm"}},
    "fp16, swiglu": {"model": {"precision": "fp16", "activation": "swiglu"}},
    "fp64": {"model": {"precision": "fp64"}},
    "wide heads": {"model": {"head_dim": 24}},
    "narrow heads, rich": {"model": {**RICH, "head_dim": 8}},
    "norms of heads": {"model": {"qk_norm": True}},
    "norms of wide heads, rich": {"model": {**RICH, "qk_norm": True, "head_dim": 24}},
    "bf16, norms of heads, rich": {"model": {**RICH, "qk_norm": True, "precision": "bf16"}},
    "layer norms of heads": {"model": {"qk_norm": True, "normalization": "LayerNorm"}},
    "norms of heads, learned positions": {"model": {**ABSOLUTE, "qk_norm": True}},
    "norms of heads, selective recompute": {"model": {"qk_norm": True}, "train": {"recompute": "selective"}},
    "norms of heads, rich, selective recompute": {
        "model": {**RICH, "qk_norm": True},
        "train": {"recompute": "selective"},
    },
    "full recompute": {"model": {}, "train": {"recompute": "full"}},
    "bf16, full recompute": {"model": {"precision": "bf16"}, "train": {"recompute": "full"}},
    "selective recompute": {"model": {}, "train": {"recompute": "selective"}},
    "rich, selective recompute": {"model": RICH, "train": {"recompute": "selective"}},
    "head and tail without layers": {"model": {}, "layers": [0, 4, 0]},
}


def config_of(model: dict[str, Any] | None = None, train: dict[str, Any] | None = None, **sections: Any) -> TrainConfig:
    given = {
        "model": {**SMALL, **(model or {})},
        "layers": [1, 2, 1],
        "sites": {"cloud": {"pipeline_ranks": 1}},
        "train": {"global_batch_size": 12, "micro_batch_size": 3, **(train or {})},
    }
    return TrainConfig.model_validate({**given, **sections})


TWO: dict[str, Any] = {"sites": {"edge": {"tensor_parallel": 2}, "cloud": {"tensor_parallel": 2, "pipeline_ranks": 1}}}
SHARED: dict[str, dict[str, Any]] = {
    "two processes": {"model": {}, **TWO},
    "two processes, rich": {"model": RICH, **TWO},
    "two processes, norms of wide heads, rich": {"model": {**RICH, "qk_norm": True, "head_dim": 24}, **TWO},
    "two processes, bf16": {"model": {"precision": "bf16"}, **TWO},
}


def measure(
    site: Site, rank: int, cases: dict[str, dict[str, Any]], port: int
) -> dict[str, dict[int, tuple[Counted, int]]]:
    """In a world of this site alone: for each case and stage what it computes and keeps, and bytes of state."""
    from ldt_schedules.training.model import build

    topology = config_of(**next(iter(cases.values()))).topology
    with site_world(topology, site, rank, port) as place:
        configs = {name: config_of(**case) for name, case in cases.items()}
        return {
            name: _measure_stages(config, site, build(config, topology, place, Vocabulary(VOCABULARY)))
            for name, config in configs.items()
        }


def _measure_stages(config: TrainConfig, site: Site, trained: Any) -> dict[int, tuple[Counted, int]]:
    import torch

    from ldt_schedules.megatron.chunks import modules_on_rank

    buffers = [*trained.model.buffers, *trained.model.expert_parallel_buffers]
    state = sum(p.nbytes for p in trained.model.parameters()) + sum(b.grad_data.nbytes for b in buffers)
    state += _optimizer_bytes(trained.optimizer)
    samples, sequence = config.train.micro_batch_size, config.model.seq_length
    tokens = torch.randint(0, VOCABULARY, (samples, sequence))
    positions = torch.arange(sequence).expand(samples, -1).contiguous()
    found = {}
    rank = 0 if site is Site.EDGE else 1
    for number, module in modules_on_rank([trained.model], Layout.u(config.num_pipeline_ranks), rank).items():
        stage = number if site is Site.EDGE else 1
        given = torch.randn(sequence, samples, config.model.hidden_size, dtype=trained.config.params_dtype)
        arguments = (None, None, None) if site is Site.CLOUD else (tokens, positions, None)
        labels = {"labels": tokens} if stage == 2 else {}
        found[stage] = (count(module, given.requires_grad_() if stage else None, *arguments, **labels), state)
    return found


def _optimizer_bytes(optimizer: Any) -> int:
    """The fp32 copies of 16-bit weights, and Adam's moments, as Megatron makes them before it loads a checkpoint."""
    optimizer = optimizer.chained_optimizers[0] if hasattr(optimizer, "chained_optimizers") else optimizer
    optimizer.init_state_fn(optimizer.optimizer, optimizer.config)
    copies = sum(p.nbytes for group in getattr(optimizer, "fp32_from_float16_groups", []) for p in group)
    moments = (t for state in optimizer.optimizer.state.values() for t in state.values() if getattr(t, "ndim", 0))
    return copies + sum(t.nbytes for t in moments)


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[int, tuple[Counted, int]]]:
    """Of every case, all three stages."""
    return of_both_sites(measure, CASES, timeout_s=120)


@pytest.mark.parametrize("name", CASES)
def test_operations_are_those_that_torch_counts(name: str, measured: dict[str, Any]) -> None:
    """To the last one, forward and backward, recomputation included."""
    for stage, work in enumerate(stage_work(config_of(**CASES[name]), VOCABULARY)):
        counted, _ = measured[name][stage]
        assert work.forward == counted.forward, stage
        assert work.input_grad + work.weight_grad == counted.backward, stage


@pytest.mark.parametrize("name", CASES)
def test_bytes_are_those_that_autograd_keeps(name: str, measured: dict[str, Any]) -> None:
    """Within 1 %; token ids, the loss mask, sums of tokens and a shared table of angles (40 bytes a token) are left out."""
    for stage, modelled in enumerate(activation_bytes(config_of(**CASES[name]), VOCABULARY)):
        kept = measured[name][stage][0].kept
        tokens = 48 * 3
        assert modelled == pytest.approx(kept, rel=0.01, abs=40 * tokens), (stage, modelled / kept)


@pytest.mark.parametrize("name", CASES)
def test_static_memory_is_what_megatron_allocates(name: str, measured: dict[str, Any]) -> None:
    for rank in range(2):
        assert static_bytes(config_of(**CASES[name]), rank, VOCABULARY) == pytest.approx(
            measured[name][rank][1], rel=0.02
        )


def test_one_of_two_tensor_parallel_processes(workers: Workers) -> None:
    """It does half of the work, and keeps what the model says. (Sequence parallelism needs Apex's norms.)"""
    port = site_ports()["cloud"]
    first, _ = workers.run(measure, [(Site.CLOUD, rank, SHARED, port) for rank in range(2)])
    for name, case in SHARED.items():
        config = config_of(**case)
        counted, state = first[name][1]
        work = stage_work(config, VOCABULARY)[1]
        assert (work.forward / 2, (work.input_grad + work.weight_grad) / 2) == (counted.forward, counted.backward), name
        assert activation_bytes(config, VOCABULARY)[1] == pytest.approx(counted.kept, rel=0.01), name
        assert static_bytes(config, 1, VOCABULARY) == pytest.approx(state, rel=0.02), name


def test_the_formula_of_the_paper() -> None:
    """arXiv:2205.05198, equation 1, with a softmax in fp32 (7 instead of 5); besides, the norms' means and deviations."""
    model = {**ABSOLUTE, "precision": "bf16", "normalization": "LayerNorm", "dropout": 0.1}
    config = config_of(model, layers=[1, 2, 1])
    s, b, h, a = 48, 3, 64, 4
    statistics, mask = 4 * s * b * 4, s * s
    assert activation_bytes(config, VOCABULARY)[1] == 2 * (s * b * h * (34 + 7 * a * s / h) + statistics + mask)


def test_a_problem_in_seconds_and_bytes() -> None:
    config = config_of(
        hardware={"edge_tflops": 2.0, "cloud_tflops": 8.0, "link_latency_ms": 5, "link_bandwidth_gbps": 1}
    )
    problem = problem_of(config)
    costs, work = problem.costs, stage_work(config, 384)
    assert (problem.num_microbatches, problem.layout.num_ranks, problem.memory_cap) == (4, 2, ())
    assert costs.forward == tuple(w.forward / speed for w, speed in zip(work, (2e12, 8e12, 2e12), strict=True))
    for forward, backward, inputs, weights in zip(
        costs.forward, costs.backward, costs.input_grad, costs.weight_grad, strict=True
    ):
        assert backward == pytest.approx(2 * forward) and backward == pytest.approx(inputs + weights)
    assert costs.forward_size == costs.backward_size == 48 * 3 * 64 * 4
    assert costs.link(0, 1) == Link(0.005, 125e6, "up") and costs.link(1, 0) == Link(0.005, 125e6, "down")
    table = plan("ldt_1f1b", problem.layout, problem.num_microbatches)
    assert simulate(problem.layout, table.ranks, costs).makespan > 4 * 0.005


def test_processes_share_work_and_link() -> None:
    """Half the time, about half the memory; sequence parallel shares the rest. One copy crosses in any case."""
    two = {"tensor_parallel": 2}
    hardware = {"link_bandwidth_gbps": 1}
    alone = problem_of(config_of(hardware=hardware)).costs
    shared = config_of(hardware=hardware, sites={"edge": two, "cloud": {**two, "pipeline_ranks": 1}})
    costs = problem_of(shared).costs
    assert costs.forward == tuple(time / 2 for time in alone.forward)
    assert alone.held(1) / 2 < costs.held(1) < alone.held(1)
    assert costs.link(0, 1).bandwidth == 125e6 and costs.forward_size == alone.forward_size
    two["sequence_parallel"] = True
    parallel = problem_of(config_of(hardware=hardware, sites={"edge": two, "cloud": {**two, "pipeline_ranks": 1}}))
    assert parallel.costs.forward_size == alone.forward_size
    assert parallel.costs.held(1) == pytest.approx(alone.held(1) / 2, rel=0.02)


def test_sites_of_different_sizes() -> None:
    """Each stage by its own site's processes; domains are pipelines of their own that share the edge's one wire."""
    hardware = {"link_bandwidth_gbps": 1, "edge_tflops": 10, "cloud_tflops": 10}
    alone = problem_of(config_of(hardware=hardware))
    sites = {"edge": {"data_parallel": 2}, "cloud": {"data_parallel": 4, "tensor_parallel": 2, "pipeline_ranks": 1}}
    config = config_of(hardware=hardware, sites=sites)
    problem = problem_of(config)
    costs = problem.costs
    assert problem.layout == Layout.u(2, 2) and problem.num_microbatches == 2
    assert costs.forward[0] == alone.costs.forward[0] and costs.forward[1] == alone.costs.forward[1] / 2
    assert costs.held(0) == alone.costs.held(0) and costs.held(1) < alone.costs.held(1)
    assert costs.forward_size == alone.costs.forward_size
    for rank in (1, 2):
        assert costs.link(0, rank) == Link(0.01, 62.5e6, "up") and costs.link(rank, 0) == Link(0.01, 62.5e6, "down")
    assert static_bytes(config, 0, 384) == static_bytes(config_of(), 0, 384)
    assert static_bytes(config, 1, 384) == static_bytes(config, 2, 384) == static_bytes(config_of(), 1, 384) / 2
    shared = config_of(sites=sites, train={"distributed_optimizer": True})
    parameters = static_bytes(config, 1, 384) / 16  # weights and gradients 4 bytes each, Adam's moments 8
    assert static_bytes(shared, 1, 384) == parameters * (4 + 4 + 8 / 4)


def test_the_vocabulary() -> None:
    """Known for bytes, given, or the section's for a tokenizer that is not opened."""
    tail = [
        problem_of(config_of(data={"tokenizer": tokenizer}, hardware={"vocab_size": 1000}), given).costs.forward[2]
        for tokenizer, given in (("bytes", None), ("somewhere", None), ("somewhere", 257))
    ]
    assert tail[0] == tail[2] < tail[1]


def test_memory_that_is_left() -> None:
    config = config_of(hardware={"cloud_memory_gib": 1})
    (edge, cloud) = problem_of(config).memory_cap
    assert edge is None and cloud is not None
    scores = 48 * 3 * 48 * 4 * 4
    assert cloud == GIB - static_bytes(config, 1, 384) - scores
    assert static_bytes(config, 1, 384) == 2 * (4 * 64 * 64 + 2 * 64 * 256 + 2 * 64) * 16


@pytest.mark.parametrize(
    ("hardware", "parts"),
    [
        (
            {"edge_memory_gib": 0.001},
            ["pipeline rank 0 does not fit: hardware.edge_memory_gib is 0.001", "stages [0, 2]"],
        ),
        ({"cloud_memory_gib": 0.0025}, ["rank 1 may hold", "a single microbatch", "hardware.cloud_memory_gib"]),
    ],
)
def test_too_little_memory(hardware: dict[str, float], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        problem_of(config_of(hardware=hardware))
    for part in parts:
        assert part in str(caught.value)


def test_what_has_no_cost_is_refused() -> None:
    with pytest.raises(ConfigError, match="an edge alone has nothing to schedule"):
        problem_of(config_of(layers=4, sites={"cloud": {"pipeline_ranks": 0}}))
    with pytest.raises(ConfigError, match=r"model\.megatron\.num_moe_experts changes"):
        problem_of(config_of({"megatron": {"num_moe_experts": 4}}))


def test_rows_for_people() -> None:
    config = config_of()
    rows = describe_costs(problem_of(config), config)
    assert [(row.stage, row.name, row.rank, row.layers) for row in rows] == [
        (0, "head", 0, 1),
        (1, "cloud1", 1, 2),
        (2, "tail", 0, 1),
    ]
    assert rows[0].message_mib == 48 * 3 * 64 * ELEMENT_BYTES["fp32"] / 2**20 and rows[2].message_mib is None
    assert rows[1].forward_gflop == pytest.approx(0.031850496)
    assert rows[1].backward_ms == pytest.approx(2 * rows[1].forward_ms)
