"""The parity gate: its arithmetic on small arrays, and real runs whose errors are planted.

The real runs go through the gate and the command line of its processes; only their start is another, so that they are
forked with Megatron loaded.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file

from ldt_schedules.errors import ConfigError
from ldt_schedules.topology import Site
from ldt_schedules.training.config import TrainConfig, load_config
from ldt_schedules.training.verification import gate as gate_module
from ldt_schedules.training.verification import records
from ldt_schedules.training.verification.comparison import SmallGradients, compare
from ldt_schedules.training.verification.configs import split_config, whole_config
from ldt_schedules.training.verification.diagnosis import diagnose, relative_error, stood_still
from ldt_schedules.training.verification.gate import Gate, judge
from ldt_schedules.training.verification.joining import Partition, cut, join
from ldt_schedules.training.verification.planted import PLANTED
from ldt_schedules.training.verification.records import ProcessRecord
from ldt_schedules.training.verification.screens import report_screen
from ldt_schedules.training.verification.tolerances import TOLERANCES, with_overrides

ASYMMETRIC = Path(__file__).parent.parent.parent / "configs" / "asymmetric.yaml"
FP32 = TOLERANCES["fp32"]


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# Joining.


def test_slices_of_a_strided_parameter_are_joined_matrix_by_matrix():
    """SwiGLU's first matrix is gate over up; each process holds a part of both."""
    gate_matrix, up = np.arange(8.0).reshape(4, 2), 100 + np.arange(8.0).reshape(4, 2)
    whole = np.concatenate([gate_matrix, up])
    slices = cut(whole, Partition(0, 2), 2)
    np.testing.assert_array_equal(slices[0], np.concatenate([gate_matrix[:2], up[:2]]))
    np.testing.assert_array_equal(slices[1], np.concatenate([gate_matrix[2:], up[2:]]))
    np.testing.assert_array_equal(join(slices, Partition(0, 2)), whole)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("partition", [Partition(0, 1), Partition(1, 1), Partition(0, 2), Partition(1, 3)])
def test_join_undoes_cut(partition, count):
    whole = random(24, 24)
    np.testing.assert_array_equal(join(cut(whole, partition, count), partition), whole)


def test_what_is_not_cut_is_the_first_copy():
    first, second = random(4, seed=1), random(4, seed=2)
    np.testing.assert_array_equal(join([first, second], None), first)


# Errors and their diagnosis.


def test_relative_error():
    reference = np.array([3.0, 4.0], dtype=np.float32)
    assert relative_error(reference, reference) == 0
    assert relative_error(2 * reference, reference) == pytest.approx(1)
    assert relative_error(reference + np.array([0, 5e-3], dtype=np.float32), reference) == pytest.approx(1e-3, rel=1e-4)
    assert relative_error(np.zeros(2), np.zeros(2)) == 0
    assert relative_error(np.ones(2), np.zeros(2)) == np.inf
    assert relative_error(np.array([np.nan, 1]), np.ones(2)) == np.inf
    # The square of 1e30 is no float32.
    assert relative_error(np.full(2, 1e30, dtype=np.float32), np.full(2, 2e30, dtype=np.float32)) == pytest.approx(0.5)


@pytest.mark.parametrize("factor", [0.5, 2, -1, 0.25])
def test_a_factor_is_found_under_rounding(factor):
    reference = random(16, 16)
    mine = (factor * reference + 1e-3 * random(16, 16, seed=1)).astype(np.float32)
    assert diagnose(mine, reference).one == f"is {factor:.3g} times the reference"


@pytest.mark.parametrize(
    ("factor", "told"), [(0.4985, "0.5"), (2.01, "2"), (0.335, "0.333"), (0.7, "0.7"), (1.4, "1.4")]
)
def test_a_factor_that_rounding_has_moved_is_told_as_what_it_was(factor, told):
    """So that in 16 bits the parameters of a site are told together."""
    reference = random(16, 16)
    assert diagnose(np.float32(factor) * reference, reference).one == f"is {told} times the reference"


def test_a_factor_near_one_is_told_with_all_digits():
    reference = random(16, 16).astype(np.float64)
    assert diagnose(1.0000125 * reference, reference).one == "is 1.0000125 times the reference"


@pytest.mark.parametrize("partition", [Partition(0, 1), Partition(1, 1), Partition(0, 2)])
@pytest.mark.parametrize("order", [(1, 0), (1, 0, 2, 3), (2, 3, 0, 1)])
def test_an_order_of_shards_is_found_under_updates(partition, order):
    reference = random(16, 8)
    shards = cut(reference, partition, len(order))
    mine = join([shards[rank] for rank in order], partition) + 0.03 * random(16, 8, seed=1)
    cause = diagnose(mine, reference, partition, len(order))
    assert cause.one == f"has its tensor-parallel shards in the order {' '.join(map(str, order))}"


def test_what_cannot_be_explained_differs():
    reference = random(16, 8)
    noisy = reference + 0.1 * random(16, 8, seed=1)
    assert diagnose(noisy, reference, Partition(0, 1), 2).one == "differs"
    # The same shard twice is no order of shards.
    twice = np.concatenate([reference[:8], reference[:8]])
    assert diagnose(twice, reference, Partition(0, 1), 2).one == "differs"
    assert diagnose(np.zeros(3), np.ones(3)).many == "are zero"
    assert diagnose(np.array([1, np.inf, 1]), np.ones(3)).one == "is not finite"
    assert diagnose(np.ones(3), np.zeros(3)).one == "differs"


def test_a_weight_that_stood_still():
    before, after = random(4), random(4, seed=1)
    cause = stood_still((before, before.copy()), (before, after), 2)
    assert cause is not None and cause.one == "was not updated in step 2"
    assert stood_still((before, before.copy()), (before, before.copy()), 2) is None, "nor did the reference move"
    assert stood_still((before, after), (before, after), 2) is None


def test_small_gradients_are_small_on_both_runs_in_any_step_and_not_zero():
    small = SmallGradients(0.1)
    reference = np.array([[1.0, 1e-3, 0.0], [1e-3, -2.0, 1.0]])
    mine = np.array([[1.0, -1e-3, 0.0], [1.0, -2.0, 1.0]])
    small.add("w", mine, reference)
    np.testing.assert_array_equal(small.of("w", (2, 3)), [[False, True, False], [False, False, False]])
    small.add("w", np.array([[1e-9, 1, 1], [1, 1, 1.0]]), np.ones((2, 3)))
    small.add("w", np.array([[1, 1, 1], [1, 1, 1e-9]]), np.array([[1, 1, 1], [1, 1, 1e-9]]))
    np.testing.assert_array_equal(small.of("w", (2, 3)), [[False, True, False], [False, False, True]])
    assert not small.of("another", (5,)).any()


# Comparison of records.


def write_run(directory, weights, gradients, *, sizes=((1, 1), (1, 1)), losses=(1.0, 2.0), grad_norm=1.0, stepped=True):
    """Records of a head (edge) and a cut and an uncut parameter (cloud); `weights[step][name]`, `gradients` from 1."""
    names = {"edge": ["head"], "cloud": ["cut", "norm"]}
    for step, named in enumerate(weights):
        for site, (tensor, data) in zip(names, sizes, strict=True):
            for rank in range(tensor * data):
                tensor_rank, data_rank = rank % tensor, rank // tensor

                def mine(tensors, site=site, tensor=tensor, tensor_rank=tensor_rank):
                    slices = {name: [tensors[name]] * tensor for name in names[site]}
                    if "cut" in slices:
                        slices["cut"] = cut(tensors["cut"], Partition(0, 1), tensor)
                    return {name: np.ascontiguousarray(parts[tensor_rank]) for name, parts in slices.items()}

                held = mine(named)
                record = ProcessRecord(
                    site=site,
                    site_rank=rank,
                    tensor_rank=tensor_rank,
                    data_rank=data_rank,
                    losses=list(losses[data_rank::data]) if site == "edge" and step and not tensor_rank else [],
                    grad_norm=grad_norm if step else None,
                    stepped=stepped or step == 0,
                    fingerprints={name: records.fingerprint(weight) for name, weight in held.items()},
                    partition={"cut": Partition(0, 1)} if site == "cloud" and tensor > 1 else {},
                )
                tensors = {"weight": held, "gradient": mine(gradients[step - 1]) if step else {}}
                written = {
                    kind: {n: t for n, t in one.items() if not data_rank and (n in record.partition or not tensor_rank)}
                    for kind, one in tensors.items()
                }
                records.write(directory, step, record, written)


def tensors(seed):
    return {"head": random(6, 4, seed=seed), "cut": random(8, 4, seed=seed + 1), "norm": random(4, seed=seed + 2)}


def moved(weights, gradients):
    return {name: weights[name] - 0.1 * gradients[name] for name in weights}


@pytest.fixture
def run():
    """`(weights by step, gradients by step)` of two steps."""
    gradients = [tensors(10), tensors(20)]
    weights = [tensors(0)]
    for one in gradients:
        weights.append(moved(weights[-1], one))
    return weights, gradients


def compared(tmp_path, mine, reference, tolerances=FP32, **options):
    write_run(tmp_path / "reference", *reference)
    write_run(tmp_path / "mine", *mine, **options)
    return compare(tmp_path / "mine", tmp_path / "reference", 2, tolerances, "fp32", adaptive=False)


def test_equal_runs_pass_whatever_their_sizes(tmp_path, run):
    report = compared(tmp_path, run, run, sizes=((2, 2), (2, 3)))
    assert report.passed and report.compared_steps == 2
    figures = report.figures()
    assert figures["max_rel_grad_error"] == figures["weights_rel_error"] == figures["max_abs_loss_error"] == 0
    assert figures["replicas_identical"] and figures["passed"]
    assert [step["step"] for step in figures["steps"]] == [0, 1, 2]


def test_parameters_with_one_diagnosis_are_told_together(tmp_path, run):
    weights, gradients = run
    wrong = [{**one, "cut": one["cut"] / 2, "norm": one["norm"] / 2} for one in gradients]
    report = compared(tmp_path, (weights, wrong), run, sizes=((1, 1), (2, 1)))
    (finding,) = report.findings
    assert (finding.step, finding.kind, finding.site) == (1, "gradients", "cloud")
    assert set(finding.parameters) == {"cut", "norm"}
    assert finding.text.startswith("step 1: the gradients of all 2 parameters of the cloud are 0.5 times the reference")


def test_the_first_step_that_is_wrong_is_diagnosed(tmp_path, run):
    """A weight stands still in step 2; the gradients of the same step are right."""
    weights, gradients = run
    stale = [*weights[:2], {**weights[2], "head": weights[1]["head"]}]
    (finding,) = compared(tmp_path, (stale, gradients), run).findings
    assert finding.text.startswith("step 2: the weight of head (edge) was not updated in step 2 (error ")


def test_swapped_shards_are_seen_before_the_first_step(tmp_path, run):
    weights, gradients = run
    swapped = [{**one, "cut": np.roll(one["cut"], 4, axis=0)} for one in weights]
    (finding,) = compared(tmp_path, (swapped, gradients), run, sizes=((1, 1), (2, 1))).findings
    assert finding.step == 0 and finding.cause == "has its tensor-parallel shards in the order 1 0"


def test_loss_norm_and_a_missing_update_are_told(tmp_path, run):
    report = compared(tmp_path, run, run, losses=(1.0, 2.001), grad_norm=1.5, stepped=False)
    assert {finding.kind for finding in report.findings} == {"loss", "grad_norm", "stepped"}
    assert report.figures()["max_abs_loss_error"] == pytest.approx(1e-3)
    assert report.figures()["grad_norm_rel_error"] == pytest.approx(0.5)


def test_a_nan_does_not_pass_and_is_json(tmp_path, run):
    weights, gradients = run
    broken = [{**one, "norm": one["norm"] * np.float32("nan")} for one in gradients]
    report = compared(tmp_path, (weights, broken), run, losses=(float("nan"), 2.0))
    assert {finding.kind for finding in report.findings} == {"loss", "gradients"}
    assert report.findings[-1].cause == "is not finite"
    assert report.figures()["max_rel_grad_error"] == "inf" and report.figures()["max_abs_loss_error"] == "nan"


def test_a_gradient_that_is_missing_is_zero(tmp_path, run):
    weights, gradients = run
    write_run(tmp_path / "reference", *run)
    write_run(tmp_path / "mine", weights, gradients)
    for path in tmp_path.glob("mine/step-*/cloud-rank0.safetensors"):
        kept = {key: tensor for key, tensor in load_file(path).items() if key != "gradient/norm"}
        save_file(kept, path)
    (finding,) = compare(tmp_path / "mine", tmp_path / "reference", 2, FP32, "fp32", adaptive=False).findings
    assert finding.cause == "is zero" and finding.parameters == ("norm",)


def test_copies_that_differ_are_found_though_the_first_is_right(tmp_path, run):
    weights, gradients = run
    write_run(tmp_path / "reference", *run)
    write_run(tmp_path / "mine", weights, gradients, sizes=((1, 1), (2, 2)))
    path = tmp_path / "mine" / "step-0002" / "cloud-rank3.json"
    text = path.read_text()
    path.write_text(text.replace(records.fingerprint(weights[2]["norm"]), "0" * 32))
    report = compare(tmp_path / "mine", tmp_path / "reference", 2, FP32, "fp32", adaptive=False)
    (finding,) = report.findings
    assert finding.kind == "replicas" and finding.parameters == ("norm",)
    assert [step.replicas_identical for step in report.steps] == [True, True, False]


def test_runs_that_skip_every_step_show_nothing(tmp_path, run):
    """A loss scale that is too high: both skip, gradients are infinite, and that is no success."""
    write_run(tmp_path / "reference", *run, stepped=False, grad_norm=None)
    write_run(tmp_path / "mine", *run, stepped=False, grad_norm=None)
    report = compare(tmp_path / "mine", tmp_path / "reference", 2, FP32, "fp16", adaptive=True)
    assert not report.passed and "give more --steps" in report.findings[0].text


# Tolerances and configs.


def test_tolerances_can_be_set_and_mistakes_are_told():
    changed = with_overrides(FP32, ["gradients=1e-4", "loss=0"])
    assert (changed.gradients, changed.loss, changed.weights) == (1e-4, 0, FP32.weights)
    for wrong in ("gradient=1", "gradients", "gradients=-1", "gradients=many", "gradients=nan"):
        with pytest.raises(ConfigError, match="--tolerance"):
            with_overrides(FP32, [wrong])


def test_a_tolerance_decides(tmp_path, run):
    weights, gradients = run
    off = [{**one, "head": one["head"] * np.float32(1.0001)} for one in gradients]
    assert not compared(tmp_path / "a", (weights, off), run).passed
    assert compared(tmp_path / "b", (weights, off), run, with_overrides(FP32, ["gradients=1e-3"])).passed


def test_the_two_configs():
    given = load_config(
        ASYMMETRIC,
        ["model.dropout=0.1", "model.megatron={attention_dropout: 0.2}", "train.recompute=full", "layers=[1,4,1]"],
    )
    split = split_config(given)
    assert split.model.dropout == 0 and split.model.megatron == {"attention_dropout": 0.0}
    assert split.train.eval_interval == split.train.trace_iterations == split.train.warmup_iterations == 0
    assert split.train.lr == split.train.min_lr == 1e-4 and split.train.recompute == "full"
    assert split.topology == given.topology
    whole = whole_config(split)
    assert whole.num_pipeline_ranks == 1 and whole.site_processes(Site.EDGE) == 1
    assert whole.model == split.model and whole.train == split.train
    assert whole.num_microbatches == split.num_microbatches
    with pytest.raises(ConfigError, match="nothing to verify"):
        split_config(load_config(ASYMMETRIC, ["sites.cloud.pipeline_ranks=0", "layers=null"]))


def test_planted_errors_say_what_they_are_not_for():
    plain = TrainConfig.model_validate({})
    reasons = {name: planted.not_for(plain) for name, planted in PLANTED.items()}
    assert [name for name, reason in reasons.items() if reason] == ["missing-domain-average", "swapped-shard"]
    assert all(planted.not_for(load_config(ASYMMETRIC)) is None for planted in PLANTED.values())
    per_token = load_config(ASYMMETRIC, ["train.calculate_per_token_loss=true"])
    assert "per-token" in str(PLANTED["missing-domain-average"].not_for(per_token))
    assert PLANTED["stale-weight"].not_for(load_config(ASYMMETRIC, ["layers=[3,0,3]"])) == "the cloud has no layers"


def test_a_planted_error_must_be_called_what_it_is(tmp_path, run):
    """Caught is not enough."""
    weights, gradients = run
    config, planted = load_config(ASYMMETRIC), PLANTED["wrong-scale"]
    doubled = [{**one, "head": 2 * one["head"]} for one in gradients]
    tripled = [{**one, "head": 3 * one["head"]} for one in gradients]
    right = judge(planted, config, compared(tmp_path / "a", (weights, doubled), run))
    wrong = judge(planted, config, compared(tmp_path / "b", (weights, tripled), run))
    clean = judge(planted, config, compared(tmp_path / "c", run, run))
    assert [(one.caught, one.named) for one in (right, wrong, clean)] == [(True, True), (True, False), (False, False)]
    assert [one.passed for one in (right, wrong, clean)] == [True, False, False]


def test_the_screen_says_what_is_wrong_and_what_was_allowed(tmp_path, run):
    weights, gradients = run
    noisy = [{**one, "head": one["head"] + random(6, 4, seed=9)} for one in gradients]
    report = compared(tmp_path, (weights, noisy), run)
    console = Console(file=io.StringIO(), width=200)
    console.print(report_screen(report))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in (
        "NOT PASSED",
        "the gradient of head (edge) differs",
        "gradients 5e-06",
        "fp64 tells rounding",
        "start",
    ):
        assert part in text, text


# Real runs.

TINY = [
    "model.num_layers=4",
    "model.hidden_size=32",
    "model.seq_length=16",
    "layers=[1,2,1]",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "data.validation_fraction=0.2",
    "link.timeout_s=60",
]


def be_process(argv, environment):
    """What a process of the gate is started as."""
    from ldt_schedules.cli.app import app

    os.environ.update(environment)
    app(argv, standalone_mode=False)


def forked(workers):
    """Stands in for `launcher.run_all`: the same processes, but forked with Megatron loaded."""

    def run_all(children, log_dir):
        workers.run(be_process, [(list(map(str, child.argv[3:])), dict(child.environment)) for child in children])

    return run_all


@pytest.fixture
def gate_for(workers, tmp_path, monkeypatch):
    """A gate on the small model, with these overrides."""
    monkeypatch.setattr(gate_module, "run_all", forked(workers))
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("".join(f"line {n}: {n * n} is the square of {n}\n" for n in range(1000)))

    def make(*overrides):
        given = [*TINY, f"data.path={corpus}", *overrides]
        config = split_config(load_config(ASYMMETRIC, given))
        command = ["verify", str(ASYMMETRIC), *given, "--steps", "2"]
        tolerances = TOLERANCES[config.model.precision]
        return Gate(command, config, 2, tolerances, tmp_path / "records", Console(file=io.StringIO()))

    return make


def check_clean_and_planted(gate, name):
    """The clean run's report; the planted error must be caught and called what it is."""
    clean = gate.compare()
    assert clean.passed, clean.findings
    assert clean.figures()["replicas_identical"]
    report = gate.compare(name)
    assert judge(PLANTED[name], gate.config, report).passed, report.findings
    return clean


def test_two_domains_with_the_distributed_optimizer(gate_for):
    """Each replica has only its shard of the gradients reduced: they must have been put together."""
    gate = gate_for("sites.cloud.tensor_parallel=1", "train.distributed_optimizer=true", "model.precision=bf16")
    clean = check_clean_and_planted(gate, "missing-domain-average")
    assert len(clean.steps[1].gradients) == len(clean.steps[1].weights) > 20


def test_shards_in_float64(gate_for):
    """Rounding shrinks with the precision, so what is left would be a mistake."""
    gate = gate_for("sites.cloud.data_parallel=1", "model.precision=fp64")
    clean = check_clean_and_planted(gate, "swapped-shard")
    assert 0 < clean.figures()["max_rel_grad_error"] < 1e-13
