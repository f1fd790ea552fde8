"""Runs of the trainer in worker processes, as `ldt train` makes them, and what they leave."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ldt_schedules.topology import Site
from ldt_schedules.training.config import TrainConfig, load_config
from tests.helpers.workers import Workers, site_ports

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"

TINY = (
    f"data.path={ROOT / 'README.md'}",
    "model.num_layers=4",
    "model.hidden_size=32",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.seq_length=16",
    "model.activation=swiglu",
    "layers=[1,1,1,1]",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "train.warmup_iterations=0",
    "train.eval_interval=0",
    "train.iterations=4",
    "train.save_interval=2",
    "train.keep_checkpoints=0",
    "link.timeout_s=60",
)
"""On top of the quickstart: small enough for a test, four steps, saved after the second and the last."""


@dataclass
class Ran:
    """What a process saw of a run: losses of its steps (edge), its weights and the optimizer's state by global name."""

    losses: list[float] = field(default_factory=list)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    state: dict[str, np.ndarray] = field(default_factory=dict)
    saved: list[int] = field(default_factory=list)


def tiny(output: Path, *overrides: str) -> TrainConfig:
    return load_config(QUICKSTART, [*TINY, f"train.output_dir={output}", *overrides])


def run_all(workers: Workers, *configs: TrainConfig) -> list[list[Ran]]:
    """One run after the other, all of the same sizes, in the same processes: by run, by process (the edge's first)."""
    ports = [site_ports() for _ in configs]
    processes = [(site, rank) for site in Site for rank in range(configs[0].site_processes(site))]
    ran = workers.run(_run_process, [(configs, site, rank, ports) for site, rank in processes], timeout_s=110)
    return [[process[index] for process in ran] for index in range(len(configs))]


def _run_process(configs: tuple[TrainConfig, ...], site: Site, rank: int, ports: list[dict[str, int]]) -> list[Ran]:
    return [_run_one(config, site, rank, own) for config, own in zip(configs, ports, strict=True)]


def _run_one(config: TrainConfig, site: Site, rank: int, ports: dict[str, int]) -> Ran:
    from ldt_schedules.megatron import world
    from ldt_schedules.training import loop
    from ldt_schedules.training.checkpointing import saver
    from ldt_schedules.training.process import open_process
    from ldt_schedules.training.reports import StepReport

    warnings.simplefilter("ignore")
    os.environ.update(RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(ports[str(site)]))
    link = config.link.model_copy(update={"address": f"127.0.0.1:{ports['link']}"})
    process = open_process(config.model_copy(update={"link": link}), site)
    running, ran = loop.Loop(process, None, saver(process.start, config, process.place)), Ran()
    for report in running.steps():
        if isinstance(report, StepReport):
            ran.losses.append(report.loss)
        else:
            ran.saved.append(report.iteration)
    ran.weights, ran.state = _weights(process), _optimizer_state(process)
    world.close_site()
    return ran


def _weights(process: Any) -> dict[str, np.ndarray]:
    from ldt_schedules.megatron.chunks import global_parameters

    return {name: p.detach().double().numpy().copy() for name, p in global_parameters(process.trained.model)}


def _optimizer_state(process: Any) -> dict[str, np.ndarray]:
    """Every tensor of it, numbered; scalars (steps, loss scale, hyperparameters that change) among them."""
    inner = process.trainee.inner_optimizer
    if inner is None:
        return {}
    found: dict[str, np.ndarray] = {}
    for number, group in enumerate(inner.optimizer.param_groups):
        found[f"{number} lr"] = np.array([group["lr"], group["weight_decay"]])
        for place, parameter in enumerate(group["params"]):
            found[f"{number} {place} value"] = parameter.detach().double().numpy().copy()
            for key, value in inner.optimizer.state[parameter].items():
                found[f"{number} {place} {key}"] = value.double().numpy().copy()
    found["loss scale"] = np.array(float(inner.get_loss_scale()))
    return found


def whole_tensors(output: Path, step: int) -> dict[str, np.ndarray]:
    """Every tensor of both sites' checkpoints of a run, put together from however many processes held it."""
    from ldt_schedules.megatron.checkpoints.site_directory import step_name
    from ldt_schedules.megatron.checkpoints.torch_dist import open_checkpoint

    found: dict[str, np.ndarray] = {}
    for path in sorted(output.glob(f"checkpoints/*/{step_name(step)}")):
        checkpoint = open_checkpoint(path)
        with checkpoint.reading() as reader:
            for key, tensor in checkpoint.tensors.items():
                region = checkpoint.region(key, (0,) * len(tensor.shape), tensor.shape)
                assert region is not None and key not in found
                found[key] = reader.read(region).double().numpy()
    return found
