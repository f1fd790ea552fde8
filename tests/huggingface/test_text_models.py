"""Directories of text models on two sites in real processes: logits, gradients, and the directory that comes back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldt_schedules.megatron.huggingface.directory import open_directory
from ldt_schedules.megatron.huggingface.sizes import Sizes
from ldt_schedules.planning.layout import Layout
from ldt_schedules.topology import Site, SiteSize
from ldt_schedules.training.config import TrainConfig
from ldt_schedules.training.huggingface_model import holder, vocab_rows, with_sizes
from ldt_schedules.training.parameters import padded_vocab_size
from ldt_schedules.training.vocabulary import Vocabulary
from tests.helpers.workers import Workers, site_ports
from tests.huggingface import text
from tests.huggingface.sites import logits_through_the_u, reporting_logits
from tests.huggingface.tiny import assert_same, contents
from tests.parity.case import SEQUENCE, Case

pytest.importorskip("transformers", reason="transformers is not installed")


@dataclass(frozen=True)
class DirectoryCase(Case):
    """`source`: the directory; `target`: where the model is saved at the end, or nothing."""

    source: str = ""
    target: str = ""

    def content(self) -> dict[str, Any]:
        """Nothing of a size: those are the directory's."""
        given = super().content()
        given["model"] = {"hf": self.source, "precision": self.precision, "seq_length": SEQUENCE}
        given["train"] |= {"save_hf": self.target} if self.target else {}
        return given

    def config(self) -> TrainConfig:
        return TrainConfig.model_validate(with_sizes(self.content()))

    def vocabulary(self) -> Vocabulary:
        return Vocabulary(padded_vocab_size(vocab_rows(self.config()), self.edge.tensor, published=True))


def logits_step(data_iterator: Any, model: torch.nn.Module) -> tuple[Any, Any]:
    """Without labels the tail gives logits."""
    from megatron.core import parallel_state

    if not (parallel_state.is_pipeline_first_stage() or parallel_state.is_pipeline_last_stage()):
        return model(None, None, None), None
    batch = next(data_iterator)
    return reporting_logits(model(batch["tokens"], batch["position_ids"], None))


def evaluate_and_save(cases: list[DirectoryCase], rank: int, ports: dict[str, int]) -> list[list[np.ndarray]]:
    """What a worker runs: each directory once through the U, then it is written."""
    from ldt_schedules.megatron import world
    from ldt_schedules.training.huggingface_model import check_save, save_weights
    from ldt_schedules.training.model import build
    from tests.parity.case import open_rank

    place, _ = open_rank(cases[0], rank, ports)
    found = []
    for case in cases:
        config = case.config()
        check_save(config, place.site)
        trained = build(config, case.topology, place, case.vocabulary())
        found.append(logits_through_the_u(case, place, trained.model, [text.batch()], logits_step))
        save_weights(config, trained.model, place, case.vocabulary().rows)
    world.close_site()
    return found


def gradients(case: DirectoryCase, rank: int, ports: dict[str, int]) -> tuple[list[float], dict[str, np.ndarray]]:
    """What a worker runs: loss of one step, and the gradients that this process holds, by Megatron's names."""
    from ldt_schedules.megatron import world
    from tests.parity.case import open_rank, run_case

    place, _ = open_rank(case, rank, ports)
    (result,) = run_case(case, place)
    world.close_site()
    return [float(report[0] / report[1]) for report in result.reports], result.gradients


LAYOUTS: dict[str, dict[str, Any]] = {
    "P 2": {"layers": (1, 2, 1)},
    "P 3": {"layers": (0, 1, 2, 1)},
    "TP 1 and 2": {"layers": (1, 2, 1), "cloud": SiteSize(tensor=2)},
    "TP 2 and 1": {"layers": (1, 3, 0), "edge": SiteSize(tensor=2)},
}
BOTH_SHARED: dict[str, Any] = {"layers": (1, 2, 1), "edge": SiteSize(tensor=2), "cloud": SiteSize(tensor=2)}
ALLOWED = {"fp32": 1e-4, "fp64": 1e-9}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every architecture tied and untied, then other rotary angles."""
    root = tmp_path_factory.mktemp("sources")
    made = {}
    for name in text.ARCHITECTURES:
        for tied in (False, True):
            shard = "10KB" if tied else None
            path = root / f"{name}-{tied}"
            made[f"{name}, {'tied' if tied else 'untied'}"] = text.make(path, name, tied=tied, shard=shard)
    for number, rope in enumerate(text.ROPES):
        name = text.ARCHITECTURES[number % 3]
        made[f"{name}, {rope}"] = text.make(root / f"rope{number}", name, rope=rope, theta=12345.5)
    return made


@pytest.fixture(scope="module")
def learning(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3, whose norms of q and k every tensor-parallel process holds whole and sees a part of. Its vocabulary is not padded:
    rows of zeros are logits of 0, and the softmax counts them."""
    return text.make(tmp_path_factory.mktemp("learning") / "hf", "Qwen3", vocab_size=128)


@pytest.fixture(scope="module")
def expected(sources: dict[str, Path], learning: Path) -> dict[str, text.Computed]:
    """Precision -> what transformers computes."""
    folders = [str(path) for path in sources.values()]
    found = Workers().run(text.compute, [(folders, str(learning), precision) for precision in ALLOWED], bare=True)
    return dict(zip(ALLOWED, found, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_those_of_transformers_and_the_directory_comes_back(
    layout: str,
    workers: Workers,
    tmp_path: Path,
    sources: dict[str, Path],
    expected: dict[str, text.Computed],
) -> None:
    """Every tensor is byte-identical after it, the config too. Other rotary angles for one layout alone, float32 for two."""
    runs = [
        (number, name, precision)
        for number, name in enumerate(sources)
        for precision in ALLOWED
        if layout == "P 2" or (name.endswith("tied") and (precision == "fp64" or layout == "TP 1 and 2"))
    ]
    cases = [
        DirectoryCase(
            num_microbatches=1,
            source=str(sources[name]),
            target=str(tmp_path / f"{number} {precision}"),
            precision=precision,
            **LAYOUTS[layout],
        )
        for number, name, precision in runs
    ]
    ports, places = site_ports(), cases[0].topology.places()
    found = workers.run(evaluate_and_save, [(cases, place.global_rank, ports) for place in places])
    for place, of_process in zip(places, found, strict=True):
        for (number, name, precision), ours in zip(runs, of_process, strict=True):
            assert len(ours) == (1 if place.site is Site.EDGE else 0), place
            for one in ours:
                apart = np.abs(one[..., : text.VOCABULARY] - expected[precision].logits[number]).max()
                assert apart <= ALLOWED[precision], f"{place}, {name}, {precision}: {apart:.1e}"
    for case in cases:
        source, target = Path(case.source), Path(case.target)
        assert_same(contents(target), contents(source))
        assert (target / "config.json").read_bytes() == (source / "config.json").read_bytes()
        assert open_directory(target).tensors == open_directory(source).tensors


def test_gradients_are_those_of_transformers(
    workers: Workers, learning: Path, expected: dict[str, text.Computed]
) -> None:
    """Every tensor's, put together by the table from what the processes hold."""
    case = DirectoryCase(num_microbatches=1, source=str(learning), precision="fp64", steps=1, **BOTH_SHARED)
    ports, places, theirs = site_ports(), case.topology.places(), expected["fp64"].gradients
    found = workers.run(gradients, [(case, place.global_rank, ports) for place in places])
    directory = open_directory(learning)
    pairs = directory.pairs(Sizes.of(directory.settings))
    ours: dict[str, torch.Tensor] = {}
    for pipeline_rank in range(case.num_ranks):
        mine = [one for place, one in zip(places, found, strict=True) if place.pipeline_rank == pipeline_rank]
        for losses, _ in mine:
            assert losses == ([] if pipeline_rank else [pytest.approx(expected["fp64"].loss, abs=1e-12)])
        for name in mine[0][1]:
            pair, parts = pairs[name], [torch.from_numpy(held[name]) for _, held in mine]
            if pair.cut_dim(parts[0].shape, len(parts)) is None:
                assert all(torch.equal(part, parts[0]) for part in parts), name
                parts = parts[:1]
            ours |= dict(zip(pair.names, pair.unpack(parts, [torch.float64] * len(pair.names)), strict=True))
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        apart = np.abs(gradient.numpy() - theirs[name]).max()
        assert apart <= 1e-9 and np.abs(theirs[name]).max() > 1e-6, f"{name}: {apart:.1e}"


def test_who_holds_what_of_a_plain_u() -> None:
    layout = Layout.u(3, domains=2)
    ranks = [holder((1, 2, 0, 1), layout, f"decoder.layers.{n}.mlp.linear_fc1.weight") for n in range(4)]
    assert ranks == [0, 1, 1, 0]
    for name in ("embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"):
        assert holder((1, 2, 0, 1), layout, name) == 0
    assert holder((4,), Layout.alone(), "decoder.layers.3.mlp.linear_fc1.weight") == 0
