"""Looks after receives: whose header is there, whose payload. A thread does so while the stages compute, and whoever waits.

It never waits inside a backend: a message that is marked (`message_mark`) is there, and waiting for it takes no time.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ldt_schedules import device
from ldt_schedules.comm.message_mark import is_marked, view_of_mark

_LOOK_S = 0.003

Payload = Callable[[], "tuple[Any, torch.Tensor, Callable[[], Any]]"]
"""Asked when a header is there: the posted receive of the payload (None: there is none), its buffer, and what makes the
content of it."""


@dataclass
class _Expected:
    work: Any
    mark: np.ndarray | None
    payload: Payload
    content: Callable[[], Any] | None = None
    future: Future[Any] = field(default_factory=Future)


class Pump:
    """One for each process. Receives of one key come in the order in which they were posted."""

    def __init__(self) -> None:
        self._lines: dict[Any, deque[_Expected]] = {}
        self._changed = threading.Condition()
        self._looking = threading.Lock()
        self._ended = False
        self._looked_s = 0.0
        self._device = device.current_device()
        self._thread = threading.Thread(target=self._run, name="ldt-receives", daemon=True)
        self._thread.start()

    def expect(self, key: Any, work: Any, header: torch.Tensor, payload: Payload) -> Future[Any]:
        """A receive whose header has been posted, into `header`; the future is of its content."""
        one = _Expected(work, view_of_mark(header), payload)
        with self._changed:
            self._lines.setdefault(key, deque()).append(one)
            self._changed.notify()
        return one.future

    def look(self) -> bool:
        """Take every line further as far as it goes now; did any go on? For one who waits; the thread rests meanwhile."""
        self._looked_s = time.monotonic()
        return self._look()

    def _look(self) -> bool:
        with self._looking:
            with self._changed:
                lines = [line for line in self._lines.values() if line]
            return any([_advance(line) for line in lines])

    def end(self) -> None:
        """Stop looking; receives that are not there yet never come."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=10)
        self._lines.clear()

    def _run(self) -> None:
        device.select_device(self._device.index or 0)  # a new thread begins on the first one
        while True:
            with self._changed:
                while not self._ended and not any(self._lines.values()):
                    self._changed.wait()
                if self._ended:
                    return
            if time.monotonic() - self._looked_s < _LOOK_S or not self._look():
                time.sleep(_LOOK_S)


def _advance(line: deque[_Expected]) -> bool:
    """Take the first of a line further, if what it waits for is there."""
    one = line[0]
    try:
        if not _is_there(one):
            return False
        if one.work is not None:
            one.work.wait()
        if one.content is None:
            one.work, buffer, one.content = one.payload()
            one.mark = view_of_mark(buffer)
            return True
        result = one.content()
    except BaseException as error:
        one.future.set_exception(error)
    else:
        one.future.set_result(result)
    line.popleft()
    return True


def _is_there(one: _Expected) -> bool:
    if one.work is None or one.mark is None:
        return one.work is None or bool(one.work.is_complete())
    return is_marked(one.mark)
