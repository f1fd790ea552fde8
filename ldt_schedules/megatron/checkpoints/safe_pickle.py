"""Reads pickles without running what is written in them.

A pickle is a program: whoever wrote it chooses which functions are called. torch's distributed checkpoints keep their index
(`.metadata`) as one, Megatron its common state (`common.pt`). Here a pickle may name what such files consist of and nothing
else. What of torch's and Megatron's own classes we have no use for (the plan of the save, enums among the arguments) is
replaced by an object that does nothing; any other name is refused, and said.

    load(file)                              a bare pickle
    torch.load(file, pickle_module=safe_pickle, weights_only=False)      one inside torch's format
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from pickle import UnpicklingError  # noqa: F401 - torch.load asks a pickle module for it
from typing import Any

_KEPT: dict[str, frozenset[str]] = {
    "builtins": frozenset({"set", "frozenset", "slice", "complex", "int", "float", "str", "bool"}),
    "collections": frozenset({"OrderedDict", "defaultdict"}),
    "argparse": frozenset({"Namespace"}),
    "types": frozenset({"SimpleNamespace"}),
    "_codecs": frozenset({"encode"}),
    "torch": frozenset(
        {"Size", "device", "strided"}
        | {"float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"}
        | {"int64", "int32", "int16", "int8", "uint8", "bool"}
        | {
            f"{kind}Storage"
            for kind in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
        }
    ),
    "torch._utils": frozenset({"_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter"}),
    "torch.serialization": frozenset({"_get_layout"}),
    "torch.distributed.checkpoint.metadata": frozenset(
        {"Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"}
        | {"StorageMeta"}
    ),
    "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo"}),
}
_OPEN_MODULES = ("argparse", "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
"""Their classes can be changed by whoever gets hold of them."""
_REPLACED = ("torch.distributed.checkpoint.", "megatron.", "transformer_engine.", "pathlib", "signal")


class Forbidden(pickle.UnpicklingError):
    """A pickle names something that it may not; `name` is what."""

    def __init__(self, name: str) -> None:
        super().__init__(f"it would call {name}")
        self.name = name


class Inert:
    """Stands for an object that we have no use for. Takes anything, does nothing, is hashable."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes what the original's constructor took."""

    def __setstate__(self, state: Any) -> None:
        """The original's content is dropped."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """The same, of a mapping."""

    def extend(self, items: Iterable[Any]) -> None:
        """The same, of a list."""

    append = extend


class _Properties(Inert):
    """Of a tensor the index keeps its dtype, first of five."""

    dtype: Any = None

    def __setstate__(self, state: Any) -> None:
        self.dtype = state["dtype"] if isinstance(state, dict) else state[0]


class Unpickler(pickle.Unpickler):
    """Raises Forbidden at the first name that is not allowed, before it is looked up.

    A pickle may also set attributes, of classes, too. So it gets subclasses, made for it alone.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._own: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._own:
            self._own[module, name] = self._found(module, name)
        return self._own[module, name]

    def _found(self, module: str, name: str) -> Any:
        if name in _KEPT.get(module, ()):
            kept = super().find_class(module, name)
            return type(name, (kept,), {}) if module in _OPEN_MODULES else kept
        if module.startswith("torch.distributed.checkpoint.") and name == "TensorProperties":
            return type(name, (_Properties,), {})
        if module.startswith(_REPLACED):
            return type(name, (Inert,), {})
        if (module, name) == ("builtins", "getattr"):
            return _member
        raise Forbidden(f"{module}.{name}")


def _member(owner: Any, name: Any) -> Inert:
    """In the place of `getattr`, by which Python 3.11.0 to 3.11.3 write a member of an enum."""
    if not (isinstance(owner, type) and issubclass(owner, Inert)):
        raise Forbidden("builtins.getattr")
    return Inert()


def load(file: Any, **kwargs: Any) -> Any:
    """As `pickle.load`."""
    return Unpickler(file, **kwargs).load()
