"""What a microbatch has to be computed in a stage, in floating-point operations."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StageWork:
    """Floating-point operations of one microbatch in one stage, all tensor-parallel processes together.

    Attributes:
        forward: F.
        input_grad: I, what is computed a second time included.
        weight_grad: W.
    """

    forward: float = 0.0
    input_grad: float = 0.0
    weight_grad: float = 0.0

    @classmethod
    def of(cls, linear: float, core: float, recomputed: float) -> StageWork:
        """Of layers that learn.

        Args:
            linear: products with weights, in a forward.
            core: attention's products of activations with activations, in a forward.
            recomputed: the part of the forward that the backward does again.
        """
        return cls(linear + core, linear + 2 * core + recomputed, linear)

    def __add__(self, other: StageWork) -> StageWork:
        return StageWork(
            self.forward + other.forward, self.input_grad + other.input_grad, self.weight_grad + other.weight_grad
        )
