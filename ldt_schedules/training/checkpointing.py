"""From where a run goes on, and what it keeps. Both sites decide together; each reads and writes its own directory only.

edge    checkpoints/edge/   iter_0000050  iter_0000100                    both hold 100: resume=auto goes on there
cloud   checkpoints/cloud/                iter_0000100  iter_0000150
"""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldt_schedules.errors import ConfigError, LdtError
from ldt_schedules.megatron.checkpoints import site_directory
from ldt_schedules.topology import Place, Site
from ldt_schedules.training.config import TrainConfig, shared_fingerprint

if TYPE_CHECKING:
    from ldt_schedules.megatron.checkpoints.site_saver import SiteSaver
    from ldt_schedules.megatron.checkpoints.site_state import Trainee
    from ldt_schedules.megatron.session import Session

Held = Mapping[str, str]
"""Step (a number, as JSON has it) -> the run it is of."""

_MAY_CHANGE = frozenset(
    {"train.save_interval", "train.resume", "train.load", "train.finetune", "train.eval_interval"}
    | {"train.eval_iterations", "train.save_hf", "model.hf"}
)
"""Keys that a resumed run may have otherwise without a word: they change nothing of a step."""

_MAY_CHANGE_OF_MODEL = frozenset({"model.hf", "model.dropout", "model.precision", "model.seq_length", "model.megatron"})
"""Keys of the model that leave it the same function."""


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        run: its name, in all its checkpoints; another one each time that a run is started.
        consumed_samples: over all replicas.
        path: the checkpoint of this site; None: the model's first weights.
        resumed: it is this run's own, with random states; else `train.load`.
        notes: for the edge's screen.
    """

    run: str
    iteration: int = 0
    consumed_samples: int = 0
    path: Path | None = None
    resumed: bool = False
    notes: tuple[str, ...] = field(default=())


def site_checkpoints(config: TrainConfig, site: Site) -> Path:
    """The directory in which a site keeps its steps."""
    train = config.train
    return Path(train.checkpoint_dir or Path(train.output_dir) / "checkpoints") / str(site)


def find_start(config: TrainConfig, place: Place, run: Session | None) -> Start:
    """Agree with the other site on where to begin. A collective of both sites.

    Raises:
        ConfigError: on both sites: no step that both hold, steps of two runs, an earlier run in the way, or `train.load`
            cannot be read.
    """
    from ldt_schedules.megatron import agreement
    from ldt_schedules.megatron.checkpoints.strategies import gathered

    # What one process cannot read, all must hear of; the rest is the first one's to say.
    everybody = gathered(_said(config, place.site))
    mine = {**everybody[0], "problem": next((said["problem"] for said in everybody if said["problem"]), None)}
    both = {Site.EDGE: mine, Site.CLOUD: mine} if run is None else agreement.exchange(run, "checkpoints", mine)
    return _start(config, place.site, both)


def check_start(config: TrainConfig) -> None:
    """What `find_start` would refuse, before processes start, where both sites are on this machine. Raises ConfigError."""
    sites = [site for site in Site if config.site_processes(site)]
    said = {site: _said(config, site) for site in sites}
    for site in sites:
        _start(config, site, {site: said.get(site, said[Site.EDGE]) for site in Site})


def _start(config: TrainConfig, site: Site, both: Mapping[Site, Mapping[str, Any]]) -> Start:
    iteration = _chosen(config, both)
    edge, cloud = both[Site.EDGE], both[Site.CLOUD]
    if iteration:
        return _resumed(config, site, iteration, edge["new_run"])
    if config.train.load is None:
        return Start(edge["new_run"])
    if edge["loaded"] != cloud["loaded"]:
        raise ConfigError(
            f"train.load: the edge's checkpoint is of step {edge['loaded'][0]}, the cloud's of step {cloud['loaded'][0]}; give "
            "both sites parts of the same step"
        )
    path = site_directory.newest_step(Path(config.train.load))
    if config.train.finetune:
        return Start(edge["new_run"], path=path, notes=(f"weights from {path}",))
    done, consumed = edge["loaded"]
    _check_iterations(config, done, path)
    consumed = consumed or done * config.train.global_batch_size
    return Start(edge["new_run"], done, consumed, path, notes=(f"goes on after step {done} of {path}",))


def _check_iterations(config: TrainConfig, done: int, path: Path) -> None:
    if config.train.iterations <= done:
        raise ConfigError(
            f"{path} is the checkpoint after step {done}, and train.iterations is {config.train.iterations}; raise it to go on "
            "(train.lr_decay_iterations says how long the learning rate decays), or set train.finetune=true for a new run"
        )


def _chosen(config: TrainConfig, both: Mapping[Site, Mapping[str, Any]]) -> int:
    _refuse_problems(both)
    steps = (both[site]["steps"] for site in Site)
    return choose(config.train.resume, *steps, saves=config.train.save_interval > 0)


def choose(resume: str | int, edge: Held, cloud: Held, saves: bool = True) -> int:
    """The step after which a run begins, by what both sites hold; 0: at the beginning.

    Raises:
        ConfigError: see `find_start`.
    """
    held = f"the edge holds {_listed(edge)}, the cloud {_listed(cloud)}"
    common = sorted(int(step) for step in edge if step in cloud)
    if resume == "never":
        if saves and (edge or cloud):
            raise ConfigError(
                f"there are checkpoints of an earlier run ({held}); set train.resume=auto to go on, or give this run a "
                "train.output_dir (train.checkpoint_dir) of its own"
            )
        return 0
    if resume == "auto":
        if not edge and not cloud:
            return 0
        wanted = [step for step in common if edge[str(step)] == cloud[str(step)]][-1:] or common[-1:]
    else:
        wanted = [step for step in common if step == resume]
    if not wanted:
        which = "no step is on both sites" if resume == "auto" else f"step {resume} is not on both sites"
        raise ConfigError(
            f"train.resume={resume}: {which}: {held}; give a step that both hold, or train.resume=never and other directories"
        )
    step = wanted[-1]
    if edge[str(step)] != cloud[str(step)]:
        raise ConfigError(
            f"train.resume={resume}: the sites' checkpoints of step {step} are of two different runs ({edge[str(step)]} at the "
            f"edge, {cloud[str(step)]} in the cloud); give both sites their directories of the same run"
        )
    return step


def _listed(held: Held) -> str:
    return f"steps {', '.join(sorted(held, key=int))}" if held else "none"


def _said(config: TrainConfig, site: Site) -> dict[str, Any]:
    """What this site has to offer; what is wrong with it as a text, so that both sites hear of it."""
    directory, load = site_checkpoints(config, site), config.train.load
    said: dict[str, Any] = {"steps": {}, "loaded": None, "problem": None, "new_run": uuid.uuid4().hex[:12]}
    try:
        for step in site_directory.steps(directory):
            manifest = site_directory.read_manifest(directory / site_directory.step_name(step), str(site))
            said["steps"][str(step)] = manifest.run
        half = site_directory.incomplete(directory) if config.train.save_interval else []
        if half:
            raise ConfigError(
                f"{directory} holds {', '.join(half)} without {site_directory.MANIFEST}, copied half or another program's; "
                "remove it, or give this run a train.checkpoint_dir of its own"
            )
        if load is not None:
            said["loaded"] = _loaded_step(site_directory.newest_step(Path(load)), site)
    except (ConfigError, OSError) as error:
        said["problem"] = str(error)
    return said


def _loaded_step(path: Path, site: Site) -> tuple[int, int]:
    """Its step, and how many samples were read until then; 0 where it does not say."""
    from ldt_schedules.megatron.checkpoints.torch_dist import open_checkpoint

    common = open_checkpoint(path).common
    consumed = getattr(common.get("args"), "consumed_train_samples", 0)
    if (path / site_directory.MANIFEST).is_file():
        consumed = site_directory.read_manifest(path, str(site)).consumed_samples
    return int(common.get("iteration", 0)), int(consumed or 0)


def _refuse_problems(both: Mapping[Site, Mapping[str, Any]]) -> None:
    problems = [f"{site}: {said['problem']}" for site, said in both.items() if said["problem"]]
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))


def _resumed(config: TrainConfig, site: Site, iteration: int, new_run: str) -> Start:
    from ldt_schedules.megatron import agreement

    path = site_checkpoints(config, site) / site_directory.step_name(iteration)
    manifest = site_directory.read_manifest(path, str(site))
    changed = [
        line.replace(": edge ", " ").replace(", cloud ", " -> ")
        for line in agreement.differing_keys(dict(manifest.settings), settings(config))
        if line.partition(":")[0] not in _may_change(config)
    ]
    other_model = [
        line for line in changed if line.startswith("model.") and line.split()[0] not in _MAY_CHANGE_OF_MODEL
    ]
    if other_model:
        raise ConfigError(f"{path} is of another model than the config's:\n  " + "\n  ".join(other_model))
    _check_iterations(config, iteration, path)
    notes = [f"goes on after step {iteration} of {path}", *(f"otherwise than before: {line}" for line in changed)]
    return Start(new_run, iteration, manifest.consumed_samples, path, True, tuple(notes))


def _may_change(config: TrainConfig) -> frozenset[str]:
    """Without a length of its own the decay of the learning rate is as long as the run."""
    return _MAY_CHANGE if config.train.lr_decay_iterations is None else _MAY_CHANGE | {"train.iterations"}


def settings(config: TrainConfig) -> dict[str, Any]:
    """What both sites have agreed on, as it is kept in a checkpoint."""
    return shared_fingerprint(config)


def restore(start: Start, config: TrainConfig, place: Place, run: Session | None, trainee: Trainee) -> None:
    """Fill the model, and all else that is kept, from `start.path`. A collective of both sites.

    Raises:
        ConfigError: in every process of both sites, what any of them found: a damaged file, tensors that do not fit.
    """
    from ldt_schedules.megatron import agreement
    from ldt_schedules.megatron.checkpoints.strategies import gathered

    if start.path is None:
        return
    problem = None
    try:
        _restore_site(start, config, place, trainee)
    except (LdtError, OSError) as error:
        problem = str(error)
    mine = {"problem": next((one for one in gathered(problem) if one), None)}
    _refuse_problems({place.site: mine} if run is None else agreement.exchange(run, "loading of checkpoints", mine))


def _restore_site(start: Start, config: TrainConfig, place: Place, trainee: Trainee) -> None:
    from ldt_schedules.megatron.checkpoints.random_states import seed_after
    from ldt_schedules.megatron.checkpoints.site_state import Trainee, load_random_states, load_state
    from ldt_schedules.megatron.checkpoints.torch_dist import open_checkpoint
    from ldt_schedules.megatron.checkpoints.verifying import verify

    assert start.path is not None
    manifest = verify(start.path)
    checkpoint = open_checkpoint(start.path)
    weights_alone = config.train.finetune and not start.resumed
    load_state(
        Trainee(trainee.model) if weights_alone else trainee,
        checkpoint,
        num_layers=_num_layers(config),
        # Megatron-LM's schedule counts samples, ours steps.
        schedule_steps=start.iteration if manifest is None else None,
    )
    if weights_alone and trainee.inner_optimizer is not None:
        trainee.optimizer.reload_model_params()
    same_world = start.resumed and manifest is not None and manifest.sizes == sizes(config, place.site)
    if not (same_world and load_random_states(checkpoint)):
        seed_after(config.train.seed, start.iteration)


def _num_layers(config: TrainConfig) -> dict[str, int]:
    if not config.has_vision:
        return {"decoder.": config.model.num_layers}
    return {"language.decoder.": config.model.num_layers, "vision.decoder.": config.vision.num_layers}


def saver(start: Start, config: TrainConfig, place: Place) -> SiteSaver | None:
    """None where nothing is to be saved. A collective of the site. Raises ConfigError: the directory cannot be written."""
    from ldt_schedules.megatron.checkpoints.site_saver import SiteSaver
    from ldt_schedules.megatron.checkpoints.strategies import on_first

    if not config.train.save_interval:
        return None
    versions = {name: metadata.version(name) for name in ("torch", "megatron-core")}
    manifest = site_directory.Manifest(
        site=str(place.site),
        iteration=start.iteration,
        run=start.run,
        sizes=sizes(config, place.site),
        settings=settings(config),
        versions=versions,
    )
    directory = site_checkpoints(config, place.site)
    on_first(lambda: _prepare(directory, start.iteration))
    return SiteSaver(directory, manifest, config.train.keep_checkpoints, config.train.async_save)


def _prepare(directory: Path, iteration: int) -> None:
    """Try to write there now, not when the first checkpoint is due; and put what came after `iteration` aside."""
    site_directory.begin(directory, 0).rmdir()
    for name in site_directory.set_aside(directory, iteration):
        warnings.warn(
            f"a later step of the run before is kept as {directory / name} until the first checkpoint", stacklevel=2
        )


def sizes(config: TrainConfig, site: Site) -> dict[str, int]:
    """Of the site's world: a process of another one has other random states."""
    size, topology = config.topology.size(site), config.topology
    return {"tensor": size.tensor, "data": size.data, "context": size.context, "pipeline": topology.pipeline_size(site)}
