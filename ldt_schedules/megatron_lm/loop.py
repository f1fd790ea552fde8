"""What else Megatron's training loop asks, that one site alone would answer wrongly."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ldt_schedules.megatron import session
from ldt_schedules.megatron.cross_site import anywhere, both_sites
from ldt_schedules.topology import Site

Function = Callable[..., Any]

_KNOWN_BY_THE_DATA = ("do_train", "do_valid", "do_test", "consumed_train_samples", "consumed_valid_samples")


def no_data_in_the_cloud(original: Function) -> Function:
    """For `build_train_valid_test_data_iterators`: the edge tells which splits there are, the cloud opens none."""

    def build_train_valid_test_data_iterators(*args: Any, **kwargs: Any) -> Any:
        run = session.current()
        if run is None:
            return original(*args, **kwargs)
        from megatron.training import get_args

        arguments = get_args()
        if run.place.site is Site.EDGE:
            iterators = original(*args, **kwargs)
            run.from_edge("data", {name: getattr(arguments, name) for name in _KNOWN_BY_THE_DATA})
            return iterators
        for name, value in run.from_edge("data", {}).items():
            setattr(arguments, name, value)
        return None, None, None

    return build_train_valid_test_data_iterators


def parameter_norm_of_both_sites(original: Function) -> Function:
    """For `calc_params_l2_norm` (`--log-params-norm`)."""

    def calc_params_l2_norm(*args: Any, **kwargs: Any) -> float:
        run = session.current()
        mine = original(*args, **kwargs)
        return float(mine) if run is None else math.hypot(*both_sites(run, float(mine), "norms of the parameters"))

    return calc_params_l2_norm


def signals_of_both_sites(original: Function) -> Function:
    """For `DistributedSignalHandler.signals_received`: when one site is told to stop, both save and stop."""

    def signals_received(self: Any) -> list[bool]:
        run = session.current()
        received: list[bool] = original(self)
        return received if run is None else [anywhere(run, any(received), "signals")]

    return signals_received
