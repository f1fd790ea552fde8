"""What a verification says: errors of each step, findings, verdict."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from ldt_schedules.training.verification.tolerances import Tolerances


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        step: 0 is before the first.
        kind: weights, gradients, loss, grad_norm, stepped or replicas.
        site: that holds the parameters; None where it is not about the parameters of one site.
        parameters: the worst first; empty where it is not about parameters.
        cause: what is wrong with each of them, "is 0.5 times the reference".
        summary: in a few words, without names.
        text: a sentence.
    """

    step: int
    kind: str
    site: str | None
    parameters: tuple[str, ...]
    cause: str
    summary: str
    text: str


def about_the_step(step: int, kind: str, cause: str, summary: str, parameters: tuple[str, ...] = ()) -> Finding:
    """A finding that is not about the parameters of one site."""
    return Finding(step, kind, None, parameters, cause, summary, f"{when(step)}: {summary}")


def when(step: int) -> str:
    """How a step is called."""
    return f"step {step}" if step else "start"


@dataclass(frozen=True)
class StepErrors:
    """One step; 0 is before the first and has weights only.

    Attributes:
        loss: largest absolute difference of a microbatch's, nats a token.
        gradients, weights: error of each parameter by its name.
        left_out: share of all elements whose weight is not compared, see `tolerances`.
        grad_norm: relative; None where no norm was computed.
        skipped: no update on either run, because a gradient was not finite; then gradients are not compared.
        replicas_identical: are all copies of each weight equal to the last bit?
    """

    step: int
    weights: dict[str, float]
    left_out: float = 0.0
    loss: float | None = None
    gradients: dict[str, float] = field(default_factory=dict)
    grad_norm: float | None = None
    skipped: bool = False
    replicas_identical: bool = True

    @property
    def worst_gradient(self) -> str | None:
        """The parameter with the largest error."""
        return max(self.gradients, key=lambda name: self.gradients[name], default=None)

    def figures(self) -> dict[str, Any]:
        """For JSON: without each parameter's error."""
        return {
            "step": self.step,
            "skipped": self.skipped,
            "abs_loss_error": _number(self.loss),
            "max_rel_grad_error": _number(max(self.gradients.values(), default=None)),
            "worst_parameter": self.worst_gradient,
            "grad_norm_rel_error": _number(self.grad_norm),
            "weights_rel_error": _number(max(self.weights.values())),
            "weights_left_out": self.left_out,
            "replicas_identical": self.replicas_identical,
        }


@dataclass(frozen=True)
class Report:
    """What a comparison found; `passed` when nothing."""

    steps: tuple[StepErrors, ...]
    findings: tuple[Finding, ...]
    tolerances: Tolerances
    precision: str

    @property
    def passed(self) -> bool:
        return not self.findings

    @property
    def compared_steps(self) -> int:
        """Steps with an update."""
        return sum(step.step > 0 and not step.skipped for step in self.steps)

    def figures(self) -> dict[str, Any]:
        """For JSON."""
        gradients = [(error, name) for step in self.steps for name, error in step.gradients.items()]
        gradient, name = max(gradients, key=lambda one: one[0], default=(None, None))
        losses = [step.loss for step in self.steps if step.loss is not None]
        norms = [step.grad_norm for step in self.steps if step.grad_norm is not None]
        return {
            "passed": self.passed,
            "max_rel_grad_error": _number(gradient),
            "worst_parameter": name,
            "max_abs_loss_error": _number(max(losses, default=None)),
            "weights_rel_error": _number(max(error for step in self.steps for error in step.weights.values())),
            "grad_norm_rel_error": _number(max(norms, default=None)),
            "replicas_identical": all(step.replicas_identical for step in self.steps),
            "precision": self.precision,
            "tolerances": asdict(self.tolerances),
            "steps": [step.figures() for step in self.steps],
            "diagnosis": [asdict(finding) for finding in self.findings],
        }


def _number(value: float | None) -> float | str | None:
    """JSON has no infinity: "inf" and "nan" are words."""
    return value if value is None or math.isfinite(value) else str(value)
