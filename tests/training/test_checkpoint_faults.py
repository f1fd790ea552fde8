"""What can go wrong with checkpoints: processes killed while they save, damaged files, sites that do not fit together."""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import shutil
import signal
import time
import warnings

import pytest
import torch

from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron.checkpoints import site_directory
from ldt_schedules.megatron.checkpoints.site_directory import Manifest, problems_of, read_manifest, step_name, steps
from ldt_schedules.megatron.checkpoints.torch_dist import open_checkpoint
from ldt_schedules.megatron.converting.merging import merge
from ldt_schedules.topology import Site
from ldt_schedules.training.checkpointing import check_start, choose
from tests.helpers.workers import CONTEXT, WorkerFailure, site_ports
from tests.training.checkpoint_runs import run_all, tiny

ALONE = ("sites.cloud.pipeline_ranks=0", "layers=null", "model.num_layers=2")


def save_for_ever(output, in_background, pipe):
    """Save one step after the other; all weights of step n are n. Tells of each that is complete."""
    from ldt_schedules.training.checkpointing import saver
    from ldt_schedules.training.process import open_process

    warnings.simplefilter("ignore")
    os.environ.update(RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(site_ports()["edge"]))
    background = f"train.async_save={str(in_background).lower()}"
    config = tiny(output, *ALONE, background, "train.keep_checkpoints=2")
    process = open_process(config, Site.EDGE)
    saving = saver(process.start, config, process.place)
    for step in itertools.count(1):
        with torch.no_grad():
            for parameter in process.trained.model.parameters():
                parameter.fill_(float(step))
        saving.save(process.trainee, step, 0)
        pipe.send(step)


@pytest.mark.parametrize("in_background", [False, True], ids=["training waits", "in the background"])
@pytest.mark.parametrize("part", range(5))
def test_killed_while_saving(tmp_path, part, in_background):
    """50 random moments of a process that does nothing but save: what is there under its name is whole and the right one."""
    chance, seen = random.Random(part + 10 * in_background), []
    for attempt in range(5):
        output = tmp_path / str(attempt)
        ours, theirs = CONTEXT.Pipe()
        process = CONTEXT.Process(target=save_for_ever, args=(output, in_background, theirs), daemon=True)
        process.start()
        times = []
        for _ in range(3):
            assert ours.poll(100), "no checkpoint in 100 s"
            ours.recv()
            times.append(time.monotonic())
        time.sleep(chance.uniform(0, times[2] - times[0]))  # somewhere in the next two
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        directory = output / "checkpoints" / "edge"
        held = steps(directory)
        most = 3 + in_background  # two are kept (in the background three), and another is there before the oldest goes
        assert 2 <= len(held) <= most, held
        for step in held:
            check_whole(directory / step_name(step), step)
        seen.append((held[-1], len(held), len(list(directory.glob(".iter*")))))
    print(f"(newest step, steps, half ones): {seen}")


def check_whole(path, step):
    manifest = read_manifest(path, "edge")
    assert manifest.iteration == step and not problems_of(path, manifest.files.items())
    checkpoint = open_checkpoint(path)
    assert checkpoint.common["iteration"] == step
    weights = {key: tensor for key, tensor in checkpoint.tensors.items() if not key.startswith("optimizer.")}
    assert len(weights) > 10
    with checkpoint.reading() as reader:
        for key, tensor in weights.items():
            values = reader.read(checkpoint.region(key, (0,) * len(tensor.shape), tensor.shape))
            assert bool((values == step).all()), f"{key} of step {step} is {values.flatten()[:3]}"


def test_what_a_killed_process_left_is_taken_away(tmp_path):
    part = site_directory.begin(tmp_path, 7)
    (part / "half").write_text("written")
    (tmp_path / ".iter_0000003.part").mkdir()
    assert steps(tmp_path) == []
    site_directory.publish(site_directory.begin(tmp_path, 8), Manifest("edge", 8, "run", {}))
    site_directory.forget_older(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000008", "latest_checkpointed_iteration.txt"]


A, B = "run-a", "run-b"


@pytest.mark.parametrize(
    ("resume", "edge", "cloud", "step"),
    [
        ("never", {}, {}, 0),
        ("auto", {}, {}, 0),
        ("auto", {"50": A, "100": A}, {"50": A}, 50),
        ("auto", {"50": A, "100": A}, {"50": A, "100": A, "150": A}, 100),
        ("auto", {"50": A, "100": B}, {"50": A, "100": A}, 50),
        ("auto", {"9": A, "10": A}, {"9": A, "10": A}, 10),
        (50, {"50": A, "100": A}, {"50": A, "100": A}, 50),
    ],
)
def test_the_newest_step_that_both_hold(resume, edge, cloud, step):
    assert choose(resume, edge, cloud) == step


@pytest.mark.parametrize(
    ("resume", "edge", "cloud", "message"),
    [
        (
            "never",
            {"50": A},
            {},
            "checkpoints of an earlier run .the edge holds steps 50, the cloud none.; set train.resume=auto",
        ),
        ("never", {}, {"50": A}, "checkpoints of an earlier run"),
        ("auto", {"50": A}, {}, "no step is on both sites: the edge holds steps 50, the cloud none"),
        ("auto", {"50": A}, {"100": A}, "no step is on both sites: the edge holds steps 50, the cloud steps 100"),
        ("auto", {"50": A}, {"50": B}, "of step 50 are of two different runs"),
        (
            70,
            {"50": A, "70": A},
            {"50": A},
            "step 70 is not on both sites: the edge holds steps 50, 70, the cloud steps 50",
        ),
    ],
)
def test_sites_that_do_not_fit(resume, edge, cloud, message):
    with pytest.raises(ConfigError, match=message):
        choose(resume, edge, cloud)


@pytest.fixture(scope="module")
def trained(workers, tmp_path_factory):
    """A run of both sites with the steps 2 and 4."""
    output = tmp_path_factory.mktemp("trained")
    run_all(workers, tiny(output))
    return output


@pytest.fixture
def output(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def refusal(workers, output, *overrides):
    """What both sites say; the same in every process but for the site's name."""
    with pytest.raises(WorkerFailure) as failed:
        run_all(workers, tiny(output, "train.iterations=6", "train.resume=auto", *overrides))
    said = str(failed.value)
    assert said.count("ConfigError: ") == 3, said
    return said


@pytest.mark.parametrize("site", ["edge", "cloud"])
def test_damaged_files_are_named_on_both_sites(workers, output, site):
    """A flipped bit in one file, half of another: nothing is loaded, and each is named."""
    step = output / "checkpoints" / site / step_name(4)
    data, common = step / "__0_0.distcp", step / "common.pt"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    common.write_bytes(common.read_bytes()[:-7])
    said = refusal(workers, output)
    assert said.count(f"{data}: its content is not what was written") == 3
    assert said.count(f"{common}: {common.stat().st_size} bytes, {common.stat().st_size + 7} were written") == 3


def test_the_wrong_sites_directory(workers, output):
    shutil.rmtree(output / "checkpoints" / "edge")
    shutil.copytree(output / "checkpoints" / "cloud", output / "checkpoints" / "edge")
    assert "is the cloud's checkpoint, this is the edge; give the edge's own directory" in refusal(workers, output)


def test_another_model(workers, output):
    """Tensors of another shape, and settings that no shape shows."""
    said = refusal(workers, output, "model.norm_eps=1e-6", "model.rope_theta=500.0")
    assert "is of another model than the config's" in said and "model.rope_theta 10000.0 -> 500.0" in said


def test_layers_that_the_other_site_holds(workers, output):
    said = refusal(workers, output, "layers=[2,0,1,1]")
    assert (
        "edge/iter_0000004 does not fit the model" in said and "decoder.layers.1.mlp.linear_fc2.weight: missing" in said
    )


def test_layers_dealt_otherwise_inside_the_cloud(workers, output, tmp_path):
    """Not a refusal: the cloud's directory has all its layers, whichever of its ranks they were on."""
    shutil.copytree(output, tmp_path / "kept")
    (kept,) = run_all(workers, tiny(tmp_path / "kept", "train.resume=auto", "train.iterations=6"))
    (moved,) = run_all(workers, tiny(output, "train.resume=auto", "train.iterations=6", "layers=[1,2,0,1]"))
    assert moved[0].losses == kept[0].losses and len(kept[0].losses) == 2


def test_a_run_of_megatron_that_has_ended(trained, tmp_path):
    """`train.load` goes on where that run was; there is nothing left to do here."""
    merged = tmp_path / "merged"
    merge(trained / "checkpoints" / "edge", trained / "checkpoints" / "cloud", merged, lambda done, total: None)
    with pytest.raises(
        ConfigError, match=r"is the checkpoint after step 4, and train.iterations is 4; raise it to go on"
    ):
        check_start(tiny(tmp_path / "new", f"train.load={merged}"))
    check_start(tiny(tmp_path / "new", f"train.load={merged}", "train.iterations=5"))
    check_start(tiny(tmp_path / "new", f"train.load={merged}", "train.finetune=true"))


def test_a_model_of_more_layers_is_refused(workers, trained, tmp_path):
    """Its first layers alone are another function."""
    merged = tmp_path / "merged"
    merge(trained / "checkpoints" / "edge", trained / "checkpoints" / "cloud", merged, lambda done, total: None)
    fewer = ("model.num_layers=3", "layers=[1,1,1,0]", f"train.load={merged}", "train.finetune=true")
    with pytest.raises(WorkerFailure, match=r"of 4 layers, the model has 3"):
        run_all(workers, tiny(tmp_path / "new", *fewer))


def test_a_learning_rate_that_was_changed_counts(workers, output):
    """The config says it, not what was saved: announced on the first screen, and used."""
    config = tiny(output, "train.resume=auto", "train.iterations=6", "train.lr=1e-5", "train.min_lr=1e-5")
    (ran,) = run_all(workers, config)
    assert ran[0].state["0 lr"][0] == pytest.approx(1e-5)


def test_half_a_copy_is_told_at_the_start(output):
    (output / "checkpoints" / "cloud" / step_name(4) / site_directory.MANIFEST).unlink()
    with pytest.raises(ConfigError, match=r"cloud: .*cloud holds iter_0000004 without ldt.json, copied half"):
        check_start(tiny(output, "train.resume=auto", "train.iterations=6"))


def test_a_step_under_another_number(output):
    directory = output / "checkpoints" / "edge"
    (directory / step_name(4)).rename(directory / step_name(9))
    with pytest.raises(ConfigError, match=r"iter_0000009 was saved after step 4; give it its name"):
        check_start(tiny(output, "train.resume=auto", "train.iterations=16"))


def test_a_run_that_has_ended(workers, output):
    assert "is the checkpoint after step 4, and train.iterations is 4; raise it" in refusal(
        workers, output, "train.iterations=4"
    )


def test_steps_of_an_abandoned_future(workers, output):
    """The cloud had come to step 4, the edge to 2: both go on from 2, and the cloud's old step 4 is not taken for the new one."""
    shutil.rmtree(output / "checkpoints" / "edge" / step_name(4))
    (ran,) = run_all(workers, tiny(output, "train.resume=auto"))
    runs = {
        json.loads((path / site_directory.MANIFEST).read_text())["run"]
        for path in output.glob(f"checkpoints/*/{step_name(4)}")
    }
    assert len(ran[0].losses) == 2 and len(runs) == 1
    assert [path.name for path in output.glob("checkpoints/*/abandoned*")] == ["abandoned_iter_0000004"], "0 keeps all"


def no_space(output, limit):
    from ldt_schedules.training.checkpointing import saver
    from ldt_schedules.training.process import open_process

    warnings.simplefilter("ignore")
    os.environ.update(RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(site_ports()["edge"]))
    wide = ("model.hidden_size=256", "model.num_layers=4")  # a checkpoint of 20 MB
    process = open_process(tiny(output, *ALONE, *wide), Site.EDGE)
    saving = saver(process.start, process.config, process.place)
    saving.save(process.trainee, 1, 0)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        saving.save(process.trainee, 2, 0)
    except ConfigError as error:
        return str(error)


@pytest.mark.parametrize(("limit", "name"), [(4_200_000, "__0_0.distcp"), (10_000, ".iter_0000002.part")])
def test_no_space_left(workers, tmp_path, limit, name):
    """A limit on the size of files stands for a full disk. The step before stays, the half one goes."""
    (said,) = workers.run(no_space, [(tmp_path, limit)])
    assert f"{name} cannot be written: File too large" in said
    directory = tmp_path / "checkpoints" / "edge"
    assert steps(directory) == [1] and not list(directory.glob(".iter*"))
    manifest = read_manifest(directory / step_name(1))
    assert not problems_of(directory / step_name(1), manifest.files.items())
