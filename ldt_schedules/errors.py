"""What this project raises; the command line turns these into one message and an exit code."""

from __future__ import annotations

USER_MISTAKE = 2
FAILURE = 1


class LdtError(Exception):
    """Something failed at run time: exit code 1."""


class ConfigError(LdtError):
    """A user's mistake: exit code 2. The message says what was given, what is allowed and what to change."""


class LinkError(LdtError):
    """A message to or from another process failed. Seldom the beginning: the other one may have failed before."""
