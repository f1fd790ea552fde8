"""What goes wrong with a schedule, as one exception for people."""

from __future__ import annotations


class ScheduleError(ValueError):
    """A layout, an action or a table that cannot be what its author meant.

    A user's mistake: the command line prints the message and exits with code 2.
    """
