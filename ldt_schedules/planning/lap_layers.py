"""How many layers each stage of a two-lap U holds: the vision encoder's in the first lap, the language model's in the second.

Two ways to write 18 and 32 layers over P = 3 (edge, two cloud ranks):

    vit: [3, 7, 7, 1]       head, cloud 1, cloud 2, and what the edge holds when the lap comes back
    llm: [0, 16, 16, 0]

    vit: [[3, 7, 7], [1, 0, 0], [0, 0, 0]]          MindSpeed-MM's `pipeline_num_layers`: a row for each model chunk,
    llm: [[0, 0, 0], [0, 16, 16], [0, 0, 0]]        a column for each pipeline rank

The last entry of the vision lap and the first of the language lap are one stage, on the edge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.layers import parse_layers

VIT, LLM = "vit", "llm"


@dataclass(frozen=True, slots=True)
class LapLayers:
    """Layers of each place of a lap: edge, cloud 1, ..., edge again. Both have `P + 1` entries; 1 where P is 1."""

    vit: tuple[int, ...]
    llm: tuple[int, ...]

    @property
    def num_places(self) -> int:
        """Pipeline ranks of a lap, P."""
        return max(1, len(self.vit) - 1)

    @property
    def joining_stage(self) -> int:
        """The stage that ends the first lap and begins the second."""
        return self.num_places

    def vit_of(self, stage: int) -> int:
        """Vision layers of a stage."""
        return self.vit[stage] if stage < len(self.vit) else 0

    def llm_of(self, stage: int) -> int:
        """Language layers of a stage."""
        return self.llm[stage - self.joining_stage] if stage >= self.joining_stage else 0


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
    joining, tail = layers.joining_stage, 2 * layers.num_places
    parts = {stage: {"vit"} for stage in range(joining)}
    parts[joining] = {"projector", "language"} | ({"vit"} if layers.vit_of(joining) else set())
    parts |= {stage: {"language"} for stage in range(joining + 1, tail + 1)}
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
