"""A small vision-language model that goes round the U twice, as MindSpeed-MM splits one, and its ranks.

    lap 1 (image)       stage 0 edge: patches ──► stages 1..P-1 cloud ──► stage P edge: adds the text's embedding
    lap 2 (language)    stage P edge          ──► stages P+1..2P-1 cloud ──► stage 2P edge: norm, logits, loss

`Whole` runs the same stages in one process. Chunks are built and wrapped as MM does: three for each rank, each under a
DistributedDataParallel of its own; the last one of a cloud rank is empty.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from megatron.core.enums import ModelType
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig

from ldt_schedules.megatron.layer_span import LayerSpan, config_with_span
from ldt_schedules.planning.layout import Layout
from ldt_schedules.topology import Place, Site, SiteSize, Topology
from tests.mindspeed import stand_in

TrainStep = Callable[[SimpleNamespace, Callable[..., Any], list[Any], list[Any]], Any]

HIDDEN, PIXELS, WORDS, SEQUENCE, MICRO_BATCH = 16, 12, 32, 10, 2


@dataclass(frozen=True)
class Case:
    """`num_ranks` 1: the whole model in one process, split as for `like` ranks. `replicas` on each site."""

    num_ranks: int
    num_microbatches: int
    like: int = 0
    replicas: int = 1
    double: bool = False
    per_token: bool = False
    overlap: bool = False
    functions: tuple[str, ...] = ()
    only_first_chunk: bool = False
    """`functions`: options of the config that are lists with one function for each chunk. `only_first_chunk`: a mistake
    of upstream's, the cloud finalizes the gradients of its first chunk and forgets the others."""

    @property
    def laps(self) -> int:
        """Pipeline ranks of one lap, also where one process runs all of them."""
        return self.like or self.num_ranks

    def whole(self) -> Case:
        return replace(
            self,
            num_ranks=1,
            like=self.num_ranks,
            replicas=1,
            num_microbatches=self.num_microbatches * self.replicas,
            overlap=False,
            functions=(),
            only_first_chunk=False,
        )

    @property
    def layout(self) -> Layout:
        return Layout.laps(self.num_ranks, 2)

    @property
    def topology(self) -> Topology:
        return Topology(self.num_ranks, SiteSize(data=self.replicas), SiteSize(data=self.replicas))


class Chunk(MegatronModule):
    """One stage. It has the attributes that Megatron and MM look for in a model; `stage` None is the empty chunk."""

    def __init__(self, config: TransformerConfig, stage: int | None, laps: int) -> None:
        span = LayerSpan(0, 0) if stage is None else LayerSpan(stage, 1)
        super().__init__(config_with_span(config, span))
        self.model_type = ModelType.encoder_or_decoder
        self.stage = stage
        self.pre_process, self.post_process = stage == 0, stage == 2 * laps
        self.share_embeddings_and_output_weights = False
        self.input_tensor: torch.Tensor | None = None
        self.patches = torch.nn.Linear(PIXELS, HIDDEN) if stage == 0 else None
        self.text = torch.nn.Embedding(WORDS, HIDDEN) if stage == laps else None
        self.logits = torch.nn.Linear(HIDDEN, WORDS, bias=False) if self.post_process else None
        self.block = None
        if span.count:
            spec = get_gpt_layer_local_spec()
            self.block = TransformerBlock(
                self.config, spec, post_layer_norm=False, pre_process=True, post_process=False
            )
        if config.params_dtype is torch.float64:
            self.double()

    def set_input_tensor(self, given: list[torch.Tensor]) -> None:
        self.input_tensor = given[0]

    def forward(self, batch: dict[str, torch.Tensor] | None) -> Any:
        assert self.stage is not None, "the empty chunk was run"
        hidden = self.input_tensor
        if self.patches is not None:
            hidden = self.patches(batch["pixels"]).transpose(0, 1).contiguous()
        if self.text is not None:
            hidden = hidden + self.text(batch["tokens"]).transpose(0, 1)
        if self.block is not None:
            # Written out: for None MindSpeed makes one of its own, on an accelerator.
            later = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
            hidden = self.block(hidden, attention_mask=later[None, None])
        if self.logits is None:
            return hidden
        logits = self.logits(hidden.transpose(0, 1)).reshape(-1, WORDS)
        losses = torch.nn.functional.cross_entropy(logits, batch["labels"].reshape(-1), reduction="none")
        mask = batch["loss_mask"].reshape(-1).to(losses.dtype)
        return {"loss_dict": {"sum": (losses * mask).sum(), "token_nums": mask.sum()}, "logits": logits}


class Whole(MegatronModule):
    """All stages one after the other."""

    def __init__(self, config: TransformerConfig, laps: int) -> None:
        super().__init__(config)
        self.model_type = ModelType.encoder_or_decoder
        self.stages = torch.nn.ModuleList(Chunk(config, stage, laps) for stage in range(2 * laps + 1))
        self.share_embeddings_and_output_weights = False
        self.pre_process = self.post_process = True

    def set_input_tensor(self, given: list[Any]) -> None:
        pass

    def forward(self, batch: dict[str, torch.Tensor]) -> Any:
        output: Any = None
        for stage in self.stages:
            stage.set_input_tensor([output])
            output = stage(batch)
        return output


def batches(step: int, microbatches: range, double: bool) -> Iterator[dict[str, torch.Tensor]]:
    """Microbatch m of a step is the same on every layout."""
    for microbatch in microbatches:
        generator = torch.Generator().manual_seed(1000 * step + microbatch)
        yield {
            "pixels": torch.randn(
                (MICRO_BATCH, SEQUENCE, PIXELS), generator=generator, dtype=torch.float64 if double else torch.float32
            ),
            "tokens": torch.randint(0, WORDS, (MICRO_BATCH, SEQUENCE), generator=generator),
            "labels": torch.randint(0, WORDS, (MICRO_BATCH, SEQUENCE), generator=generator),
            "loss_mask": (
                torch.rand((MICRO_BATCH, SEQUENCE), generator=generator) < 0.3 + 0.1 * (microbatch % 4)
            ).float(),
        }


def transformer_config(case: Case) -> TransformerConfig:
    dtype = torch.float64 if case.double else torch.float32
    return TransformerConfig(
        num_layers=2 * case.laps + 1,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        pipeline_model_parallel_size=1,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        calculate_per_token_loss=case.per_token,
        deallocate_pipeline_outputs=True,
    )


def train_rank(case: Case, global_rank: int, ports: dict[str, int]) -> dict[str, Any]:
    """Train one step, then evaluate one, with the stand-in's patch manager and train step."""
    use_stand_in()
    return run_rank(case, global_rank, ports, stand_in.train_step)


def run_rank(
    case: Case, global_rank: int, ports: dict[str, int], train_step: TrainStep, evaluate: bool = True
) -> dict[str, Any]:
    """The same once the patches are applied; what this process saw."""
    from ldt_schedules.megatron import world

    place = open_rank(case, global_rank, ports)
    config = transformer_config(case)
    model = _build(case, place, config)
    seen: dict[str, Any] = {"finalized": [], "virtual": []}
    _hook_config(case, config, model, seen)
    reports = _one_step(case, place, model, seen, train_step, step=0, forward_only=False)
    gradients = _gradients(model)
    evaluation = None
    with torch.no_grad():
        if evaluate:
            evaluation = _one_step(case, place, model, seen, train_step, step=7, forward_only=True)
    world.close_site()
    return {**seen, "reports": reports, "gradients": gradients, "evaluation": evaluation}


def misfit(case: Case, global_rank: int, ports: dict[str, int], what: str) -> str:
    """The refusal of a list of chunks that does not fit; the other site is not asked for it."""
    from ldt_schedules.errors import ConfigError
    from ldt_schedules.megatron import session, world
    from ldt_schedules.planning.layout import Layout
    from ldt_schedules.planning.planners import plan

    use_stand_in()
    place = open_rank(case, global_rank, ports)
    config = transformer_config(case)
    model = _build(case, place, config)
    if what == "two chunks":
        model = model[:2]
    elif what == "one lap":
        table_for = lambda count, forward_only: plan("ldt_1f1b", Layout.u(2), count, forward_only)  # noqa: E731
        session.current().table_for = table_for
    elif what == "shared weight":
        model[2].module.tied = next(model[0].parameters())
    elif what == "short list":
        config.no_sync_func = [model[0].no_sync]
    try:
        _one_step(case, place, model, {"virtual": []}, stand_in.train_step, step=0, forward_only=False)
    except ConfigError as error:
        world.close_site(abandon=True)
        return str(error)
    return "accepted"


def use_stand_in() -> None:
    """Our patches, applied by the stand-in's manager."""
    from ldt_schedules import device
    from ldt_schedules.mindspeed.registration import Registrar
    from patches import cpu, manager, mindspeed

    warnings.simplefilter("ignore")
    os.environ["LDT_DEVICE"] = "cpu"
    device.device_type.cache_clear()
    manager.apply(cpu.PATCHES)
    theirs = stand_in.ConfigPatches(stand_in.PatchManager(), [])
    theirs.configs["layerwise_disaggregated_training"] = Registrar(mindspeed.FOR_MM).pairs()
    theirs.apply_patches_from_config({"layerwise_disaggregated_training": True, "another_key": True})


def open_rank(case: Case, global_rank: int, ports: dict[str, int]) -> Place:
    """This rank's site and link."""
    from megatron.core import parallel_state

    from ldt_schedules.megatron import world
    from ldt_schedules.planning.planners import plan

    topology = case.topology
    place = topology.place_of_global_rank(global_rank)
    world.open_site(topology, place, world.Address(host="127.0.0.1", port=ports[str(place.site)]), timeout_s=60, seed=1)
    if case.num_ranks == 1:
        return place
    layout = case.layout
    link = world.Address(host="127.0.0.1", port=ports["link"])
    world.join_link(
        topology,
        place,
        link,
        lambda count, forward_only: plan("ldt_2lap_1f1b", layout, count, forward_only=forward_only),
        timeout_s=60,
    )
    parallel_state.set_virtual_pipeline_model_parallel_world_size(3)
    parallel_state.set_virtual_pipeline_model_parallel_rank(0)
    return place


def _build(case: Case, place: Place, config: TransformerConfig) -> list[Any]:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from ldt_schedules.megatron.initialization import initialize_by_name

    torch.manual_seed(1)
    if case.num_ranks == 1:
        modules: list[Any] = [Whole(config, case.laps)]
    else:
        stages = (place.stage, case.laps + place.stage, None if place.stage else 2 * case.laps)
        modules = [Chunk(config, stage, case.laps) for stage in stages]
    for module in modules:
        for chunk in _chunks(module):
            initialize_by_name(chunk, config, seed=3)
            for name, parameter in chunk.named_parameters():
                if parameter.dim() < 2 and name.startswith("patches"):
                    torch.nn.init.constant_(parameter, 0.1)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=not case.double, overlap_grad_reduce=case.overlap, bucket_size=700 if case.overlap else None
    )
    return [
        DistributedDataParallel(config=config, ddp_config=ddp, module=module, disable_bucketing=False)
        for module in modules
    ]


def _hook_config(case: Case, config: TransformerConfig, model: list[Any], seen: dict[str, Any]) -> None:
    from megatron.core.distributed import finalize_model_grads

    @functools.wraps(finalize_model_grads)
    def finalize(chunks: list[Any], num_tokens: Any = None, **rest: Any) -> None:
        seen["finalized"].append([chunks[i] is model[i] for i in range(len(chunks))])
        if case.only_first_chunk and case.num_ranks > 1 and not model[0].module.pre_process:
            chunks = chunks[:1]
        finalize_model_grads(chunks, num_tokens, **rest)

    config.finalize_model_grads_func = finalize
    for option, method in (
        ("no_sync_func", "no_sync"),
        ("grad_sync_func", "start_grad_sync"),
        ("param_sync_func", "start_param_sync"),
    ):
        if option in case.functions:
            setattr(config, option, [getattr(chunk, method) for chunk in model])


def _one_step(
    case: Case,
    place: Place,
    model: list[Any],
    seen: dict[str, Any],
    train_step: TrainStep,
    step: int,
    forward_only: bool,
) -> Any:
    from megatron.core import parallel_state

    def forward_step(data_iterator: Any, chunk: Any) -> Any:
        number = parallel_state.get_virtual_pipeline_model_parallel_rank()
        inner = chunk.module
        seen["virtual"].append((number, None if case.num_ranks == 1 else model.index(chunk)))
        if case.num_ranks > 1:
            ends = (parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage())
            assert ends == (inner.pre_process, inner.post_process)
        reads = case.num_ranks == 1 or place.site is Site.EDGE
        return chunk(next(data_iterator) if reads else None), _loss_per_token if case.per_token else _loss

    mine = range(place.data_rank, case.num_microbatches * case.replicas, case.replicas)
    source = batches(step, mine, case.double) if place.site is Site.EDGE else None
    before = parallel_state.get_virtual_pipeline_model_parallel_rank()
    args = SimpleNamespace(
        num_microbatches=case.num_microbatches,
        seq_length=SEQUENCE,
        micro_batch_size=MICRO_BATCH,
        forward_only=forward_only,
    )
    iterators = [source] if case.num_ranks == 1 else [source, None, None]
    reports = train_step(args, forward_step, iterators, model)
    assert parallel_state.get_virtual_pipeline_model_parallel_rank() == before
    assert source is None or next(source, None) is None, "a batch was not read"
    return reports


def _loss(output: dict[str, Any]) -> tuple[torch.Tensor, dict[str, float]]:
    loss = output["loss_dict"]["sum"] / output["loss_dict"]["token_nums"]
    return loss.unsqueeze(0).clone(), {"loss": float(loss.detach())}


def _loss_per_token(output: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    total, count = output["loss_dict"]["sum"], output["loss_dict"]["token_nums"]
    return total.clone(), count.to(torch.int), {"loss": (float(total.detach()), float(count))}


def _chunks(module: Any) -> list[Any]:
    return list(module.stages) if isinstance(module, Whole) else [module]


def _gradients(model: list[Any]) -> dict[str, np.ndarray]:
    from ldt_schedules.megatron.chunks import global_parameters

    return {
        name: parameter.main_grad.detach().clone().numpy()
        for wrapped in model
        for chunk in _chunks(wrapped.module)
        for name, parameter in global_parameters(chunk)
    }
