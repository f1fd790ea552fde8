"""What is in a checkpoint, one entry for each layer's tensor, whichever way its layers and sites are cut.

    decoder.layers.mlp.linear_fc2.weight [6, h, f]      six parts: decoder.layers.0.mlp.linear_fc2.weight [h, f], ...
    decoder.layers.3.mlp.linear_fc2.weight [h, f]       one
    embedding.word_embeddings.weight [V, h]             one

Two sites' checkpoints together have the parts of a whole model, each in one of them. Objects, the states of Transformer Engine's
modules, carry their place in their key: `…._extra_state/shard_3_6` is layer 3 of 6, or layer 3's own `/shard_0_1`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron.checkpoints.layer_keys import is_stacked, key_of_layer, layer_key
from ldt_schedules.megatron.checkpoints.torch_dist import Region, TensorReader, TorchDistCheckpoint
from ldt_schedules.megatron.converting.module_states import module_state

EMBEDDING = "embedding.word_embeddings.weight"
_OF_OPTIMIZER = re.compile(r"^(?:chained_\d+\.)?optimizer\.")
_OF_CHAINED = re.compile(r"^chained_\d+\.optimizer\.")
_PARAMETER_STATE = re.compile(r"^optimizer\.state\.[^.]+\.(?P<key>.+)$")
_SHARD = re.compile(r"^(?P<key>.+)/shard_(?P<offset>\d+(?:\.\d+)*)_(?P<shape>\d+(?:\.\d+)*)$")
_STATE_OF_MODULE = "._extra_state"
_LANGUAGE, _VISION = ("decoder.", "language.decoder."), "vision."
_MAX_LISTED = 12


@dataclass(frozen=True)
class Part:
    """A tensor that is in no layer, or one layer's."""

    checkpoint: TorchDistCheckpoint
    region: Region

    @property
    def dtype(self) -> torch.dtype:
        return self.checkpoint.tensors[self.region.key].dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.region.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class ObjectPart:
    """A module's state, and the key under which the checkpoint has it."""

    checkpoint: TorchDistCheckpoint
    key: str


def parts_of(checkpoint: TorchDistCheckpoint, weights_only: bool = False) -> dict[str, Part]:
    """Key -> part; keys of layers are numbered.

    Raises:
        ConfigError: the optimizer's tensors are not those of parameters; or the files do not hold what the index promises.
    """
    parts: dict[str, Part] = {}
    for key, tensor in checkpoint.tensors.items():
        if weights_only and is_of_optimizer(key):
            continue
        if is_of_optimizer(key) and _PARAMETER_STATE.match(key) is None:
            raise ConfigError(_unreadable_state(checkpoint, key))
        _check_stored(checkpoint, key)  # before as many parts are made as the index says there are layers
        if is_stacked(key) and tensor.shape:
            shape = tensor.shape[1:]
            for layer in range(tensor.shape[0]):
                parts[key_of_layer(key, layer)] = Part(checkpoint, Region(key, (0,) * len(shape), shape, layer))
        else:
            parts[key] = Part(checkpoint, Region(key, (0,) * len(tensor.shape), tensor.shape))
    return parts


def _unreadable_state(checkpoint: TorchDistCheckpoint, key: str) -> str:
    if _OF_CHAINED.match(key):
        return (
            f"{checkpoint.path} has the state of several optimizers in a chain ({key}), as of a mixture of experts or of "
            "--decoupled-lr; that is not read: give --weights-only"
        )
    return (
        f"{checkpoint.path} has the optimizer's state by its place in a buffer ({key}); save it with "
        "--dist-ckpt-optim-fully-reshardable (up to megatron-core 0.13: --ckpt-fully-parallel-save), or give --weights-only"
    )


def _check_stored(checkpoint: TorchDistCheckpoint, key: str) -> None:
    """Raises ConfigError: the stored parts do not make up the tensor, or are longer than the files in which they lie."""
    problem = checkpoint.uncovered(key)
    for chunk in () if problem else checkpoint.tensors[key].chunks:
        # At least an element in each row: nobody's layers are empty, and their number is to be true.
        promised = math.prod(max(1, size) for size in chunk.shape) * checkpoint.tensors[key].dtype.itemsize
        problem = problem or checkpoint.missing_bytes(chunk.stored)
        if not problem and chunk.stored.length < promised:
            problem = (
                f"{checkpoint.path / chunk.stored.file} has {chunk.stored.length} bytes of {key}, its index promises "
                f"{promised}; copy the checkpoint again"
            )
    if problem:
        raise ConfigError(problem)


def objects_of(checkpoint: TorchDistCheckpoint) -> dict[str, ObjectPart]:
    """States of modules, keys of layers numbered. Random states and a loader's place are left out: they fit one layout.

    Raises:
        ConfigError: a file is missing or cut off.
    """
    found = {}
    for unique_key, stored in checkpoint.objects.items():
        shard = _SHARD.match(unique_key)
        if shard is None or not shard["key"].endswith(_STATE_OF_MODULE):
            continue
        key, place = shard["key"], f"/shard_{shard['offset']}_{shard['shape']}"
        if is_stacked(key):
            layer, _, rest = shard["offset"].partition(".")
            key = key_of_layer(key, int(layer))
            place = f"/shard_{rest}_{shard['shape'].partition('.')[2]}" if rest else "/shard_0_1"
        problem = checkpoint.missing_bytes(stored)
        if problem:
            raise ConfigError(problem)
        found[key + place] = ObjectPart(checkpoint, unique_key)
    return found


def stacked_object_key(unique_key: str, num_layers: int) -> str:
    """Of an object of `objects_of`: the key under which Megatron has it where layers are stacked.

    >>> stacked_object_key("decoder.layers.3.mlp.linear_fc1._extra_state/shard_0_1", 6)
    'decoder.layers.mlp.linear_fc1._extra_state/shard_3_6'
    """
    shard = _SHARD.match(unique_key)
    layer = None if shard is None else layer_key(shard["key"])
    if shard is None or layer is None:
        return unique_key
    if (shard["offset"], shard["shape"]) == ("0", "1"):
        return f"{layer.stacked}/shard_{layer.layer}_{num_layers}"
    return f"{layer.stacked}/shard_{layer.layer}.{shard['offset']}_{num_layers}.{shard['shape']}"


def is_of_optimizer(key: str) -> bool:
    return _OF_OPTIMIZER.match(key) is not None


def parameter_key(key: str) -> str:
    """The parameter that a tensor of the optimizer belongs to; a parameter's own key is itself."""
    state = _PARAMETER_STATE.match(key)
    return key if state is None else state["key"]


def has_embedding(keys: Iterable[str]) -> bool:
    """Only the edge's part of a model does."""
    return any(key.endswith(EMBEDDING) and not is_of_optimizer(key) for key in keys)


def layer_counts(keys: Iterable[str], expected: int | None = None) -> dict[str, int]:
    """Stacked key -> number of layers, of keys that are numbered.

    Args:
        expected: layers of the language model, where it is known; without it, as many as the last number says.
    """
    layers = _layers(keys)
    most: dict[str, int] = {}
    for stacked, numbers in layers.items():
        tower = _tower(stacked)
        known = expected if expected is not None and tower in _LANGUAGE else 0
        most[tower] = max(most.get(tower, known), 1 + max(numbers))
    return {stacked: most[_tower(stacked)] for stacked in layers}


def incomplete(keys: Iterable[str], expected: int | None = None) -> list[str]:
    """Keys of layers that are missing: some layers have such a tensor, others not."""
    given = list(keys)
    layers = _layers(given)
    counts = layer_counts(given, expected)
    return [
        key_of_layer(stacked, layer)
        for stacked, numbers in layers.items()
        for layer in range(counts[stacked])
        if layer not in numbers
    ]


def layers_among(keys: Iterable[str], vision: bool = False) -> set[int]:
    """Numbers of the language model's layers, or of the vision encoder's."""
    found = (layer_key(parameter_key(key)) for key in keys)
    return {one.layer for one in found if one is not None and one.stacked.startswith(_VISION) == vision}


def _layers(keys: Iterable[str]) -> dict[str, set[int]]:
    layers: dict[str, set[int]] = {}
    for found in filter(None, map(layer_key, keys)):
        layers.setdefault(found.stacked, set()).add(found.layer)
    return layers


def _tower(stacked: str) -> str:
    """What a stack of layers belongs to: `decoder.`, `vision.decoder.`."""
    return parameter_key(stacked).rpartition("layers.")[0]


def listed(names: Iterable[str]) -> str:
    """For messages."""
    every = list(names)
    more = f" and {len(every) - _MAX_LISTED} more" if len(every) > _MAX_LISTED else ""
    return ", ".join(every[:_MAX_LISTED]) + more


class PartReader:
    """Reads parts and objects of several checkpoints; from `reading`."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack, self._readers = stack, dict[int, TensorReader]()

    def tensor(self, part: Part) -> torch.Tensor:
        """In the dtype of the checkpoint."""
        return self._reader(part.checkpoint).read(part.region)

    def state(self, part: ObjectPart) -> Any:
        """Of a module; see `module_states`. Raises ConfigError: it is not plain, or damaged."""
        raw = self._reader(part.checkpoint).bytes(part.checkpoint.objects[part.key])
        return module_state(raw, f"{part.key} in {part.checkpoint.path}")

    def _reader(self, checkpoint: TorchDistCheckpoint) -> TensorReader:
        if id(checkpoint) not in self._readers:
            self._readers[id(checkpoint)] = self._stack.enter_context(checkpoint.reading())
        return self._readers[id(checkpoint)]


@contextmanager
def reading() -> Iterator[PartReader]:
    """Files are opened when they are first needed, and stay open until the end."""
    with ExitStack() as stack:
        yield PartReader(stack)
