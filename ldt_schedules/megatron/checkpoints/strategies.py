"""Saving and loading a sharded state dict: the format of torch_dist.py behind megatron-core's dist_checkpointing.

    dist_checkpointing.save(state, directory, SaveInParts(), async_sharded_save=True)   -> AsyncRequest

megatron-core decides what is saved and by whom (replicas, factories, checks of the sharding); only the writing is ours, and
only reading goes past it: its `load` insists that all processes of one world together ask for every part of a tensor, and
keeps a second copy of each tensor that a factory cuts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    apply_factories,
    is_main_replica,
)
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.base import AsyncSaveShardedStrategy

from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron.checkpoints.layer_keys import is_stacked, layer_key
from ldt_schedules.megatron.checkpoints.torch_dist import BACKEND, Region, TensorReader, TorchDistCheckpoint
from ldt_schedules.megatron.checkpoints.torch_dist_writer import (
    ChunkWriter,
    WrittenFile,
    file_name,
    write_index,
)

_T = TypeVar("_T")


def gathered(mine: _T) -> list[_T]:
    """What each process of this site's world gave, on all of them."""
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    return everybody


def on_first(work: Callable[[], _T]) -> _T:
    """Let the site's first process do something to its files; all get the result, or its failure as a ConfigError."""
    outcome: tuple[str, Any] = ("result", None)
    if dist.get_rank() == 0:
        try:
            outcome = ("result", work())
        except Exception as error:
            outcome = ("error", str(error))
    kind, value = gathered(outcome)[0]
    if kind == "error":
        raise ConfigError(value)
    return value  # type: ignore[no-any-return]


@dataclass
class SaveInParts(AsyncSaveShardedStrategy):
    """For `dist_checkpointing.save`: each process writes what it is the main replica of; the first writes the index.

    Attributes:
        written: after the request's last function: what each process wrote, on all of them.
    """

    written: tuple[WrittenFile, ...] = ()

    def __post_init__(self) -> None:
        super().__init__(BACKEND, 1)

    @property
    def can_handle_sharded_objects(self) -> bool:
        return True

    def save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
        """Write while training waits, without a copy."""
        path = Path(checkpoint_dir) / file_name(dist.get_rank())
        self._finish(path.parent, _outcome(_parts(nested_values(sharded_state_dict), copied=False), path))

    def async_save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> AsyncRequest:
        """The tensors are copied now, written by `async_fn`, and known to all after `finalize_fns`."""
        path = Path(checkpoint_dir) / file_name(dist.get_rank())
        copies = list(_parts(nested_values(sharded_state_dict), copied=True))
        outcome: list[WrittenFile | Exception] = []

        def write() -> None:
            outcome.append(_outcome(copies, path))
            copies.clear()

        def finish() -> None:
            assert outcome, "the request's async_fn has not run in this process"
            self._finish(path.parent, outcome[0])

        return AsyncRequest(write, (), [finish])

    def _finish(self, directory: Path, outcome: WrittenFile | Exception) -> None:
        outcomes = gathered(outcome)
        failed = [one for one in outcomes if isinstance(one, Exception)]
        if failed:
            raise failed[0]
        self.written = written = tuple(one for one in outcomes if isinstance(one, WrittenFile))
        on_first(lambda: write_index(directory, written))


@dataclass(frozen=True)
class _Part:
    """What is to be written under a key. `value` of a tensor has all dimensions of the whole."""

    key: str
    value: Any
    offsets: tuple[int, ...] = ()
    shape: tuple[int, ...] | None = None


def _parts(sharded: Iterable[Any], copied: bool) -> Iterator[_Part]:
    """Those of which this process is the main replica.

    Args:
        copied: in memory of their own, because training goes on while they are written.
    """
    for one in sharded:
        if not is_main_replica(one.replica_id):
            continue
        if isinstance(one, ShardedObject):
            yield _Part(one.unique_key, one.data)
            continue
        # What would set it is refused before training starts, see `site_state.check_savable`.
        assert getattr(one, "flattened_range", None) is None, f"{one.key} is cut in the middle of rows"
        data = one.data.detach().to("cpu", copy=copied).reshape((1,) * one.prepend_axis_num + tuple(one.local_shape))
        yield _Part(one.key, data, tuple(one.global_offset), tuple(one.global_shape))


def _outcome(parts: Iterable[_Part], path: Path) -> WrittenFile | Exception:
    """What was written, or why it could not be: that all processes must hear of."""
    try:
        with ChunkWriter(path.parent, path.name) as writer:
            for one in parts:
                if one.shape is None:
                    writer.put_object(one.key, [one.value])  # a list, as megatron-core does
                else:
                    writer.put(one.key, one.value, one.offsets, one.shape)
    except Exception as error:
        return error
    assert writer.written is not None
    return writer.written


def shards_of(state: Any) -> list[Any]:
    """Every ShardedTensor and ShardedObject of a sharded state dict, factories written out. Changes `state`."""
    apply_factories(state)
    return [one for one in nested_values(state) if isinstance(one, ShardedTensor | ShardedObject)]


@dataclass(frozen=True)
class Wanted:
    """A shard and the region of the checkpoint that fills it."""

    shard: Any
    region: Region


_MAIN_WEIGHT = re.compile(r"^optimizer\.state\.(?:fp32_param|param)\.(?P<key>.+)$")


def _names(key: str) -> tuple[str, ...]:
    """Under which keys a tensor may lie: an optimizer's own copy of a weight has two names, and may be the weight itself.

    `fp32_param` with 16-bit weights, `param` of a distributed optimizer, neither of any other in float32.
    """
    found = _MAIN_WEIGHT.match(key)
    if found is None:
        return (key,)
    return (key, *(f"optimizer.state.{kind}.{found['key']}" for kind in ("fp32_param", "param")), found["key"])


def find(shards: Iterable[Any], checkpoint: TorchDistCheckpoint) -> tuple[list[Wanted], list[str]]:
    """Where everything lies, and what does not fit: key, what is wrong. Nothing is read, nothing is changed."""
    wanted, problems = [], []
    for shard in shards:
        if isinstance(shard, ShardedObject):
            continue
        # Of a key that stacks layers in the model as well the first dimension is the layer.
        ahead = shard.prepend_axis_num
        offsets, shape = tuple(shard.global_offset), (1,) * ahead + tuple(shard.local_shape)
        regions = (checkpoint.region(name, offsets, shape) for name in _names(shard.key))
        region = next((one for one in regions if one is not None), None)
        if region is None:
            problems.append(f"{shard.key}: missing")
            continue
        problem = _mismatch(shard, checkpoint, region)
        if problem:
            problems.append(f"{shard.key}: {problem}")
        wanted.append(Wanted(shard, region))
    return wanted, problems


_MOST_PADDING = 1024
"""Rows: 128, Megatron's unit of a padded vocabulary, times 8 tensor-parallel processes."""


def _mismatch(shard: Any, checkpoint: TorchDistCheckpoint, region: Region) -> str:
    """What is wrong with the tensor that `region` is of, for this shard; empty if nothing is.

    A padded vocabulary (`allow_shape_mismatch`) may have other rows.
    """
    whole, wanted = checkpoint.shape_of(region), tuple(shard.global_shape)
    padded = shard.allow_shape_mismatch and len(whole) == len(wanted) and abs(whole[0] - wanted[0]) < _MOST_PADDING
    if not (whole[1:] == wanted[1:] if padded else whole == wanted):
        return f"{list(whole)}, the model has {list(wanted)}"
    problem = checkpoint.uncovered(region.key)
    if problem:
        return problem
    problems = {checkpoint.missing_bytes(chunk.stored) for chunk in checkpoint.tensors[region.key].chunks}
    return next(iter(sorted(problems - {""})), "")


def kinds_of(wanted: Iterable[Wanted]) -> set[str]:
    """Keys of layers without their number."""
    return {kind for one in wanted if (kind := _kind(one.shard.key)) is not None}


def unasked(kinds: Collection[str], checkpoint: TorchDistCheckpoint, num_layers: Mapping[str, int]) -> list[str]:
    """Weights of layers that the model has not: of a kind that no layer has, or of layers behind its last.

    What is in no layer may be the other site's.

    Args:
        kinds: of all processes of the site (`kinds_of`); none, and nothing is said.
        num_layers: the beginning of layers' keys (`decoder.`) -> how many the whole model has.
    """
    found = []
    for key, tensor in checkpoint.tensors.items() if kinds else ():
        if key.startswith("optimizer.") or (kind := _kind(key)) is None:
            continue
        count = next((count for start, count in num_layers.items() if key.startswith(start)), None)
        layer = layer_key(key)
        held = tensor.shape[0] if layer is None else layer.layer + 1
        if kind not in kinds:
            found.append(f"{key}: not in the model")
        elif count is not None and (held > count or (layer is None and held != count)):
            found.append(f"{key}: of {held} layers, the model has {count}")
    return found


def _kind(key: str) -> str | None:
    """A layer's key without its number; None of what is in no layer."""
    layer = layer_key(key)
    if layer is not None:
        return layer.stacked
    return key if is_stacked(key) else None


def fill(wanted: Iterable[Wanted], reader: TensorReader) -> None:
    """Read each region into its shard's own memory.

    Raises:
        ConfigError: a file is damaged.
    """
    with torch.no_grad():
        for one in wanted:
            target, flat = one.shard.data, getattr(one.shard, "flattened_range", None)
            if one.shard.allow_shape_mismatch:
                target.zero_()
            if flat is None:
                reader.fill(target, one.region)
            else:
                target.copy_(reader.read(one.region).flatten()[flat])
