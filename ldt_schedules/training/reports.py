"""What a run tells people and files: plain frozen records, no torch, no terminal."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RankRow:
    """What one pipeline rank holds.

    Attributes:
        layers: spans of layer numbers from 0, first and last included; empty stages are left out.
        parameters: over all tensor-parallel processes of one replica.
        holds: what it has besides layers, in words.
        vision_layers: the ViT's, as `layers` are the language model's; None of a model of text alone.
        trained_parameters: those of `parameters` that learn.
    """

    site: str
    pipeline_rank: int
    processes: int
    layers: tuple[tuple[int, int], ...]
    parameters: int
    holds: tuple[str, ...]
    vision_layers: tuple[tuple[int, int], ...] | None
    trained_parameters: int


@dataclass(frozen=True)
class LinkUse:
    """What crosses the link between the sites, in bytes of tensor payload.

    `up` is edge to cloud (the head's activation, the gradient of the tail's input), `down` is cloud to edge.

    Attributes:
        shape: `[s, b, h]`, between stages with language layers.
        vision_shape: `[patches, 1, h_vision]`, between those with ViT layers; None of a model of text alone. How many
            patches there are, the images decide: it is an estimate, and so are the bytes then.
        segmented: the step header says where each conversation of a sample begins.
    """

    address: str
    dtype: str
    shape: tuple[int, int, int]
    vision_shape: tuple[int, int, int] | None
    segmented: bool
    up_bytes_per_microbatch: int
    down_bytes_per_microbatch: int
    up_bytes_per_step: int
    down_bytes_per_step: int


@dataclass(frozen=True)
class RunDescription:
    """The whole run as it is about to start. `link` is None when the edge is alone; `frozen` names what does not learn.

    `bare` names what crosses the link without a layer having worked on it.
    """

    ranks: tuple[RankRow, ...]
    link: LinkUse | None
    model: str
    data: str
    schedule: str
    iterations: int
    num_microbatches: int
    global_batch_size: int
    tokens_per_step: int
    output_dir: str
    frozen: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return sum(row.parameters for row in self.ranks)

    @property
    def trained_parameters(self) -> int:
        """Those that learn."""
        return sum(row.trained_parameters for row in self.ranks)


@dataclass(frozen=True)
class StepReport:
    """One optimizer step, as the edge saw it.

    Attributes:
        iteration: 1 for the first step.
        loss: nats a token; nan where the step gave none.
        grad_norm: L2 norm of the whole model's gradient, before clipping; None where it was not computed.
        tokens_per_sample: images and text, padding left out; None where it was not asked for.
        bytes_up, bytes_down: across the link in this step, all edge processes together.
        bubble: idle share of the edge's step, 0..1; None where it was not measured.
        skipped: no update, because a gradient was not finite.
        step_s: seconds.
    """

    iteration: int
    loss: float
    grad_norm: float | None
    lr: float
    tokens_per_s: float
    bytes_up: int
    bytes_down: int
    bubble: float | None
    skipped: bool
    step_s: float
    tokens_per_sample: float | None = None


@dataclass(frozen=True)
class EvalReport:
    """One evaluation: after `iteration` steps, over `samples` samples, `loss` in nats a token."""

    iteration: int
    loss: float
    samples: int


@dataclass(frozen=True)
class RunSummary:
    """The end of a run.

    Attributes:
        loss: nats a token, mean of the last steps.
        validation_loss: of the last evaluation; None without one.
        unigram_entropy: of the corpus, nats a token: what a model without context could reach at best; None where that
            says nothing.
        bytes_up, bytes_down: across the link in the whole run.
        metrics_path: where every step is written down.
        saved: the Hugging Face directory of the edge's part of the weights; None: not asked for.
    """

    iterations: int
    loss: float
    validation_loss: float | None
    unigram_entropy: float | None
    bytes_up: int
    bytes_down: int
    elapsed_s: float
    metrics_path: str
    saved: str | None = None
