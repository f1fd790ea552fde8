"""How many bytes a microbatch keeps from its F to its B, by arithmetic on shapes.

This follows section 4 of Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models"
(arXiv:2205.05198): what autograd keeps of each operation. Their `s b h (34 + 5 a s / h)` bytes a layer are for 16 bits,
LayerNorm, gelu, dropout and learned positions. Here the first term comes out equal, and the second is 7: megatron-core's
softmax, unfused, keeps its output in fp32 (4 bytes instead of 2). The rest generalises it to what a config can ask for,
as megatron-core's local layer spec and torch's own operations have it (a fused RMSNorm would keep less). A dropout mask
is taken for 1 byte an element, as accelerators keep it; a CPU keeps it in the dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

from ldt_schedules.topology import Site
from ldt_schedules.training.config import TrainConfig
from ldt_schedules.training.parameters import ELEMENT_BYTES
from ldt_schedules.training.sections import ModelSection

FP32_BYTES = 4

_MASK = 1  # bytes of an element of a dropout or causal mask


@dataclass(frozen=True, slots=True)
class Shapes:
    """Bytes of one microbatch on one tensor-parallel process of one site.

    Attributes:
        tokens: s b.
        element, compute: bytes of an element, and of one where Megatron and torch compute 16 bits in fp32.
        tensor: tensor-parallel processes; `sequence` of them share what is between the parallel parts, too.
    """

    model: ModelSection
    tokens: float
    element: int
    compute: int
    tensor: int
    sequence: int

    @classmethod
    def of(cls, config: TrainConfig, site: Site) -> Shapes:
        element, size = ELEMENT_BYTES[config.model.precision], config.topology.size(site)
        sequence = size.tensor if size.sequence_parallel else 1
        tokens = config.model.seq_length * config.train.micro_batch_size
        return cls(config.model, tokens, element, max(element, FP32_BYTES), size.tensor, sequence)

    @property
    def message(self) -> float:
        """What crosses the link: one copy of the residual stream, whoever carries it."""
        return self.stream * self.sequence

    @property
    def gated(self) -> bool:
        return self.model.activation == "swiglu"

    @property
    def stream(self) -> float:
        """The residual stream, s b h elements, as one process holds it: what goes from layer to layer."""
        return self.tokens * self.model.hidden_size * self.element / self.sequence

    @property
    def norm_casts(self) -> bool:
        """Does a norm keep a wider copy of its input, not the input?"""
        return self.model.normalization == "RMSNorm" and self.element < self.compute

    @property
    def norm(self) -> float:
        """LayerNorm: input, output, mean and deviation. RMSNorm is composed: input and quotient as computed, output."""
        wide = self.tokens * self.model.hidden_size / self.sequence
        statistic = self.tokens * self.compute / self.sequence
        if self.model.normalization == "LayerNorm":
            return 2 * wide * self.element + 2 * statistic
        return wide * (2 * self.compute + self.element) + statistic

    @property
    def dropout_mask(self) -> float:
        wide = self.tokens * self.model.hidden_size / self.sequence
        return wide * _MASK if self.model.dropout else 0.0

    def layer_work(self, attended: float) -> tuple[float, float]:
        """Operations of one layer's forward, of all tensor-parallel processes: products with weights, attention's core.

        Args:
            attended: tokens that a token attends to, on average.
        """
        model, query = self.model, self.model.query_width
        widths = (query + 2 * model.kv_width) + query + model.ffn_hidden_size * (3 if self.gated else 2)
        return 2.0 * self.tokens * model.hidden_size * widths, 2.0 * self.tokens * 2 * attended * query

    def layer(self, recompute: str) -> float:
        """One transformer layer."""
        if recompute == "full":
            return self.stream
        context = self.tokens * self.model.query_width * self.element / self.tensor
        scores = 0.0 if recompute == "selective" else self._scores
        attention = self._qkv(recompute) + self._head_norms(recompute) + scores + context
        return 2 * self.norm + attention + self._mlp + 2 * self.dropout_mask

    def _qkv(self, recompute: str) -> float:
        """Rotated or regrouped queries and keys are copies; without either all three are views of one tensor."""
        model, query, rope = self.model, self.model.query_width, self.model.position_embedding == "rope"
        if recompute == "selective":  # before keys and values are repeated for their groups of heads
            widths = self._together + (query + model.kv_width if rope else query if self._grouped else 0)
        else:
            widths = 3 * query if self._grouped else self._together + (2 * query if rope else 0)
        angles = 4 * model.seq_length * model.head_width * self.element if rope else 0
        return self.tokens * widths * self.element / self.tensor + angles

    @property
    def _together(self) -> int:
        """Width of the one tensor that queries, keys and values are views of."""
        return self.model.query_width + 2 * self.model.kv_width

    @property
    def _grouped(self) -> bool:
        return self.model.kv_width < self.model.query_width

    def _head_norms(self, recompute: str) -> float:
        """Of queries and keys, before they are turned: what went in, where that is kept for nobody else; the quotients of a
        composed RMSNorm; statistics of each head."""
        model, both = self.model, self.model.query_width + self.model.kv_width
        if not model.qk_norm:
            return 0.0
        composed = model.normalization == "RMSNorm"
        statistics = (1 if composed else 2) * (model.num_attention_heads + model.num_query_groups) * self.compute
        alone = self._together if self._grouped and recompute != "selective" else 0
        copied = self._grouped and model.num_query_groups > self.tensor  # several groups' queries; keys are a view
        given = alone + (model.query_width if copied else 0)
        inputs = both * self.compute if self.norm_casts else given * self.element
        outputs = 0 if model.position_embedding == "rope" or self._grouped else both * self.element
        widths = inputs + outputs + (both * self.compute if composed else 0)
        return self.tokens * (widths + statistics) / self.tensor

    @property
    def _scores(self) -> float:
        """The softmax's output; what is multiplied with the values, where that is another tensor; masks."""
        model = self.model
        square = self.tokens * model.seq_length * model.num_attention_heads / self.tensor
        copied = self.element < self.compute or bool(model.dropout)
        each = self.compute + (self.element if copied else 0) + (_MASK if model.dropout else 0)
        return square * each + model.seq_length**2 * _MASK

    @property
    def _mlp(self) -> float:
        """gelu: its input and output. A gate: both halves of the input, the second half once more, silu and product."""
        return self.tokens * self.model.ffn_hidden_size * (5 if self.gated else 2) * self.element / self.tensor

    def logits(self, vocab_size: int) -> float:
        """The cross entropy's exponentials, fp32 or wider."""
        return self.tokens * vocab_size * self.compute / self.tensor

    def workspace(self, recompute: str, vocab_size: int) -> float:
        """What is needed once, whatever is in flight: a recomputed layer, the buffer of scores, 16-bit logits."""
        again = self.layer("none") - self.layer(recompute)
        scores = self.tokens * self.model.seq_length * self.model.num_attention_heads * self.element
        logits = self.tokens * vocab_size * self.element if self.element < FP32_BYTES else 0
        return again + (scores + logits) / self.tensor
