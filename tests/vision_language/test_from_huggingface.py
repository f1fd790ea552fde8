"""A Hugging Face directory on two sites in real processes: its logits, and the directory that comes back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldt_schedules.errors import ConfigError
from ldt_schedules.topology import Site, SiteSize
from ldt_schedules.training.config import TrainConfig, load_config
from ldt_schedules.training.vocabulary import Vocabulary
from tests.helpers.workers import Workers, site_ports
from tests.huggingface.sites import logits_through_the_u, reporting_logits
from tests.huggingface.tiny import assert_same, contents
from tests.parity.vision import VisionCase
from tests.vision_language import tiny
from tests.vision_language.reference import keep_float64, logits_of, reference_model

pytest.importorskip("transformers", reason="transformers is not installed")

LAYERS = {2: ((1, 2, 1), (0, 2, 1)), 3: ((1, 2, 0, 1), (0, 2, 1, 0)), 4: ((0, 1, 2, 1, 0), (1, 0, 1, 1, 0))}


@dataclass(frozen=True)
class DirectoryCase(VisionCase):
    """`source`: the directory; `target`: where the model is saved at the end, or nothing."""

    source: str = ""
    target: str = ""

    def vocabulary(self) -> Vocabulary:
        return Vocabulary(tiny.VOCABULARY, tiny.IMAGE, tiny.VIDEO)

    def config(self) -> TrainConfig:
        path = Path(self.source).with_name("run.yaml")
        sizes = {
            "edge": {"tensor_parallel": self.edge.tensor, "data_parallel": self.edge.data},
            "cloud": {
                "tensor_parallel": self.cloud.tensor,
                "data_parallel": self.cloud.data,
                "pipeline_ranks": self.num_ranks - 1,
            },
        }
        overrides = [
            f"model.hf={self.source}",
            f"model.precision={self.precision}",
            f"model.seq_length={tiny.SEQUENCE}",
            f"layers={json.dumps({'vit': self.vit, 'llm': self.llm})}",
            f"sites={json.dumps(sizes)}",
            *([f"train.save_hf={self.target}"] if self.target else []),
        ]
        return load_config(path, overrides)


def logits_step(data_iterator: Any, model: torch.nn.Module) -> tuple[Any, Any]:
    """Without labels the tail gives logits."""
    batch = {name: value for name, value in next(data_iterator).items() if name != "labels"}
    return reporting_logits(model(batch))


def evaluate_and_save(case: DirectoryCase, rank: int, ports: dict[str, int], names: list[str]) -> list[np.ndarray]:
    """What a worker runs: each batch once through the U, then the directory is written."""
    from megatron.core import parallel_state

    from ldt_schedules.megatron import world
    from ldt_schedules.training.huggingface_model import check_save, save_weights
    from ldt_schedules.training.model import build
    from tests.parity.case import open_rank

    place, _ = open_rank(case, rank, ports)
    config = case.config()
    check_save(config, place.site)
    trained = build(config, case.topology, place, case.vocabulary())
    given = [tiny.microbatch(tiny.BATCHES[name], torch.float64) for name in names]
    found = logits_through_the_u(case, place, trained.model, given, logits_step)
    assert parallel_state.get_tensor_model_parallel_world_size() == case.topology.size(place.site).tensor
    save_weights(config, trained.model, place, case.vocabulary().rows)
    world.close_site()
    return found


def run(workers: Workers, case: DirectoryCase, names: list[str]) -> list[list[np.ndarray]]:
    ports = site_ports()
    places = case.topology.places()
    return workers.run(evaluate_and_save, [(case, place.global_rank, ports, names) for place in places])


def transformers_logits(folder: str, names: list[str], dtype: torch.dtype) -> list[np.ndarray]:
    """In a process of its own: float64 changes the reference."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, attn_implementation="sdpa").to(dtype)
    if dtype is torch.float64:
        keep_float64()
    with torch.no_grad():
        return [logits_of(model, tiny.microbatch(tiny.BATCHES[name], dtype)).double().numpy() for name in names]


SIZES = {
    "P 2": (2, {}),
    "P 3": (3, {}),
    "P 4": (4, {}),
    "TP 1 and 2": (2, {"cloud": SiteSize(tensor=2)}),
    "TP 2 and 1": (2, {"edge": SiteSize(tensor=2)}),
    "DP 1 and 2": (2, {"cloud": SiteSize(data=2)}),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory, and the config of a run beside it."""
    folder = tmp_path_factory.mktemp("source")
    reference_model(torch.float32).save_pretrained(folder / "hf")
    (folder / "run.yaml").write_text("train: {micro_batch_size: 1, global_batch_size: 8}\n")
    return folder / "hf"


@pytest.fixture(scope="module")
def expected(source: Path) -> dict[str, list[np.ndarray]]:
    """Precision -> the logits of transformers."""
    dtypes = {"fp64": torch.float64, "fp32": torch.float32}
    jobs = [(str(source), list(tiny.BATCHES), dtype) for dtype in dtypes.values()]
    found = Workers().run(transformers_logits, jobs, bare=True)
    return dict(zip(dtypes, found, strict=True))


@pytest.mark.parametrize(
    ("ranks", "sizes", "precision", "allowed"),
    [(*SIZES[name], "fp64", 1e-9) for name in SIZES] + [(*SIZES[name], "fp32", 1e-4) for name in ("P 3", "TP 1 and 2")],
    ids=[*SIZES, "P 3, fp32", "TP 1 and 2, fp32"],
)
def test_logits_are_those_of_transformers_and_the_directory_comes_back(
    tmp_path: Path,
    workers: Workers,
    source: Path,
    expected: dict[str, list[np.ndarray]],
    ranks: int,
    sizes: dict[str, Any],
    precision: str,
    allowed: float,
) -> None:
    """No image, one, three of different sizes, videos, padding left and right; every tensor is byte-identical after it."""
    target = tmp_path / "back"
    vit, llm = LAYERS[ranks]
    case = DirectoryCase(
        layers=llm,
        num_microbatches=1,
        planner="ldt_2lap_1f1b",
        vit=vit,
        llm=llm,
        precision=precision,
        source=str(source),
        target=str(target),
        **sizes,
    )
    names = list(tiny.BATCHES)
    for place, ours in zip(case.topology.places(), run(workers, case, names), strict=True):
        assert len(ours) == (len(names) if place.site is Site.EDGE else 0), place
        for name, mine, theirs in zip(names, ours, expected[precision], strict=bool(ours)):
            valid = ~tiny.microbatch(tiny.BATCHES[name])["padding"].numpy()
            difference = np.abs(mine[..., : tiny.VOCABULARY] - theirs)[valid].max()
            assert difference <= allowed, f"{place}, {name}: {difference:.1e}"
    assert_same(contents(target), contents(source))
    for file in ("config.json", "generation_config.json"):
        assert (target / file).read_bytes() == (source / file).read_bytes()


def test_sizes_come_from_the_directory_and_may_not_be_contradicted(tmp_path: Path) -> None:
    reference_model(torch.float32).save_pretrained(tmp_path / "hf")
    (tmp_path / "run.yaml").write_text("train: {micro_batch_size: 1, global_batch_size: 2}\n")
    hf = f"model.hf={tmp_path / 'hf'}"
    config = load_config(tmp_path / "run.yaml", [hf])
    assert (config.model.num_layers, config.model.hidden_size, config.model.num_query_groups) == (3, 32, 2)
    assert config.model.qkv_bias and config.model.activation == "swiglu" and config.model.mrope_section == tiny.MROPE
    assert config.vision.full_attention_layers == list(tiny.FULL_ATTENTION) and config.vision.image_token == tiny.IMAGE
    assert load_config(tmp_path / "run.yaml", [hf, "model.num_layers=3"]) == config
    processor = tmp_path / "hf" / "preprocessor_config.json"
    for content, bounds in (
        ({"min_pixels": 3136, "max_pixels": 12845056}, (3136, 12845056)),
        ({"size": {"shortest_edge": 784, "longest_edge": 1003520}}, (784, 1003520)),
        ({"do_resize": True}, (3136, 50176)),
    ):
        processor.write_text(json.dumps(content))
        vision = load_config(tmp_path / "run.yaml", [hf]).vision
        assert (vision.min_pixels, vision.max_pixels) == bounds
    processor.write_text(json.dumps({"max_pixels": 12845056}))
    assert load_config(tmp_path / "run.yaml", [hf, "vision.max_pixels=60000"]).vision.max_pixels == 60000
    with pytest.raises(ConfigError, match=r"model.num_layers is 5, but .*config.json says 3; leave it out"):
        load_config(tmp_path / "run.yaml", [hf, "model.num_layers=5"])
    with pytest.raises(ConfigError, match=r"model\.hf.*nowhere"):
        load_config(tmp_path / "run.yaml", ["model.hf=nowhere"])
    with pytest.raises(ConfigError, match="save_hf writes what model.hf was read from"):
        load_config(tmp_path / "run.yaml", ["vision.num_layers=2", "train.save_hf=out"])


def test_who_holds_what_is_what_was_built() -> None:
    from ldt_schedules.planning.lap_layers import LapLayers
    from ldt_schedules.training.huggingface_model import holder

    layers = LapLayers((1, 2, 0, 1), (1, 0, 2, 1))
    layout = layers.layout(domains=2)
    ranks = [holder(layers, layout, f"vision.decoder.layers.{n}.mlp.linear_fc1.weight") for n in range(4)]
    assert ranks == [0, 1, 1, 0]
    assert [holder(layers, layout, f"language.decoder.layers.{n}.x") for n in range(4)] == [0, 2, 2, 0]
    for name in ("vision.patch_embed.weight", "vision.projector.norm.weight", "language.output_layer.weight"):
        assert holder(layers, layout, name) == 0
