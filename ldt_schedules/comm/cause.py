"""Why all processes of a run stop."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from ldt_schedules.errors import LdtError


@dataclass(frozen=True)
class Cause:
    """What the first process to fail says of it. The others' failures are consequences.

    Attributes:
        text: all of it in one sentence.
        rank: of the process, as the link counts.
        index: of the action in its row.
        process: by its name, `cloud rank 1`.
        step: of the run; None outside of one.
        action: what it was at, as the table writes it.
        error: the exception's type.
        mistake: a user's: exit code 2.
    """

    text: str
    rank: int | None = None
    index: int | None = None
    process: str | None = None
    step: int | None = None
    action: str | None = None
    error: str | None = None
    mistake: bool = False

    def to_message(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_message(cls, message: Any) -> Cause:
        """Raises ValueError where it is not what `to_message` gave."""
        types = {"rank": int, "index": int, "step": int, "mistake": bool}
        if not isinstance(message, dict) or not isinstance(message.get("text"), str):
            raise ValueError("a cause is an object with a text")
        known = {field.name for field in fields(cls)}
        for name, value in message.items():
            if name not in known or not (value is None or type(value) is types.get(name, str)):
                raise ValueError(f"a cause cannot have {name!r}: {value!r}")
        return cls(**message)


class Aborted(LdtError):
    """Another process has failed.

    Attributes:
        cause: what it declared.
    """

    def __init__(self, cause: Cause) -> None:
        super().__init__(f"stopped because {cause.text}")
        self.cause = cause

    @staticmethod
    def behind(error: BaseException | None) -> Aborted | None:
        """The abort that an error comes from; None: it is a beginning."""
        while error is not None and not isinstance(error, Aborted):
            error = error.__cause__
        return error
