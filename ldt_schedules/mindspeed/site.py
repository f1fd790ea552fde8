"""Makes this process one of its site's inside MindSpeed-LLM, in two steps.

MindSpeed reads the command line first, then puts its own modules in the place of Apex and Transformer Engine, and only then may
Megatron be imported. So what `megatron_lm.adaptor.adopt` does at once is taken apart, from the same parts:

    enter      the list of features is set     command line and environment become the site's; no Megatron is imported
    prepare    features register patches       what a U cannot honour is refused, the link is expected
"""

from __future__ import annotations

import os
import sys

from ldt_schedules.megatron_lm import environment, flags
from ldt_schedules.megatron_lm.refusals import refuse_what_a_u_cannot_honour
from ldt_schedules.megatron_lm.site_arguments import site_arguments, without
from ldt_schedules.megatron_lm.sites import Sites, sites
from ldt_schedules.topology import Site

EDGE_ONLY_FLAGS = ("--tokenizer-name-or-path",)
"""MindSpeed-LLM's own: a path that the cloud has no use for."""

_entered: tuple[Sites, str, int] | None = None


def enter() -> bool:
    """Read the command line; with the switch on it, become a process of one site. Is the switch on?

    Raises:
        ConfigError: the user's mistake.
    """
    global _entered
    if flags.is_on(sys.argv[1:]):
        found = sites(flags.parse(sys.argv[1:]), *environment.launched_as(os.environ))
        _entered = (found, *environment.enter_site(found, os.environ))
        arguments = site_arguments(found)
        sys.argv[1:] = without(arguments, EDGE_ONLY_FLAGS) if found.place.site is Site.CLOUD else arguments
    return _entered is not None


def prepare() -> None:
    """Refuse what cannot be honoured; remember where the link is, for when Megatron has started.

    Raises:
        ConfigError: an argument that two sites cannot honour, or a schedule that cannot be run.
    """
    from ldt_schedules.megatron_lm import joining
    from ldt_schedules.megatron_lm.adaptor import known_to_megatron
    from ldt_schedules.megatron_lm.schedule import schedule_of

    assert _entered is not None, "the switch is on, but no site has been entered"
    found, host, port = _entered
    refuse_what_a_u_cannot_honour(found.flags.others, known_to_megatron(), found.flags.layers)
    joining.expect(found, schedule_of(found), host, port)
