"""The few numbers that one site must know of the other: gradient norm, overflow, number of tokens.

Each is first reduced inside the site by Megatron's own code over Megatron's own groups. Then the two sites' answers are
joined by one sum over the link, to which only the first process of each site contributes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from ldt_schedules import device
from ldt_schedules.megatron import session
from ldt_schedules.megatron.session import Session
from ldt_schedules.megatron.two_phases import norm_was_summed, ready
from ldt_schedules.topology import Site


def both_sites(run: Session, value: float, what: str) -> tuple[float, float]:
    """`(edge's value, cloud's value)`, each as the first process of that site gave it. A collective of both sites."""
    vector = torch.zeros(2, dtype=torch.float64)
    if run.place.site_rank == 0:
        vector[0 if run.place.site is Site.EDGE else 1] = value
    edge, cloud = run.link.sum_over_sites(vector, what).tolist()
    return edge, cloud


def anywhere(run: Session, flag: bool, what: str) -> bool:
    """Is `flag` set in any process of either site? A collective of both sites."""
    return bool(run.link.sum_over_sites(torch.tensor([float(flag)]), what).item() > 0)


def grad_norm_of_both_sites(original: Callable[..., float]) -> Callable[..., float]:
    """For `get_grad_norm_fp32`: the p-norm of both sites' gradients together, p = inf included."""

    @functools.wraps(original)
    def get_grad_norm_fp32(grads_for_norm: Any, norm_type: float = 2, *args: Any, **kwargs: Any) -> float:
        run = session.current()
        if run is None:
            return original(grads_for_norm, norm_type, *args, **kwargs)
        if isinstance(grads_for_norm, list) and not grads_for_norm:
            # Everything here is frozen. Megatron takes the maximum of nothing; a zero changes no norm.
            grads_for_norm = [torch.zeros(1, device=device.current_device())]
        edge, cloud = both_sites(run, float(original(grads_for_norm, norm_type, *args, **kwargs)), "gradient norms")
        norm_was_summed(run)
        if math.isinf(norm_type):
            return max(edge, cloud)
        return float((edge**norm_type + cloud**norm_type) ** (1.0 / norm_type))

    return get_grad_norm_fp32


def zeros_of_both_sites(original: Callable[..., float]) -> Callable[..., float]:
    """For `count_zeros_fp32`."""

    @functools.wraps(original)
    def count_zeros_fp32(*args: Any, **kwargs: Any) -> float:
        run, mine = session.current(), original(*args, **kwargs)
        return mine if run is None else sum(both_sites(run, float(mine), "zeros among the gradients"))

    return count_zeros_fp32


def overflow_on_either_site(original: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """For `_unscale_main_grads_and_check_for_nan`: both sites must hear of it before they update their loss scales."""

    @functools.wraps(original)
    def unscale_and_check(self: Any) -> bool:
        run = session.current()
        return original(self) if run is None else ready(run, original(self))

    return unscale_and_check


def non_finite_on_either_site(original: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """For `prepare_grads`: with no loss scale Megatron does not look for infs; we do, and both sites skip the step."""

    @functools.wraps(original)
    def prepare_grads(self: Any) -> bool:
        found = original(self)
        run = session.current()
        if run is None or getattr(self, "grad_scaler", None):
            return found
        return ready(run, found or not _all_finite(_grads(self)))

    return prepare_grads


def _grads(optimizer: Any) -> list[torch.Tensor]:
    if optimizer.is_stub_optimizer:
        return []
    if hasattr(optimizer, "_collect_main_grad_data_for_unscaling"):
        return optimizer._collect_main_grad_data_for_unscaling()  # type: ignore[no-any-return]
    return [param.grad for param in optimizer.get_parameters() if param.grad is not None]


def _all_finite(grads: list[torch.Tensor]) -> bool:
    return all(bool(torch.isfinite(grad).all()) for grad in grads)


def share_num_tokens(run: Session, num_tokens: torch.Tensor) -> None:
    """Give the cloud the edge's count of loss tokens, in place, before gradients are divided by it.

    The loss is computed at the edge, so a cloud process has counted 0. Each edge replica passes its own count on to its
    first domain; Megatron then sums the counts over the replicas on each site, so both come to the same.
    """
    count = run.from_edge("number of tokens", {"num_tokens": int(num_tokens)})["num_tokens"]
    num_tokens.fill_(count if run.place.domain == 0 else 0)
