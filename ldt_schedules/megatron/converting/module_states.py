"""The states of modules (`_extra_state`): read without running what is written in them, and written anew.

What stock Megatron saves for a module is None, or what Transformer Engine makes of a value:

    io.BytesIO      torch.save of it (up to Transformer Engine 1.x)
    a tensor        its bytes are a pickle of it; no bytes: there is nothing

Whoever loads the state executes that inner pickle. So it is read here as well, and only plain values come through, in a pickle
of ours. Without FP8 there are no others; the recipe of FP8 is an object of a class, and is refused.
"""

from __future__ import annotations

import io
import pickle
import sys
from pickle import UnpicklingError  # noqa: F401 - torch.load asks a pickle module for it
from typing import Any

import torch

from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron.checkpoints import safe_pickle

_MODULES = ("builtins", "collections", "_codecs", "torch", "torch._utils")
_SIMPLE = (type(None), bool, int, float, str, bytes)
_ARCHIVE, _OF_TORCHSCRIPT = b"PK", "constants.pkl"
_ADVICE = "give --weights-only, which leaves the states of modules empty"


class Unpickler(safe_pickle.Unpickler):
    """Of what `safe_pickle` allows: plain values and tensors, no class that stands for another; and io.BytesIO."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_io", "BytesIO"):
            return io.BytesIO
        if module not in _MODULES:
            raise safe_pickle.Forbidden(f"{module}.{name}")
        return super().find_class(module, name)


def load(file: Any, **kwargs: Any) -> Any:
    """As `pickle.load`; torch.load takes this module for a pickle module."""
    return Unpickler(file, **kwargs).load()


def module_state(raw: bytes, name: str) -> Any:
    """The state of a module that lies in a checkpoint as `raw`, of plain values and pickles of such, made here.

    Args:
        name: of the state, and where it is, for messages.

    Raises:
        ConfigError: it is something else, would run code when it is loaded, or is damaged.
    """
    try:
        (saved,) = _from_archive(raw)  # a list, as megatron-core does
        if isinstance(saved, io.BytesIO):
            return _archived(_plain(_from_archive(saved.getvalue())))
        if isinstance(saved, torch.Tensor):
            return _pickled(_plain(load(io.BytesIO(_bytes_of(saved))))) if saved.numel() else _bytes_as_tensor(b"")
        return _plain(saved)
    except safe_pickle.Forbidden as error:
        raise ConfigError(
            f"{name} is refused: when opened {error}. Only plain values are taken over; {_ADVICE}"
        ) from None
    except ConfigError:
        raise
    except Exception as error:  # whatever a damaged pickle or archive makes of itself
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{name} is damaged ({first}); copy the checkpoint again, or {_ADVICE}") from None


def _from_archive(raw: bytes) -> Any:
    """What torch.save wrote. Refused are what torch.load takes besides: TorchScript, a program, and formats of before 2020."""
    archive = torch._C.PyTorchFileReader(io.BytesIO(raw)) if raw.startswith(_ARCHIVE) else None
    if archive is None or _OF_TORCHSCRIPT in archive.get_all_records():
        raise pickle.UnpicklingError("not an archive of torch.save")
    return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=False, pickle_module=sys.modules[__name__])


def _plain(value: Any) -> Any:
    """A copy that is made of nothing but plain types. Raises Forbidden: there is another in it."""
    if type(value) in _SIMPLE:
        return value
    if isinstance(value, dict):
        return {_plain(key): _plain(one) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    raise safe_pickle.Forbidden(f"{type(value).__module__}.{type(value).__name__}")


def _archived(value: Any) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return buffer


def _pickled(value: Any) -> torch.Tensor:
    return _bytes_as_tensor(pickle.dumps(value))


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _bytes_as_tensor(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
