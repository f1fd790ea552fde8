"""The vocabulary of a schedule: what one pipeline rank can be told to do.

An action says *what* (`Kind`), *for which stage*, *for which microbatches* and, when it crosses ranks,
*with whom*. The peer is always written down: nothing at run time works out who the other side is.

Text form (the only one; tables, logs and error messages all use it):

    F s0 m0               forward of stage 0, microbatch 0
    B s0 m(0,1)           full backward of microbatches 0 and 1 in one pass ("packed")
    SEND_F s0 m0 ->1      send the activation of stage 0 to pipeline rank 1
    RECV_B s0 m0 <-1      receive the gradient of stage 0's output from pipeline rank 1
    RECV_F s2 m0 <-0/s1   receive the activation of stage 1 from pipeline rank 0, which holds another input too
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from ldt_schedules.planning.errors import ScheduleError


class Kind(str, Enum):
    """The eight things a rank can do. Backward is either one `B` or the pair `I` then `W`."""

    F = "F"
    B = "B"
    I = "I"  # noqa: E741 - the field's name for "gradient of the input"
    W = "W"
    SEND_F = "SEND_F"
    RECV_F = "RECV_F"
    SEND_B = "SEND_B"
    RECV_B = "RECV_B"

    # Set once for each member: these are asked for every action of tables with several hundred thousand.
    is_send: bool
    is_recv: bool
    is_compute: bool
    is_forward: bool
    """Does it belong to the forward pass, so that an evaluation has it too?"""

    peer_is_upstream: bool
    """Is the stage at the peer's end one that the action's stage reads from, and not one that it feeds?"""

    def __init__(self, text: str) -> None:
        self.is_send, self.is_recv = text.startswith("SEND"), text.startswith("RECV")
        self.is_compute = not (self.is_send or self.is_recv)
        self.is_forward = text in ("F", "SEND_F", "RECV_F")
        self.peer_is_upstream = text in ("RECV_F", "SEND_B")

    def __str__(self) -> str:
        return str(self.value)


_TEXT = re.compile(
    r"(?P<kind>F|B|I|W|SEND_F|RECV_F|SEND_B|RECV_B) s(?P<stage>\d{1,9})"
    r" m(?:(?P<one>\d{1,9})|\((?P<many>\d{1,9}(?:,\d{1,9})+)\))"
    r"(?: (?P<arrow>->|<-)(?P<peer>\d{1,9})(?:/s(?P<other>\d{1,9}))?)?"
)


@dataclass(frozen=True, slots=True)
class Action:
    """One entry of a rank's row.

    `other` is the stage at the peer's end of a SEND or RECV. It is written only where the peer holds two neighbours of
    `stage`, so that stage and peer do not say which is meant.

    Raises:
        ScheduleError: a SEND/RECV without a peer, a compute action with one, no or repeated microbatches.
    """

    kind: Kind
    stage: int
    microbatches: tuple[int, ...]
    peer: int | None = None
    other: int | None = None

    def __post_init__(self) -> None:
        if self.kind.is_compute is not (self.peer is None):
            raise ScheduleError(
                f"{self.kind} computes, so it takes no peer, but names rank {self.peer}"
                if self.kind.is_compute
                else f"{self.kind} s{self.stage} names no peer; write {self.kind} s{self.stage} m… "
                f"{'->' if self.kind.is_send else '<-'}RANK"
            )
        if len(self.microbatches) != 1 and len(set(self.microbatches) or ((),)) != len(self.microbatches):
            raise ScheduleError(f"{self.kind} s{self.stage} needs different microbatches, got {self.microbatches}")

    def __str__(self) -> str:
        text = f"{self.kind.value} s{self.stage} m{format_microbatches(self.microbatches)}"
        if self.peer is None:
            return text
        which = "" if self.other is None else f"/s{self.other}"
        return f"{text} {'->' if self.kind.is_send else '<-'}{self.peer}{which}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """Read the text form back; `Action.parse(str(action)) == action`.

        Raises:
            ScheduleError: the text is not exactly one action.
        """
        match = _TEXT.fullmatch(text.strip())
        if match is None:
            raise ScheduleError(
                f"cannot read action {text!r}; expected for example 'F s0 m0', 'B s2 m(0,1)' or 'SEND_F s0 m0 ->1'"
            )
        kind = Kind(match["kind"])
        if match["arrow"] is not None and (match["arrow"] == "->") != kind.is_send:
            raise ScheduleError(f"cannot read action {text!r}: a SEND points '->', a RECV points '<-'")
        microbatches = match["one"] or match["many"]
        return cls(
            kind=kind,
            stage=int(match["stage"]),
            microbatches=tuple(int(m) for m in microbatches.split(",")),
            peer=None if match["peer"] is None else int(match["peer"]),
            other=None if match["other"] is None else int(match["other"]),
        )


def format_microbatches(microbatches: tuple[int, ...]) -> str:
    """`(3,)` -> `3`; `(0, 1)` -> `(0,1)`."""
    if len(microbatches) == 1:
        return str(microbatches[0])
    return "(" + ",".join(str(m) for m in microbatches) + ")"
