"""Two recorded runs, step by step: how far they are apart, and what is wrong where that is too far.

One parameter is looked at at a time. Only the first step with something wrong is diagnosed, and of gradients and weights
only what comes first: the rest may follow from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ldt_schedules.training.verification import diagnosis
from ldt_schedules.training.verification.diagnosis import Cause, relative_error
from ldt_schedules.training.verification.records import Kind, StepRecord, open_step
from ldt_schedules.training.verification.report import Finding, Report, StepErrors, about_the_step, when
from ldt_schedules.training.verification.tolerances import Tolerances


def compare(mine: Path, reference: Path, steps: int, tolerances: Tolerances, precision: str, adaptive: bool) -> Report:
    """Hold the records of the split run against those of the reference: the start and `steps` steps.

    Args:
        adaptive: the optimizer divides a gradient by its own size (Adam).
    """
    errors: list[StepErrors] = []
    findings: list[Finding] = []
    noise = SmallGradients(tolerances.small_gradient if adaptive else 0.0)
    for step in range(steps + 1):
        with ExitStack() as opened:
            # Of step 0 the step before it is itself: nothing has moved.
            ours, theirs, ours_before, theirs_before = (
                opened.enter_context(open_step(directory, number))
                for number in (step, max(step - 1, 0))
                for directory in (mine, reference)
            )
            assert ours.names == theirs.names, "the two runs do not have the same parameters"
            comparison = _StepComparison(step, ours, theirs, (ours_before, theirs_before), noise, tolerances)
            errors.append(comparison.errors())
            if not findings:
                findings += comparison.findings(errors[-1])
    if not findings and all(step.skipped for step in errors[1:]):
        summary = "both runs skipped every step, because gradients were not finite: nothing is shown; give more --steps"
        findings.append(about_the_step(steps, "stepped", "was skipped", summary))
    return Report(tuple(errors), tuple(findings), tolerances, precision)


class SmallGradients:
    """Where a gradient was, in some step so far, so small that an adaptive optimizer steps by its rounding.

    Both runs' gradients must be small there, and one of them not 0: an unused row of the embedding is compared.

    Args:
        share: of the root mean square of the parameter's gradient; 0: none is small.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._bits: dict[str, np.ndarray] = {}  # a bit an element, the only thing that is kept of all parameters

    def add(self, name: str, mine: np.ndarray, reference: np.ndarray) -> None:
        """A step's gradients of a parameter."""
        bound = self._share * diagnosis.norm(reference) / np.sqrt(reference.size)
        larger = np.maximum(np.abs(mine), np.abs(reference))
        bits = np.packbits((larger <= bound) & (larger > 0))
        self._bits[name] = bits | self._bits.get(name, np.zeros_like(bits))

    def of(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """True where it was small; `shape` is the parameter's."""
        if name not in self._bits:
            return np.zeros(shape, dtype=bool)
        return np.unpackbits(self._bits[name], count=math.prod(shape)).astype(bool).reshape(shape)


@dataclass
class _StepComparison:
    """One step. `before` are both records of the step before it; `noise` knows the steps so far."""

    step: int
    ours: StepRecord
    theirs: StepRecord
    before: tuple[StepRecord, StepRecord]
    noise: SmallGradients
    tolerances: Tolerances

    def errors(self) -> StepErrors:
        identical = not self.ours.differing_copies()
        if self.step == 0:
            return StepErrors(0, self._weights()[0], replicas_identical=identical)
        skipped = not any(one.stepped for run in (self.ours, self.theirs) for one in run.processes)
        gradients = {} if skipped else self._gradients()
        weights, left_out = self._weights()
        losses = [abs(mine - reference) for mine, reference in zip(self.ours.losses, self.theirs.losses, strict=True)]
        return StepErrors(
            self.step,
            weights,
            left_out,
            loss=float(np.max(losses)),  # Python's max may pass over a nan
            gradients=gradients,
            grad_norm=self._norm(),
            skipped=skipped,
            replicas_identical=identical,
        )

    def _norm(self) -> float | None:
        """Error of the norm; the worst of all processes, which all have both sites'."""
        reference = self.theirs.processes[0].grad_norm
        norms = [one.grad_norm for one in self.ours.processes if one.grad_norm is not None]
        if not norms or reference is None:
            return None
        return max(relative_error(np.float64(one), np.float64(reference)) for one in norms)

    def _gradients(self) -> dict[str, float]:
        errors = {}
        for name in self.theirs.names:
            both = _pair(self.ours, self.theirs, "gradient", name)
            if both is not None:
                errors[name] = relative_error(*both)
                self.noise.add(name, *both)
        return errors

    def _weights(self) -> tuple[dict[str, float], float]:
        """Errors, and the share of elements that were left out."""
        errors: dict[str, float] = {}
        elements = left_out = 0
        for name in self.theirs.names:
            both = _pair(self.ours, self.theirs, "weight", name)
            assert both is not None
            mine, reference = both
            noisy = self.noise.of(name, mine.shape)
            elements, left_out = elements + mine.size, left_out + int(noisy.sum())
            errors[name] = relative_error(np.where(noisy, reference, mine), reference)
        return errors, left_out / elements

    def findings(self, errors: StepErrors) -> list[Finding]:
        """What is above its tolerance."""
        of_gradients = self._grouped("gradient", errors.gradients, self.tolerances.gradients)
        return [
            *self._about_the_step(errors),
            *(of_gradients or self._grouped("weight", errors.weights, self.tolerances.weights)),
        ]

    def _about_the_step(self, errors: StepErrors) -> Iterator[Finding]:
        if errors.loss is not None and not errors.loss <= self.tolerances.loss:
            summary = f"the loss of a microbatch differs by {errors.loss:.2g} nats a token"
            yield about_the_step(self.step, "loss", "differs", summary)
        if errors.grad_norm is not None and not errors.grad_norm <= self.tolerances.grad_norm:
            summary = f"the gradient norm differs by {errors.grad_norm:.2g} of it"
            yield about_the_step(self.step, "grad_norm", "differs", summary)
        updates = {one.stepped for one in self.ours.processes}
        if updates != {one.stepped for one in self.theirs.processes}:
            did = "partly skipped its update" if len(updates) > 1 else "updated" if updates == {True} else "skipped"
            yield about_the_step(self.step, "stepped", did, f"the split run {did}, unlike the reference")
        copies = self.ours.differing_copies()
        if copies:
            summary = f"copies of {_listed(copies)} are not equal on all processes that hold one"
            yield about_the_step(self.step, "replicas", "differs between copies", summary, tuple(copies))

    def _grouped(self, kind: Kind, errors: dict[str, float], allowed: float) -> list[Finding]:
        """One finding for all parameters of a site with the same diagnosis."""
        groups: dict[tuple[str, Cause], list[str]] = {}
        for name in sorted(errors, key=lambda one: -errors[one]):
            if not errors[name] <= allowed:
                groups.setdefault((self.ours.site(name), self._cause(kind, name)), []).append(name)
        held = [self.ours.site(name) for name in errors]
        return [
            _finding(self.step, kind, site, tuple(names), held.count(site), cause, errors[names[0]])
            for (site, cause), names in groups.items()
        ]

    def _cause(self, kind: Kind, name: str) -> Cause:
        both = _pair(self.ours, self.theirs, kind, name)
        before = _pair(*self.before, "weight", name)
        assert both is not None and before is not None
        if kind == "weight":
            cause = diagnosis.stood_still((before[0], both[0]), (before[1], both[1]), self.step)
            if cause is not None:
                return cause
        return diagnosis.diagnose(*both, *self.ours.partition(name))


def _pair(ours: StepRecord, theirs: StepRecord, kind: Kind, name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Both runs' tensors; None where neither has one, a frozen parameter's gradient. One that is missing is 0."""
    mine, reference = ours.tensor(kind, name), theirs.tensor(kind, name)
    if mine is None:
        return None if reference is None else (np.zeros_like(reference), reference)
    return mine, np.zeros_like(mine) if reference is None else reference


def _finding(
    step: int, kind: Kind, site: str, names: tuple[str, ...], held: int, cause: Cause, error: float
) -> Finding:
    """About `names`, the worst of which has `error`, out of `held` parameters of the site."""
    if len(names) == 1:
        summary = f"a {kind} of the {site} {cause.one}"
        text = f"{when(step)}: the {kind} of {names[0]} ({site}) {cause.one} (error {error:.2g})"
    else:
        how_many = f"all {held}" if len(names) == held else f"{len(names)} of {held}"
        summary = f"the {kind}s of {how_many} parameters of the {site} {cause.many}"
        text = f"{when(step)}: {summary}; worst {names[0]} (error {error:.2g})"
    return Finding(step, f"{kind}s", site, names, cause.one, summary, text)


def _listed(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
