"""The real, unmodified `pretrain_gpt.py`: a split run prints what an unsplit one prints, from the same checkpoint."""

from __future__ import annotations

import re
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ldt_schedules.comm.ports import free_ports
from tests.megatron_lm.checkout import CHECKOUTS, Figures, Finished, assembled, started, torchrun, words

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.parametrize("checkout", CHECKOUTS, scope="session"),
]

MODEL = words("""--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32
--micro-batch-size 1 --global-batch-size 4 --lr 0.003 --lr-decay-style constant
--optimizer adam --clip-grad 1000 --mock-data --tokenizer-type NullTokenizer --vocab-size 8191
--transformer-impl local --attention-backend unfused --distributed-backend gloo --eval-interval 2 --eval-iters 2
--log-interval 1 --attention-dropout 0 --hidden-dropout 0 --position-embedding-type rope --num-workers 0
--no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-gelu-fusion
--no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion --split 80,10,10""")
UNTIED = "--untie-embeddings-and-output-weights"
TIED = "(tied)"
"""Stands for the absence of UNTIED. A tied weight's gradient is summed in another order, so the last digit may differ."""
BY_ITERATIONS = words("--train-iters 5 --lr-decay-iters 100")
SPLIT = ("--layerwise-disaggregated-training", "--pipeline-model-parallel-size")
SAVED = 2
LOGGED = {"iteration 3", "iteration 4", "iteration 5", "validation iteration 4"}

Options = tuple[object, ...]


def line(*options: object) -> Options:
    """The model's arguments and these."""
    return (*MODEL, *(option for option in options if option != TIED), *(() if TIED in options else (UNTIED,)))


@dataclass(frozen=True)
class Runs:
    """Launches of one checkout's script. What unsplit runs give is kept, by their options."""

    script: Path
    folder: Path
    known: dict[tuple[Options, Options], Figures] = field(default_factory=dict)

    def one_process(self, *options: object, **environment: str) -> Finished:
        arguments = (self.script, *line(*options))
        return torchrun(1, "one_process", *arguments, folder=self.folder, LDT_TEST_KEYS="layer", **environment)

    def split(self, processes: int, *options: object) -> Finished:
        return torchrun(processes, "ldt_schedules", "launch", self.script, *line(*options), folder=self.folder)

    def sites(self, edge: Options, cloud: Options, processes: int) -> tuple[Finished, Finished]:
        """One launch a site, as two administrators would do: an edge of one process and a cloud."""
        with ThreadPoolExecutor() as pool:
            launched = [
                pool.submit(self.split, count, *options, "--ldt-site", site)
                for site, count, options in (("edge", 1, edge), ("cloud", processes, cloud))
            ]
            first, second = (one.result() for one in launched)
        return first, second

    @property
    def is_old(self) -> bool:
        return "0.12" in self.script.parent.name

    @property
    def format(self) -> Options:
        """Of the checkpoints that a split run writes: the newer one of 0.12 cannot be written with a new torch."""
        return ("--ckpt-format", "torch") if self.is_old else ()

    def checkpoint(self, *model: object) -> Path:
        """Of an unsplit run after two iterations, Adam's state included."""
        path = self.folder / ("checkpoint " + " ".join(map(str, model)))
        if not path.exists():
            saving = ("--save", path, "--save-interval", SAVED, "--exit-interval", SAVED)
            self.one_process(*model, *BY_ITERATIONS, *saving).require(1, 2)
        return path

    def reference(self, model: Options = (), loop: Options = BY_ITERATIONS) -> Figures:
        """Iterations 3 to 5 of an unsplit run from the checkpoint."""
        if (model, loop) not in self.known:
            loaded = ("--load", self.checkpoint(*model))
            self.known[model, loop] = self.one_process(*model, *loop, *loaded).require(3, 4, 5)
        return self.known[model, loop]


@pytest.fixture(scope="session")
def runs(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("megatron_lm")
    return Runs(assembled(checkout, folder) / "pretrain_gpt.py", folder)


LAST_DIGIT = 1.01e-3
"""Of norms, which the console shows with three decimals; of losses it shows seven digits."""


def worst(found: Figures, wanted: Figures) -> float:
    """The greatest relative difference; both must hold the same figures."""
    assert found.keys() == wanted.keys() and wanted.keys() >= LOGGED
    losses = [(found[key][0], wanted[key][0], 0.0) for key in wanted]
    norms = [(x, y, LAST_DIGIT) for key in wanted for x, y in zip(found[key][1:], wanted[key][1:], strict=True)]
    return max(max(0.0, abs(x - y) - unit) / (abs(y) or 1.0) for x, y, unit in losses + norms)


@pytest.mark.parametrize("ranks, layers", [(2, "1,2,1"), (3, "1,1,1,1"), (3, "2,1,1,0"), (4, "1,1,1,1,0")])
def test_a_split_run_prints_what_an_unsplit_one_prints(runs: Runs, ranks: int, layers: str) -> None:
    """U of 1 edge and 1, 2 or 3 cloud ranks: losses, gradient norms, validation and test, to all printed digits."""
    split = runs.split(ranks, *BY_ITERATIONS, *SPLIT, ranks, "--ldt-layers", layers, "--load", runs.checkpoint())
    assert split.require(3, 4, 5) == runs.reference()


TP_1_2 = ("--tensor-model-parallel-size", 2, "--ldt-edge-tensor-model-parallel-size", 1)
TP_2_1 = ("--tensor-model-parallel-size", 1, "--ldt-edge-tensor-model-parallel-size", 2)


@pytest.mark.parametrize(
    "ranks, processes, sizes",
    [
        pytest.param(2, 3, TP_1_2, id="TP 1 and 2"),
        pytest.param(2, 3, TP_2_1, id="TP 2 and 1"),
        pytest.param(2, 3, ("--ldt-edge-world-size", 1), id="DP 1 and 2"),
        pytest.param(3, 5, ("--ldt-edge-world-size", 1), id="DP 1 and 2, P 3"),
        pytest.param(2, 6, ("--ldt-edge-world-size", 2), id="DP 2 and 4"),
        pytest.param(2, 5, TP_1_2, id="TP 1 and 2, DP 1 and 2"),
    ],
)
def test_sites_of_other_sizes_print_the_same(runs: Runs, ranks: int, processes: int, sizes: Options) -> None:
    split = runs.split(processes, *BY_ITERATIONS, *SPLIT, ranks, *sizes, "--load", runs.checkpoint())
    assert worst(split.require(3, 4, 5), runs.reference()) <= 1e-5


def test_distributed_optimizer_with_overlap(runs: Runs) -> None:
    """Its state cannot be loaded without Apex or Transformer Engine (stock), so both start with a new one."""
    if runs.is_old:
        pytest.skip(
            "core_v0.12.1's distributed optimizer cannot step without Transformer Engine (quantize_param_shard)"
        )
    fresh = (*BY_ITERATIONS, "--no-load-optim")
    options = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")
    split = runs.split(3, *fresh, *SPLIT, 2, "--ldt-edge-world-size", 1, *options, "--load", runs.checkpoint())
    assert worst(split.require(3, 4, 5), runs.reference(loop=fresh)) <= 1e-5


@pytest.mark.parametrize(
    "model",
    [
        pytest.param((TIED,), id="tied"),
        pytest.param(words("--group-query-attention --num-query-groups 2 --swiglu --disable-bias-linear"), id="GQA"),
        pytest.param(("--position-embedding-type", "learned_absolute", "--normalization", "RMSNorm"), id="learned"),
        pytest.param(("--bf16",), id="bf16"),
        pytest.param(("--fp16", "--initial-loss-scale", "4096"), id="fp16"),
    ],
)
def test_other_models(runs: Runs, model: Options) -> None:
    split = runs.split(3, *model, *BY_ITERATIONS, *SPLIT, 3, "--load", runs.checkpoint(*model))
    assert split.require(3, 4, 5) == runs.reference(model)


RAMPUP = words("--train-samples 20 --lr-decay-samples 400 --rampup-batch-size 2 2 12 --override-opt_param-scheduler")


@pytest.mark.parametrize(
    "loop, split_only",
    [
        pytest.param((*BY_ITERATIONS, "--calculate-per-token-loss"), (), id="per-token loss"),
        pytest.param(
            (
                *BY_ITERATIONS,
                *words("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
            ),
            (),
            id="recompute",
        ),
        pytest.param((*BY_ITERATIONS, "--log-params-norm", "--log-num-zeros-in-grad"), (), id="norm and zeros"),
        pytest.param(BY_ITERATIONS, ("--ldt-schedule", "gpipe"), id="another planner"),
        pytest.param(RAMPUP, (), id="batch size rampup"),
    ],
)
def test_options_of_the_loop(runs: Runs, loop: Options, split_only: Options) -> None:
    split = runs.split(3, *loop, *SPLIT, 3, *split_only, "--load", runs.checkpoint())
    assert split.require(3, 4, 5) == runs.reference(loop=loop)


@pytest.mark.parametrize("processes, sizes", [(2, ()), (3, TP_1_2)], ids=["equal", "TP 1 and 2"])
def test_a_split_run_resumes_itself(runs: Runs, processes: int, sizes: Options, tmp_path: Path) -> None:
    """--exit-interval stops both sites after iteration 4; what they saved goes on as the run that was not stopped."""
    common = (*BY_ITERATIONS, *SPLIT, 2, *sizes, *runs.format)
    saving = ("--save", tmp_path / "saved", "--save-interval", 4, "--load", tmp_path / "saved")
    stopped = runs.split(processes, *common, *saving, "--exit-interval", 4).require(1, 2, 3, 4)
    assert "iteration 5" not in stopped
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["cloud", "edge"]
    resumed = runs.split(processes, *common, *saving).require(5)
    assert "iteration 4" not in resumed
    through = runs.split(processes, *common).require(1, 2, 3, 4, 5)
    assert {**stopped, **resumed} == through


def test_a_signal_to_one_site_stops_both_at_the_same_iteration(runs: Runs, tmp_path: Path) -> None:
    """--exit-signal-handler: the edge is told to stop, both sites save and end, and both stand at one iteration."""
    psutil = pytest.importorskip("psutil")
    saved = tmp_path / "saved"
    options = words("--train-iters 100000 --lr-decay-iters 100000 --exit-signal-handler --eval-iters 0")
    options = line(*options, *SPLIT, 2, "--save", saved, "--save-interval", 100000, *runs.format)
    with started(2, "ldt_schedules", "launch", runs.script, *options, folder=runs.folder) as launch:
        assert launch.stdout is not None
        seen = []
        for text in launch.stdout:
            seen.append(text)
            if re.search(r"iteration +5/", text):
                break
        else:
            pytest.fail("".join(seen)[-5000:])
        workers = [child for child in psutil.Process(launch.pid).children() if child.environ().get("RANK") == "0"]
        workers[0].send_signal(signal.SIGTERM)
        rest, _ = launch.communicate(timeout=120)
    assert launch.returncode == 0, rest[-3000:]
    edge, cloud = (int((saved / site / "latest_checkpointed_iteration.txt").read_text()) for site in ("edge", "cloud"))
    assert 5 <= edge == cloud < 100000
    assert rest.count("exiting program after receiving SIGTERM") == 2


def test_sites_that_loaded_different_iterations_stop(runs: Runs, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    common = (*BY_ITERATIONS, *SPLIT, 2, *runs.format, "--save", saved, "--save-interval", 1)
    runs.split(2, *common, "--exit-interval", 4).require(3, 4)
    (saved / "cloud" / "latest_checkpointed_iteration.txt").write_text("3")
    split = runs.split(2, *common, "--load", saved)
    assert split.code != 0 and not split.figures
    assert "iteration: edge 4, cloud 3" in split.output and "--ckpt-step" in split.output


def test_sites_launched_apart_and_a_cloud_without_data(runs: Runs, tmp_path: Path) -> None:
    """The cloud's command line names data and a tokenizer that do not exist; TensorBoard is written by the edge alone."""
    (port,) = free_ports(1)
    common = (*BY_ITERATIONS, *SPLIT, 3, "--load", runs.checkpoint(), "--ldt-link", f"127.0.0.1:{port}")
    nowhere = ("--data-path", "/nowhere/corpus", "--tokenizer-model", "/nowhere/t", "--vocab-file", "/nowhere/v.json")
    board = ("--tensorboard-dir", tmp_path / "edge", "--tensorboard-log-interval", 1)
    nobody = ("--tensorboard-dir", tmp_path / "cloud", "--tokenizer-type", "GPT2BPETokenizer")
    edge, cloud = runs.sites((*common, *board), (*common, *nowhere, *nobody), processes=2)
    assert edge.require(3, 4, 5) == runs.reference()
    assert cloud.code == 0 and not cloud.figures and "lm loss" not in cloud.output, cloud.complaint
    assert "number of parameters on (tensor, pipeline) model parallel rank (0, 1)" in cloud.output
    assert not (tmp_path / "cloud").exists()
    third, both, fifth = (runs.reference()[f"iteration {number}"][0] for number in (3, 4, 5))
    # 0.16.1's console shows the mean of the first two iterations as the loss of the second; TensorBoard has that itself.
    fourth = both if runs.is_old else 2 * both - third
    assert _scalars(tmp_path / "edge")["lm loss"] == pytest.approx([third, fourth, fifth], rel=1e-6)


def _scalars(folder: Path) -> dict[str, list[float]]:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = loader.EventAccumulator(str(folder))
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_with_the_flag_absent_nothing_is_changed(runs: Runs) -> None:
    """The patches applied and the switch off; and `ldt launch` without the switch: the log is that of the stock run."""
    loaded = (*BY_ITERATIONS, "--load", runs.checkpoint())
    patched = runs.one_process(*loaded, LDT_TEST_PATCHES="applied").require(3, 4, 5)
    assert patched == runs.reference()
    # Not from the checkpoint, whose keys only the test's own runs read.
    launched, stock = runs.split(1, *BY_ITERATIONS), runs.one_process(*BY_ITERATIONS)
    assert launched.require(*range(1, 6)) == stock.require(*range(1, 6))


def test_the_adaptor_as_the_first_line_of_a_script(runs: Runs) -> None:
    """For those who edit their script: one import does what the launcher does."""
    script = runs.script.with_name("pretrain_with_adaptor.py")
    script.write_text("import ldt_schedules.megatron_adaptor\n" + runs.script.read_text())
    shutil.copy(script, runs.script.with_name("pretrain_with_adaptor_as_module.py"))
    options = line(*BY_ITERATIONS, *SPLIT, 2, "--load", runs.checkpoint())
    path = {"PYTHONPATH": str(runs.script.parent)}
    split = torchrun(2, script.stem, *options, folder=runs.folder, **path)
    assert split.require(3, 4, 5) == runs.reference()


def test_what_a_split_model_cannot_honour_is_refused_before_anything_starts(runs: Runs) -> None:
    refused = ("--num-experts", 4, "--sft", "--optimizer", "muon", "--log-straggler", "--own-flag-of-the-user", 1)
    split = runs.split(2, *BY_ITERATIONS, *SPLIT, 2, *refused)
    assert split.code != 0 and "initializing torch distributed" not in split.output
    for flag in ("--num-experts: experts are not supported", "--sft: masks", "--optimizer muon: of its values"):
        assert flag in split.output
    assert re.search(r"--log-straggler: nobody has checked", split.output)
    assert "--own-flag-of-the-user:" not in split.output


UNIT_TESTS = "tests/unit_tests/pipeline_parallel/test_schedules.py"


def test_megatrons_own_unit_tests_of_the_schedules(runs: Runs) -> None:
    """They pass with the patches in place and the switch off, as they do without."""
    pytest.importorskip("pytest_mock")
    command = (UNIT_TESTS, "-p", "unit_tests_plugin", "--noconftest", "-o", "addopts=", "-rA", "-q")
    outcomes = []
    for patches in ("", "applied"):
        path = {"PYTHONPATH": str(runs.script.parent), "LDT_TEST_PATCHES": patches}
        done = torchrun(1, "pytest", *command, folder=runs.script.parent, **path)
        assert done.code == 0, done.complaint
        outcomes.append(set(re.findall(r"^PASSED .*", done.output, re.MULTILINE)))
    assert outcomes[0] == outcomes[1]
    assert any(one.endswith("::test_get_forward_backward_func") for one in outcomes[1]) and len(outcomes[1]) >= 6
