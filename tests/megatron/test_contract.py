"""Everything Megatron's own pipeline function honours, ours honours: one test an option."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ldt_schedules.topology import SiteSize
from tests.helpers.workers import WorkerFailure, site_ports
from tests.parity.case import SEQUENCE, Case, batches, open_rank
from tests.parity.compare import EXACT, REORDERED, assert_parity, relative_error, run_split, run_whole

U3 = (1, 2, 1, 1)
TWO = SiteSize(data=2)


def check(workers, cases, tolerance=EXACT):
    split, whole = run_split(workers, cases), run_whole(workers, cases)
    for case, mine, reference in zip(cases, split, whole, strict=True):
        for step in range(case.steps):
            assert_parity(case, mine[step], reference[step], tolerance, step=step)


def scale_by_8(trained: Any) -> Any:
    return _times_8


def _times_8(loss: Any) -> Any:
    return 8 * loss


def no_sync_list(trained: Any) -> list[Any]:
    return [trained.model.no_sync]


def grad_sync_function(trained: Any) -> Any:
    return trained.model.start_grad_sync


def grad_sync_list(trained: Any) -> list[Any]:
    return [trained.model.start_grad_sync]


def param_sync_list(trained: Any) -> list[Any]:
    return [trained.model.start_param_sync]


def param_sync_function(trained: Any) -> Any:
    return trained.model.start_param_sync


def test_grad_scale_func(workers):
    """A loss scale of 8 is exact in binary: gradients are eight times those without it, on both sites."""
    plain = Case(U3, 3, steps=1)
    scaled = replace(plain, everywhere=(("grad_scale_func", scale_by_8),))
    check(workers, [scaled])
    (with_scale,), (without,) = run_split(workers, [scaled, plain])
    for name, gradient in without.gradients.items():
        assert np.array_equal(with_scale.gradients[name], 8 * gradient), name


@pytest.mark.parametrize("deallocate", [True, False])
def test_deallocate_pipeline_outputs(workers, deallocate):
    check(workers, [Case(U3, 4, split_only=(("deallocate_pipeline_outputs", deallocate),))])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("planner", ["gpipe", "ldt_1f1b"])
@pytest.mark.parametrize(
    "functions",
    [
        {},
        {"no_sync_func": no_sync_list},
        {"grad_sync_func": grad_sync_function},
        {"no_sync_func": no_sync_list, "grad_sync_func": grad_sync_list},
    ],
    ids=lambda functions: "+".join(f"{k}:{v.__name__}" for k, v in functions.items()) or "no_sync_func:function",
)
def test_overlapped_gradient_reduction(workers, tied, planner, functions):
    """Two replicas; D24: upstream keeps the last chunk's no_sync only and calls a list."""
    case = Case(
        (1, 2, 1),
        3,
        planner,
        edge=TWO,
        cloud=TWO,
        tied=tied,
        steps=3,
        evaluate=True,
        ddp=(("overlap_grad_reduce", True), ("bucket_size", 2000)),
        split_only=tuple(functions.items()),
    )
    check(workers, [case], REORDERED)


@pytest.mark.parametrize("param_sync", [None, param_sync_function, param_sync_list])
def test_distributed_optimizer(workers, param_sync):
    ddp = {"use_distributed_optimizer": True, "overlap_grad_reduce": True}
    options: tuple[tuple[str, Any], ...] = ()
    if param_sync is not None:
        ddp["overlap_param_gather"] = True
        options = (("param_sync_func", param_sync),)
    case = Case(
        (1, 2, 1), 3, edge=TWO, cloud=TWO, optimizer="adam", steps=3, ddp=tuple(ddp.items()), split_only=options
    )
    (mine,), (reference,) = run_split(workers, [case]), run_whole(workers, [replace(case, ddp=())])
    for step in range(case.steps):
        np.testing.assert_allclose(mine[step].grad_norms, reference[step].grad_norms[0], rtol=1e-6)
        # Adam divides by the root of a square: a rounding of a tiny gradient is a visible part of a step of 1e-3.
        for name, weight in reference[step].weights.items():
            assert np.abs(mine[step].weights[name] - weight).max() <= 1e-3 * 1e-2, (step, name)


def test_moe_auxiliary_loss(workers):
    """The loss scale of the auxiliary loss is set from the number of microbatches, in the cloud as well."""
    moe = {
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.5,
        "moe_token_dispatcher_type": "allgather",
        "moe_router_dtype": "fp64",  # the 0.16.1 router needs transformer-engine for any other
    }
    cases = [
        Case(U3, m, megatron=tuple(moe.items()), per_token=per_token) for m in (1, 3) for per_token in (False, True)
    ]
    check(workers, cases)
    without = replace(cases[0], megatron=(*moe.items(), ("moe_aux_loss_coeff", 0.0)))
    (with_aux,), (no_aux,) = (run_split(workers, [case])[0][:1] for case in (cases[0], without))
    name = "decoder.layers.2.mlp.router.weight"
    assert relative_error(with_aux.gradients[name], no_aux.gradients[name]) > 1e-3, "the auxiliary loss did nothing"


def observe(case: Case, global_rank: int, ports: dict[str, int], call: dict[str, Any]) -> dict[str, Any]:
    """One call of the forward-backward function with an observing forward step; what this rank saw."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.timers import Timers

    from ldt_schedules.megatron import session, world
    from ldt_schedules.megatron.chunks import modules_on_rank
    from ldt_schedules.planning.layout import Layout
    from ldt_schedules.topology import Site
    from ldt_schedules.training.forward_step import forward_step
    from ldt_schedules.training.model import build

    place, run = open_rank(case, global_rank, ports)
    trained = build(case.config(), case.topology, place, case.vocabulary())
    modules = {0: trained.model}
    if run is not None:
        modules = modules_on_rank([trained.model], Layout.u(case.num_ranks, case.topology.domains), place.pipeline_rank)
    for name, value in case.everywhere:
        setattr(trained.config, name, value)
    trained.config.timers = Timers(log_level=2, log_option="minmax")
    trained.config.barrier_with_L1_time = False
    checkpointed: list[tuple[Any, ...]] = []
    marked: list[str] = []
    for stage, module in modules.items():
        module.set_is_first_microbatch = lambda stage=stage: marked.append(stage)

    def step(iterator: Any, model: Any, *rest: Any) -> Any:
        run = session.current()
        checkpointed.append((run.executing if run else 0, *rest))
        output, _ = forward_step(iterator, model)
        return output, report

    def report(output: Any, non_loss_data: bool = False) -> Any:
        if non_loss_data:
            return output.detach().numpy()
        return output.mean(), {"lm loss": float(output.detach().mean())}

    reads = place.site is Site.EDGE
    with torch.no_grad() if call.get("forward_only") else torch.enable_grad():
        store = schedules.get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[batches(0, range(case.num_microbatches))] if reads else None,
            model=trained.model,
            num_microbatches=case.num_microbatches,
            seq_length=SEQUENCE,
            micro_batch_size=2,
            **call,
        )
    timers = {name: timer.active_time() for name, timer in trained.config.timers._timers.items()}
    seen = {
        "store": store,
        "calls": checkpointed,
        "marked": marked,
        "timers": timers,
        "predicates": (parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()),
    }
    world.close_site()
    return seen


def observe_all(workers, case, **call):
    ports = site_ports()
    return workers.run(observe, [(case, place.global_rank, ports, call) for place in case.topology.places()])


def test_collect_non_loss_data(workers):
    """What the loss function returns is collected as it is, microbatch by microbatch, at the edge alone."""
    case = Case(U3, 4)
    seen = observe_all(workers, case, forward_only=True, collect_non_loss_data=True)
    (whole,) = observe_all(workers, case.whole(), forward_only=True, collect_non_loss_data=True)
    assert len(whole["store"]) == 4
    assert np.array_equal(np.array(seen[0]["store"]), np.array(whole["store"]))
    assert seen[1]["store"] == seen[2]["store"] == []


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ({}, [0, 3]),
        ({"forward_only": True}, [0, 3]),
        ({"forward_only": True, "first_val_step": True}, [0, 3]),
        ({"forward_only": True, "first_val_step": False}, []),
    ],
)
def test_first_val_step(workers, call, expected):
    """The first microbatch is announced to each stage once, in validation only at its first step."""
    seen = observe_all(workers, Case(U3, 3), **call)
    assert sorted(seen[0]["marked"]) == expected
    assert seen[1]["marked"] == ([1] if expected else [])


def test_partial_activation_checkpointing(workers):
    """Megatron's window: of each stage's microbatches in flight the first `n` are kept, the others recomputed."""
    from ldt_schedules.planning.layout import Layout
    from ldt_schedules.planning.planners import plan

    option = "num_microbatches_with_partial_activation_checkpoints"
    case = Case(U3, 5, everywhere=((option, 1),))
    seen = observe_all(workers, case)
    for rank, row in enumerate(plan("ldt_1f1b", Layout.u(3), 5).compute_order()):
        for stage in {action.stage for action in row}:
            depth = most = 0
            for action in row:
                if action.stage == stage:
                    depth += 1 if action.kind == "F" else -1
                    most = max(most, depth)
            flags = [flag for executed, flag in seen[rank]["calls"] if executed == stage]
            assert flags == [m % most >= 1 for m in range(5)], (rank, stage)
    without = observe_all(workers, replace(case, everywhere=()))
    assert all(len(call) == 1 for call in without[0]["calls"]), "the third argument is passed only when it is asked for"


def test_timers_are_started_and_stopped(workers):
    for rank in observe_all(workers, Case(U3, 2)):
        assert set(rank["timers"]) >= {"forward-backward", "forward-compute", "backward-compute"}
        assert all(seconds > 0 for seconds in rank["timers"].values())


def test_predicates_between_actions(workers):
    """The edge holds both ends of the model, a cloud process neither, whatever its own world would say."""
    assert [rank["predicates"] for rank in observe_all(workers, Case(U3, 1))] == [
        (True, True),
        (False, False),
        (False, False),
    ]


def refusal(case: Case, global_rank: int, ports: dict[str, int], call: dict[str, Any]) -> str:
    from ldt_schedules.errors import ConfigError
    from ldt_schedules.megatron import world

    try:
        observe(case, global_rank, ports, call)
    except ConfigError as error:
        world.close_site(abandon=True)
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    ("option", "call"),
    [("overlap_moe_expert_parallel_comm", {}), (None, {"adjust_tensor_shapes_fn": max})],
)
def test_what_a_u_cannot_honour_is_refused_by_name(workers, option, call):
    case = Case(U3, 1, everywhere=((option, True),) if option else ())
    ports = site_ports()
    for message in workers.run(refusal, [(case, place.global_rank, ports, call) for place in case.topology.places()]):
        assert (option or "adjust_tensor_shapes_fn") in message


def different_steps(case: Case, global_rank: int, ports: dict[str, int]) -> None:
    """The cloud believes in one microbatch more than the edge runs."""
    mine = replace(case, num_microbatches=case.num_microbatches + (global_rank > 0))
    observe(mine, global_rank, ports, {"forward_only": True})


def test_sites_that_would_run_different_steps_stop_by_name(workers):
    ports = site_ports()
    with pytest.raises(WorkerFailure) as caught:
        workers.run(different_steps, [(Case((1, 1, 1), 1), rank, ports) for rank in range(2)], timeout_s=20)
    assert "the two sites are about to run different steps" in str(caught.value)
    assert "table_hash: edge" in str(caught.value)
