"""The config of a training run: one frozen object, read from one YAML file that both sites share.

    config = load_config("configs/quickstart.yaml", ["train.iterations=5"])
    config.layer_split          # (1, 3, 3, 1)
    config.num_microbatches     # 8, a step and replica

Everything that can be wrong with a config is told at once, here, before any process starts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property, reduce
from operator import getitem
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, SkipValidation, ValidationError, model_validator

from ldt_schedules.errors import ConfigError
from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.lap_layers import LapLayers, frozen_stages, parse_lap_layers
from ldt_schedules.planning.layers import parse_layers, read_layers
from ldt_schedules.planning.layout import Layout
from ldt_schedules.topology import Site, SiteSize, Topology
from ldt_schedules.training.config_file import apply_overrides, explain, keys_of, read_yaml
from ldt_schedules.training.huggingface_model import with_sizes
from ldt_schedules.training.link_section import LinkSection
from ldt_schedules.training.model_config import model_problems, must_divide
from ldt_schedules.training.section import Section
from ldt_schedules.training.sections import (
    DataSection,
    EdgeSection,
    HardwareSection,
    ModelSection,
    ScheduleSection,
    SitesSection,
    TrainSection,
    VisionSection,
)
from ldt_schedules.training.vision_config import TWO_LAPS, vision_problems

SITE_LOCAL_KEYS = (
    "data.path",
    "data.format",
    "data.packing",
    "data.on_bad_sample",
    "data.padding_side",
    "data.tokenizer",
    "data.validation_fraction",
    "schedule.table",
    "train.log_interval",
    "train.log_tps",
    "train.output_dir",
    "train.threads",
    "train.recompute",
    "train.trace_iterations",
    "train.checkpoint_dir",
    "train.keep_checkpoints",
    "train.async_save",
    "link.address",
    "link.timeout_s",
)
"""Keys that may differ between the sites: they name local files, or change nothing that crosses the link. (The plan
itself is compared by its hash, so two table files may have different names but not different contents.)"""


class TrainConfig(Section):
    """A training run.

    Raises:
        ValidationError: pydantic's; `load_config` turns it into a ConfigError for people.
    """

    model: ModelSection = ModelSection()  # type: ignore[call-arg]
    layers: Annotated[Any, SkipValidation] = Field(
        None,
        description="layers of head, cloud 1.., tail: [1, 3, 3, 1] or Et|t*3|t*3|tL; null splits evenly. With vision "
        "{vit: [3, 7, 7, 1], llm: [0, 16, 16, 0]}",
    )
    vision: VisionSection = VisionSection()  # type: ignore[call-arg]
    sites: SitesSection = SitesSection()
    schedule: ScheduleSection = ScheduleSection()  # type: ignore[call-arg]
    data: DataSection = DataSection()  # type: ignore[call-arg]
    train: TrainSection = TrainSection()  # type: ignore[call-arg]
    link: LinkSection = LinkSection()  # type: ignore[call-arg]
    hardware: HardwareSection = HardwareSection()  # type: ignore[call-arg]

    @property
    def num_pipeline_ranks(self) -> int:
        """P: the edge and the cloud's pipeline ranks."""
        return 1 + self.sites.cloud.pipeline_ranks

    @cached_property
    def layer_split(self) -> tuple[int, ...]:
        """Layers of each stage: head, cloud 1, ..., tail; one number when the edge is alone."""
        return parse_layers(self.layers, self.model.num_layers, self.num_pipeline_ranks)

    @property
    def has_vision(self) -> bool:
        """Is it a vision-language model, whose microbatches walk the U twice?"""
        return self.vision.num_layers > 0

    @cached_property
    def lap_layers(self) -> LapLayers:
        """Layers of each stage of a vision-language model."""
        return parse_lap_layers(self.layers, self.vision.num_layers, self.model.num_layers, self.num_pipeline_ranks)

    @property
    def data_parallel(self) -> int:
        """Replicas that read data: the edge's."""
        return self.sites.edge.data_parallel

    @property
    def num_microbatches(self) -> int:
        """Microbatches of a step on one edge replica, those of all its domains."""
        return self.train.global_batch_size // (self.train.micro_batch_size * self.data_parallel)

    @cached_property
    def topology(self) -> Topology:
        """Both sites as the runtime knows them."""
        edge, cloud = (
            SiteSize(
                tensor=s.tensor_parallel,
                data=s.data_parallel,
                # Without a tensor-parallel group there is nothing to share; Megatron takes it so, too.
                sequence_parallel=s.sequence_parallel and s.tensor_parallel > 1,
            )
            for s in self._both_sites()
        )
        return Topology(self.num_pipeline_ranks, edge=edge, cloud=cloud)

    @cached_property
    def layout(self) -> Layout:
        """The U, with a cloud pipeline for each domain; one stage for an edge that is alone."""
        domains = self.topology.domains
        if self.has_vision:
            frozen = frozen_stages(self.lap_layers, frozenset(self.vision.frozen))
            return self.lap_layers.layout(domains).freeze(frozen)
        return Layout.u(self.num_pipeline_ranks, domains) if self.num_pipeline_ranks > 1 else Layout.alone()

    def site_processes(self, site: Site) -> int:
        """Processes of one site; 0 for the cloud of an edge that is alone."""
        return self.topology.world_size(site)

    def sites_in_use(self) -> list[tuple[str, EdgeSection]]:
        """`edge`, and `cloud` if there is one, with their sections."""
        edge, cloud = self._both_sites()
        return [("edge", edge), ("cloud", cloud)] if self.sites.cloud.pipeline_ranks else [("edge", edge)]

    def _both_sites(self) -> tuple[EdgeSection, EdgeSection]:
        return self.sites.edge, self.sites.cloud

    @model_validator(mode="before")
    @classmethod
    def _derive_planner(cls, given: Any) -> Any:
        """The published order goes round once, or twice."""
        if not isinstance(given, dict) or not isinstance(given.get("vision"), dict):
            return given
        schedule = given.get("schedule", {})
        if given["vision"].get("num_layers") and isinstance(schedule, dict):
            return {**given, "schedule": {"planner": TWO_LAPS, **schedule}}
        return given

    @model_validator(mode="after")
    def _check_across_keys(self) -> TrainConfig:
        problems = [*self._site_problems(), *model_problems(self), *self._batch_problems(), *self._trace_problems()]
        if self.train.save_hf is not None and self.model.hf is None:
            problems.append(
                "train.save_hf writes what model.hf was read from, with new weights, but model.hf is null; set it, or leave "
                "train.save_hf out"
            )
        problems += vision_problems(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _site_problems(self) -> Iterator[str]:
        edge, cloud = self._both_sites()
        if self.sites.cloud.pipeline_ranks:
            replicas = "sites.edge.data_parallel", edge.data_parallel
            yield from must_divide("sites.cloud.data_parallel", cloud.data_parallel, *replicas)
        yield from self._layer_problems()

    def _layer_problems(self) -> Iterator[str]:
        ranks = self.sites.cloud.pipeline_ranks
        if self.has_vision:
            try:
                self.lap_layers  # noqa: B018 - computed for its errors
            except ScheduleError as error:
                yield f"{error} (keys: layers, vision.num_layers, model.num_layers, sites.cloud.pipeline_ranks)"
            return
        try:
            given = () if self.layers is None else read_layers(self.layers)
            cloud_stages = len(given) - 2
            if cloud_stages > 0 and ranks not in (0, cloud_stages):
                yield (
                    f"sites.cloud.pipeline_ranks is {ranks}, but layers {list(given)} have {cloud_stages} cloud stages "
                    f"(head and tail apart): set sites.cloud.pipeline_ranks={cloud_stages} or write {ranks + 2} counts"
                )
            else:
                self.layer_split  # noqa: B018 - computed for its errors
        except ScheduleError as error:
            yield f"{error} (keys: layers, model.num_layers, sites.cloud.pipeline_ranks)"

    def _batch_problems(self) -> Iterator[str]:
        train = self.train
        name, site = self.sites_in_use()[-1]  # the cloud's replicas are a multiple of the edge's
        per_step = train.micro_batch_size * site.data_parallel
        factors = f"train.micro_batch_size {train.micro_batch_size} x sites.{name}.data_parallel {site.data_parallel} ="
        yield from must_divide("train.global_batch_size", train.global_batch_size, factors, per_step)
        if train.min_lr > train.lr:
            yield f"train.min_lr {train.min_lr:g} is above train.lr {train.lr:g}; lower it or raise train.lr"
        if train.eval_interval and not self.data.validation_fraction:
            yield (
                f"train.eval_interval {train.eval_interval} evaluates, but data.validation_fraction 0 keeps nothing to "
                "evaluate on; raise it or set train.eval_interval=0"
            )

    def _trace_problems(self) -> Iterator[str]:
        traced = self.train.traced_iterations
        if not traced:
            return
        given = f"train.trace_iterations {len(traced)}"
        if self.num_pipeline_ranks == 1:
            yield f"{given} traces a pipeline, but sites.cloud.pipeline_ranks is 0; set train.trace_iterations=0"
        elif traced[-1] > self.train.iterations:
            yield (
                f"{given} traces steps {traced[0]} to {traced[-1]}, but train.iterations is {self.train.iterations}; "
                f"set train.iterations={traced[-1]} or more, or lower train.trace_iterations"
            )


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> TrainConfig:
    """Read, override, check.

    Args:
        path: a YAML file. Relative paths inside it are relative to the current directory.
        overrides: `section.key=value`, the value read as YAML; later ones win.

    Raises:
        ConfigError: with one line for every mistake: key, what was given, what is allowed.
    """
    content = apply_overrides(read_yaml(path), overrides)
    try:
        content = with_sizes(content)
    except ConfigError as error:
        raise ConfigError(f"config {path}: model.hf: {error}") from None
    try:
        return TrainConfig.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"config {path}:\n" + _indented(explain(error, TrainConfig))) from None


def shared_fingerprint(config: TrainConfig) -> dict[str, Any]:
    """Dotted key -> value (JSON types) of everything that must be equal on both sites.

    The layer split is in it as numbers, so that two ways to write one split agree.
    """
    content = config.model_dump(mode="json", exclude={"layers"})
    # Whether weights are loaded and saved must be known to both; where they are is each one's own business.
    content["model"]["hf"] = config.model.hf is not None
    content["train"]["save_hf"] = config.train.save_hf is not None
    content["train"]["load"] = config.train.load is not None
    # Lists, as they come back from the other site.
    content["layers"] = (
        {"vit": list(config.lap_layers.vit), "llm": list(config.lap_layers.llm)}
        if config.has_vision
        else list(config.layer_split)
    )
    shared = sorted(set(keys_of(TrainConfig)) - set(SITE_LOCAL_KEYS))
    return {key: reduce(getitem, key.split("."), content) for key in shared}


def _indented(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())
