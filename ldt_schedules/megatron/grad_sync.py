"""When gradients may be reduced over the data-parallel replicas.

Megatron reduces a bucket when all its parameters have their last gradient, so it must know which backward is the last:
all others run inside `no_sync`. A U's edge runs the last backward of the tail long before the last one of the head, so
the gate opens for each stage's last backward and closes again in between.

A weight that head and tail share gets a gradient from both, so it is complete only after the head's. Then the gate stays
shut to the end, and the reduction starts there (Megatron up to 0.15 would reduce it after the first of the two).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron.session import Session
from ldt_schedules.planning.actions import Action, Kind
from ldt_schedules.topology import Site

Callback = Callable[..., Any]


class GradSync:
    """The gate for one step of one process.

    Args:
        config: of the model: `no_sync_func` and `grad_sync_func`, each a function, a list (one for each chunk) or None.
        model: the list of (DDP-wrapped) chunks the training loop passed.
        row: this rank's row of the table.
        at_end_only: see above; also for ranks on which Megatron itself reduces in the final bubble.
    """

    def __init__(self, config: Any, model: list[Any], row: tuple[Action, ...], at_end_only: bool) -> None:
        no_sync = config.no_sync_func
        # A function that is not in a list closes all chunks by itself.
        self._no_sync = per_chunk(no_sync, model, "no_sync_func") if isinstance(no_sync, list) else [no_sync]
        self._grad_sync = per_chunk(config.grad_sync_func, model, "grad_sync_func")
        self._model = model
        self._at_end_only = at_end_only
        self._closed: contextlib.ExitStack | None = None
        self._last: dict[int, int] = {}
        for action in row:
            if action.kind is Kind.B:
                self._last[action.stage] = action.microbatches[-1]
        self._remaining = len(self._last)

    def close(self) -> None:
        """Before the step: gradients accumulate and stay local."""
        if self._closed is None:
            self._closed = contextlib.ExitStack()
            for no_sync in filter(None, self._no_sync):
                self._closed.enter_context(no_sync())

    def open(self) -> None:
        """From here on a gradient that is complete may be reduced."""
        if self._closed is not None:
            self._closed.close()
            self._closed = None

    @contextlib.contextmanager
    def around_backward(self, stage: int, microbatch: int) -> Iterator[None]:
        """The gate is open while a stage's last backward runs, and after the last of all."""
        is_last = self._last[stage] == microbatch and not self._at_end_only
        if is_last:
            self.open()
            self._remaining -= 1
        yield
        if is_last and self._remaining:
            self.close()

    def finish(self) -> None:
        """After the step: reduce what has not been."""
        if self._closed is None:
            return
        self.open()
        if self._grad_sync:
            for grad_sync, chunk in zip(self._grad_sync, self._model, strict=True):
                grad_sync(chunk.parameters())
        elif self._at_end_only:
            for chunk in self._model:
                if getattr(chunk, "ddp_config", None) is not None and chunk.ddp_config.overlap_grad_reduce:
                    chunk.start_grad_sync()


def scale_to_global_batch(run: Session, config: Any, model: list[Any]) -> None:
    """Make the cloud's gradients those of the mean over the global batch, once they are reduced and final.

    The edge divides each microbatch's loss by its own number of microbatches, D times a cloud replica's, and that is the
    gradient that comes to the cloud: 1 / (D M_c). Megatron averages over dp_c replicas, where the global batch has
    M_c dp_c microbatches, so D is missing. Scaling here and not at the boundary keeps what crosses the link, and what
    returns to the edge, bit for bit what one process would compute. With per-token loss Megatron sums, and divides by
    the tokens of both sites' whole batch: nothing is missing.
    """
    if run.place.site is Site.CLOUD and run.domain_scale != 1 and not config.calculate_per_token_loss:
        for chunk in model:
            chunk.scale_gradients(run.domain_scale)


def per_chunk(given: Callback | list[Callback] | None, model: list[Any], option: str) -> list[Callback]:
    """The callback of each chunk: one function serves all of them, a list has one for each; none at all is empty.

    Raises:
        ConfigError: a list of another length.
    """
    if given is None:
        return []
    functions = list(given) if isinstance(given, list) else [given] * len(model)
    if len(functions) != len(model):
        raise ConfigError(f"{option} is a list of {len(functions)} functions for {len(model)} model chunks")
    return functions
