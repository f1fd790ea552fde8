"""How many layers each stage of a two-lap U holds: the vision encoder's in the first lap, the language model's in the second.

Two ways to write 18 and 32 layers over P = 3 (edge, two cloud ranks):

    vit: [3, 7, 7, 1]       head, cloud 1, cloud 2, and what the edge holds when the lap comes back
    llm: [0, 16, 16, 0]

    vit: [[3, 7, 7], [1, 0, 0], [0, 0, 0]]          MindSpeed-MM's `pipeline_num_layers`: a row for each model chunk,
    llm: [[0, 0, 0], [0, 16, 16], [0, 0, 0]]        a column for each pipeline rank

The last entry of the vision lap and the first of the language lap are one stage, on the edge. An edge that is alone holds
all of both in one stage:

    vit: [18]
    llm: [32]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.layers import parse_layers, stage_of_layer
from ldt_schedules.planning.layout import Layout

VIT, LLM = "vit", "llm"


@dataclass(frozen=True, slots=True)
class LapLayers:
    """Layers of each place of a lap: edge, cloud 1, ..., edge again.

    Attributes:
        vit: of the stages 0..P.
        llm: of the stages P..2P. An edge that is alone has one stage, number 0, and one entry in each.

    Raises:
        ScheduleError: the laps have not as many entries as each other, or as any U; or an entry is below 0.
    """

    vit: tuple[int, ...]
    llm: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.vit) != len(self.llm) or len(self.vit) in (0, 2) or min(*self.vit, *self.llm) < 0:
            raise ScheduleError(
                f"layers {list(self.vit)} of the ViT and {list(self.llm)} of the language model: each list needs one "
                "number, 0 or more, for each of the P + 1 stages of its lap, or one in all for an edge that is alone"
            )

    @property
    def num_ranks(self) -> int:
        """Pipeline ranks of a lap, P; 1 of an edge that is alone."""
        return max(1, self.joining_stage)

    @property
    def num_stages(self) -> int:
        """2P + 1; 1 of an edge that is alone."""
        return 2 * self.joining_stage + 1

    @property
    def joining_stage(self) -> int:
        """The stage that ends the first lap and begins the second: P; 0 of an edge that is alone."""
        return len(self.vit) - 1

    def layers_of(self, stage: int) -> tuple[int, int]:
        """Vision and language layers of a stage."""
        joining = self.joining_stage
        return self.vit[stage] if stage <= joining else 0, self.llm[stage - joining] if stage >= joining else 0

    def stage_of(self, lap: str, layer: int) -> int:
        """The stage that holds layer number `layer`, from 0, of the `vit` or of the `llm`."""
        if lap == VIT:
            return stage_of_layer(self.vit, layer)
        return self.joining_stage + stage_of_layer(self.llm, layer)

    def layout(self, domains: int = 1) -> Layout:
        """The stages on their ranks, with a cloud pipeline for each domain."""
        return Layout.laps(self.num_ranks, 2, domains) if self.num_ranks > 1 else Layout.alone()


def parse_lap_layers(value: Any, num_vit_layers: int, num_llm_layers: int, num_ranks: int) -> LapLayers:
    """Read `{"vit": ..., "llm": ...}`, each in one of the forms above or any of `parse_layers`; None splits evenly,
    with a layer on the edge before the link.

    Raises:
        ScheduleError: another key, or what `parse_layers` and the rows' form refuse.
    """
    if value is None:
        value = {}
    if not isinstance(value, Mapping) or value.keys() - {VIT, LLM}:
        raise ScheduleError(
            f"layers {value!r}: a vision-language model needs the layers of both laps, for example "
            "{vit: [3, 7, 7, 1], llm: [0, 16, 16, 0]}"
        )
    return LapLayers(
        _one_lap(VIT, value.get(VIT), num_vit_layers, num_ranks),
        _one_lap(LLM, value.get(LLM), num_llm_layers, num_ranks),
    )


def frozen_stages(layers: LapLayers, frozen: frozenset[str]) -> set[int]:
    """The stages without a trained parameter.

    Args:
        frozen: of `vit` (patch embedding and vision layers), `projector` (on the joining stage) and `language` (text
            embedding, on the joining stage; language layers; norm and output layer, in the tail).
    """
    joining = layers.joining_stage
    parts = {stage: {"vit"} for stage in range(joining)}
    parts[joining] = {"projector", "language"} | ({"vit"} if layers.vit[joining] else set())
    parts |= {stage: {"language"} for stage in range(joining + 1, layers.num_stages)}
    return {stage for stage, held in parts.items() if held <= frozen}


def _one_lap(name: str, value: Any, num_layers: int, num_ranks: int) -> tuple[int, ...]:
    try:
        counts = _from_rows(name, value, num_ranks) if _is_rows(value) else value
        layers = parse_layers(counts, num_layers, num_ranks)
        return layers if value is not None else _edge_first(layers)
    except ScheduleError as error:
        raise ScheduleError(f"{name}: {error}") from None


def _edge_first(layers: tuple[int, ...]) -> tuple[int, ...]:
    """An even split in which the edge has a layer before anything crosses: bare embeddings are easily read."""
    if layers[0]:
        return layers
    given = list(layers)
    given[max(range(len(given)), key=given.__getitem__)] -= 1
    return (1, *given[1:])


def _is_rows(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and any(isinstance(row, list | tuple) for row in value)
    )


def _from_rows(name: str, rows: Any, num_ranks: int) -> list[int]:
    """The places of a lap, from a row for each of the three chunks of every rank."""
    if len(rows) != 3 or any(not isinstance(row, list | tuple) or len(row) != num_ranks for row in rows):
        raise ScheduleError(
            f"layers {rows!r}: three rows of {num_ranks} counts are needed, a row for each model chunk and a column for "
            "each pipeline rank"
        )
    first = 0 if name == VIT else 1
    counts = [*rows[first], rows[first + 1][0]]
    elsewhere = [*rows[first + 1][1:], *rows[2 if name == VIT else 0]]
    if any(elsewhere):
        where = "row 1 and the edge's column of row 2" if name == VIT else "row 2 and the edge's column of row 3"
        raise ScheduleError(f"layers {rows!r}: layers of the {name} may stand in {where} only, all others must be 0")
    return counts
