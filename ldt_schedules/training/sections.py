"""The sections of a training config: every key, its unit, its default and its bounds.

The descriptions are shown to users in error messages, so they say meaning and unit in a few words. What involves two
keys (a batch size that does not divide, say) is checked in `config.py`, where all sections are at hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ldt_schedules.planning.layout import MAX_RANKS
from ldt_schedules.planning.planners import PLANNERS
from ldt_schedules.training.checkpoint_keys import CheckpointKeys
from ldt_schedules.training.rope_section import RopeScalingSection
from ldt_schedules.training.section import Section

FIRST_TRACED_ITERATION = 3
"""Steps 1 and 2 pay for what is set up once: memory pools, connections, lazily loaded code."""


OTHER_SHAPES = ("num_moe_experts", "multi_latent_attention", "mtp_num_layers", "context_parallel_size")
"""Fields of megatron-core's TransformerConfig that change what a layer holds and costs in ways that are not worked out here."""


def set_among(names: Iterable[str], megatron: Mapping[str, Any]) -> list[str]:
    """Those of `names` that `model.megatron` sets to something; a size of 1 is nothing, True is not 1."""
    return [name for name in names if (value := megatron.get(name)) is True or value not in (None, False, 1)]


def _with_ffn(given: Any) -> Any:
    """What a user wrote of a tower, with an MLP that is as wide as usual where he does not say."""
    if isinstance(given, dict) and type(given.get("hidden_size")) is int:
        return {"ffn_hidden_size": 4 * given["hidden_size"], **given}
    return given


class ModelSection(Section):
    """The language model that is trained. Its vocabulary comes from the tokenizer."""

    num_layers: int = Field(8, ge=1, description="transformer layers of the whole model")
    hidden_size: int = Field(128, ge=1, description="width of the residual stream, elements")
    ffn_hidden_size: int = Field(512, ge=1, description="width inside the MLP, elements; default 4 x hidden_size")
    num_attention_heads: int = Field(4, ge=1, description="attention heads of a layer")
    num_query_groups: int = Field(4, ge=1, description="key/value heads of a layer; default num_attention_heads")
    head_dim: int | None = Field(None, ge=1, description="width of a head; default hidden_size / num_attention_heads")
    seq_length: int = Field(128, ge=1, description="tokens of a sample")
    tie_embeddings: bool = Field(False, description="the output layer uses the embedding's weight")
    normalization: Literal["LayerNorm", "RMSNorm"] = Field("RMSNorm", description="kind of normalization")
    activation: Literal["gelu", "swiglu"] = Field("gelu", description="activation of the MLP")
    position_embedding: Literal["rope", "learned_absolute"] = Field("rope", description="how positions enter")
    linear_bias: bool = Field(False, description="linear layers have a bias")
    qkv_bias: bool = Field(False, description="the projections to query, key and value have a bias")
    qk_norm: bool = Field(False, description="each head's query and key pass a norm before they are turned")
    norm_eps: float = Field(1e-5, gt=0.0, description="added to the variance in a norm")
    rope_theta: float = Field(10_000.0, gt=0.0, description="base of the rotary angles")
    rope_scaling: RopeScalingSection | None = Field(
        None, description="rotary angles for longer texts: a type, linear, llama3 or yarn, and its numbers"
    )
    mrope_section: list[int] | None = Field(
        None, description="rotary angles for time, height and width, with vision; default: 1/4, 3/8, 3/8 of them"
    )
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="probability of dropping an element")
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = Field("fp32", description="dtype of weights and activations")

    hf: str | None = Field(
        None, description="Hugging Face directory (config.json, safetensors): sizes and first weights come from it"
    )
    megatron: dict[str, Any] = Field(
        default_factory=dict, description="further fields of megatron-core's TransformerConfig, by their own names"
    )

    @model_validator(mode="before")
    @classmethod
    def _derive_defaults(cls, given: Any) -> Any:
        if isinstance(given, dict) and type(given.get("num_attention_heads")) is int:
            given = {"num_query_groups": given["num_attention_heads"], **given}
        return _with_ffn(given)

    @property
    def scaling(self) -> dict[str, Any] | None:
        """`rope_scaling` as `megatron/rotary.py` takes it."""
        return None if self.rope_scaling is None else self.rope_scaling.model_dump(exclude_none=True)

    @property
    def head_width(self) -> int:
        """Width of a head, of queries, keys and values alike."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    @property
    def query_width(self) -> int:
        """Of all heads together; the residual stream may be wider or narrower."""
        return self.num_attention_heads * self.head_width

    @property
    def kv_width(self) -> int:
        """Of all key heads together, and of all value heads."""
        return self.num_query_groups * self.head_width


class VisionSection(Section):
    """The vision encoder of a vision-language model, as Qwen2.5-VL has it. With 0 layers the model is one of text."""

    num_layers: int = Field(0, ge=0, description="transformer layers of the vision encoder; 0: a model of text alone")
    hidden_size: int = Field(64, ge=1, description="width of the vision encoder, elements")
    ffn_hidden_size: int = Field(256, ge=1, description="width inside its MLP, elements; default 4 x hidden_size")
    num_attention_heads: int = Field(4, ge=1, description="its attention heads")
    patch_size: int = Field(14, ge=1, description="side of a patch, pixels")
    temporal_patch_size: int = Field(2, ge=1, description="video frames of a patch; an image is doubled")
    merge_size: int = Field(2, ge=1, description="a square of so many patches a side becomes one token")
    window_size: int = Field(112, ge=1, description="side of an attention window, pixels")
    full_attention_layers: list[int] = Field([], description="layers, from 0, that see the whole image, not a window")
    tokens_per_second: int = Field(2, ge=1, description="steps of the time position in a second of video")
    min_pixels: int = Field(3136, ge=1, description="smaller images are enlarged to so many pixels")
    max_pixels: int = Field(50_176, ge=1, description="larger images are reduced to so many pixels")
    image_token: int | None = Field(
        None, ge=0, description="placeholder id; null: the tokenizer's, or one behind its own"
    )
    video_token: int | None = Field(None, ge=0, description="the same for videos")
    frozen: list[Literal["vit", "projector", "language"]] = Field([], description="parts that are not trained")

    @model_validator(mode="before")
    @classmethod
    def _derive_defaults(cls, given: Any) -> Any:
        return _with_ffn(given)


class EdgeSection(Section):
    """The site that holds the data, the first and last layers and the loss: pipeline rank 0."""

    tensor_parallel: int = Field(1, ge=1, description="processes that share each layer")
    data_parallel: int = Field(1, ge=1, description="replicas of the model; the cloud's a multiple of the edge's")
    sequence_parallel: bool = Field(False, description="tensor-parallel processes share norms and dropout, too")


class CloudSection(EdgeSection):
    """The site that holds the middle layers: pipeline ranks 1, 2, ..."""

    pipeline_ranks: int = Field(
        2, ge=0, lt=MAX_RANKS, description="pipeline ranks of the cloud; 0 trains on the edge alone"
    )


class SitesSection(Section):
    """Who takes part. Both sites must be told the same."""

    edge: EdgeSection = EdgeSection()  # type: ignore[call-arg]
    cloud: CloudSection = CloudSection()  # type: ignore[call-arg]


class ScheduleSection(Section):
    """In which order microbatches run through the stages."""

    planner: str = Field(
        "ldt_1f1b", description="the planner that makes the table; default ldt_1f1b, with vision ldt_2lap_1f1b"
    )
    memory: str = Field("dev", description="memory budget of auto: none, 1x, 2x, dev, 8GiB, or one amount a rank")
    table: str | None = Field(None, description="file of a ready table, used instead of the planner")

    @field_validator("planner")
    @classmethod
    def _is_planner(cls, name: str) -> str:
        if name not in PLANNERS:
            raise ValueError(f"Value should be {' or '.join(PLANNERS)}")
        return name


class DataSection(Section):
    """The corpus. Only the edge reads this section's files; it may be anything on the cloud."""

    path: str | None = Field(
        None,
        description="text file, or .jsonl with `text` or `messages` a line; null: the sources of Python's own library, or "
        "questions about its functions. With vision .jsonl with `messages`; null: drawn charts with questions",
    )
    format: Literal["auto", "text", "messages"] = Field(
        "auto", description="documents or conversations; auto: as the first line of a .jsonl says"
    )
    packing: bool = Field(
        True,
        description="conversations of text share a sample, each seeing itself alone; false: one a sample, filled up",
    )
    tokenizer: str = Field("bytes", min_length=1, description="`bytes`, or a Hugging Face directory or name")
    validation_fraction: float = Field(0.05, ge=0.0, lt=1.0, description="share of the corpus kept for evaluation")
    padding_side: Literal["right", "left"] = Field(
        "right", description="where short samples of conversations are filled up"
    )
    on_bad_sample: Literal["stop", "skip"] = Field(
        "stop", description="what to do about a conversation that cannot be used"
    )


class TrainSection(CheckpointKeys):
    """How long, how fast, how often."""

    iterations: int = Field(200, ge=1, description="optimizer steps of the run")
    global_batch_size: int = Field(32, ge=1, description="samples of a step, over all replicas")
    micro_batch_size: int = Field(4, ge=1, description="samples of a microbatch, on one replica")
    seed: int = Field(1234, ge=0, lt=2**31, description="of weights, dropout and the order of samples")
    lr: float = Field(2e-3, gt=0.0, description="learning rate at its peak")
    min_lr: float = Field(2e-4, ge=0.0, description="learning rate at the end of the cosine decay")
    lr_decay_iterations: int | None = Field(
        None, ge=1, description="steps over which the learning rate decays; default train.iterations"
    )
    warmup_iterations: int = Field(10, ge=0, description="steps in which the learning rate rises from 0")
    weight_decay: float = Field(0.01, ge=0.0, description="decoupled weight decay, a step")
    optimizer: Literal["adam", "sgd"] = Field("adam", description="optimizer")
    clip_grad: float = Field(1.0, ge=0.0, description="largest L2 norm of the whole gradient; 0 does not clip")
    calculate_per_token_loss: bool = Field(False, description="divide by the tokens of the step, not microbatch-wise")
    eval_interval: int = Field(50, ge=0, description="steps between evaluations; 0 never evaluates")
    eval_iterations: int = Field(2, ge=1, description="global batches of one evaluation")
    log_interval: int = Field(10, ge=1, description="steps between lines where the output is no terminal")
    output_dir: str = Field("runs/default", min_length=1, description="directory of logs, metrics, checkpoints")
    threads: int = Field(1, ge=1, description="torch threads of each process")
    encoder_dp_balance: bool = Field(
        False, description="deal the samples of a step so that replicas have equal numbers of image patches"
    )
    log_tps: bool = Field(False, description="log the tokens of a sample, images and text, padding left out")
    save_hf: str | None = Field(
        None, description="directory: write the weights there at the end, as model.hf is written"
    )
    distributed_optimizer: bool = Field(False, description="replicas share the optimizer's states between them")
    overlap_grad_reduce: bool = Field(False, description="reduce gradients over replicas while others are computed")
    recompute: Literal["none", "full", "selective"] = Field("none", description="activations computed twice")
    trace_iterations: int = Field(
        0, ge=0, description="steps, from the 3rd, whose times each pipeline rank writes to output_dir/trace; 0: none"
    )

    @property
    def traced_iterations(self) -> range:
        """The steps that are traced: after warm-up, one after the other."""
        return range(FIRST_TRACED_ITERATION, FIRST_TRACED_ITERATION + self.trace_iterations)


class HardwareSection(Section):
    """What the sites are made of, for planning only: nothing here changes what is trained.

    The speeds are *sustained* ones, what a matrix product of the model's sizes reaches, not the data sheet's peak. The
    defaults are modest: a workstation's GPU at the edge, a data centre's in the cloud, and a WAN between them.
    """

    edge_tflops: float = Field(10.0, gt=0.0, description="sustained speed of one edge device, 1e12 operations/s")
    cloud_tflops: float = Field(100.0, gt=0.0, description="sustained speed of one cloud device, 1e12 operations/s")
    edge_memory_gib: float | None = Field(None, gt=0.0, description="memory of one edge device, GiB; null: no limit")
    cloud_memory_gib: float | None = Field(None, gt=0.0, description="memory of one cloud device, GiB; null: no limit")
    link_latency_ms: float = Field(10.0, ge=0.0, description="from site to site, one way, milliseconds")
    link_bandwidth_gbps: float | None = Field(
        1.0, gt=0.0, description="of the whole link, each way, Gbit/s; null: no limit"
    )
    vocab_size: int = Field(32_000, ge=1, description="tokens that a tokenizer other than `bytes` is taken to know")
    images_per_sample: float = Field(
        1.0, ge=0.0, description="images that a sample is taken to have, squares of vision.max_pixels, with vision"
    )
