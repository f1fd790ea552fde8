"""Turns this process into one of its site's Megatron world, and Megatron's training loop into one of a split model.

`ldt launch` calls `adopt` before it runs the user's script; a script may do the same with its first line,
`import ldt_schedules.megatron_adaptor`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection

import patches
from ldt_schedules import device
from ldt_schedules.errors import ConfigError
from ldt_schedules.megatron_lm import environment, flags
from ldt_schedules.megatron_lm.cpu import prepare_for_cpu
from ldt_schedules.megatron_lm.refusals import refuse_what_a_u_cannot_honour
from ldt_schedules.megatron_lm.schedule import schedule_of
from ldt_schedules.megatron_lm.site_arguments import site_arguments
from ldt_schedules.megatron_lm.sites import Sites, sites


def adopt(arguments: list[str] | None = None) -> Sites | None:
    """Read the command line; with the switch on it, make this process one of its site's.

    Changes `sys.argv` and the environment to the site's own and applies the patches. Without the switch nothing is
    changed, but that on a CPU the CPU adaptor is applied.

    Args:
        arguments: the command line without the script; default that of this process.

    Returns:
        the sites; None without the switch.

    Raises:
        ConfigError: the user's mistake, before anything expensive.
        patches.manager.PatchError: Megatron is not one of those that the patches were written for.
    """
    given = sys.argv[1:] if arguments is None else arguments
    if device.device_type() == "cpu":
        prepare_for_cpu()
    # Only now: it loads megatron-core.
    from ldt_schedules.megatron_lm import joining

    if not flags.is_on(given):
        _refuse_flags_without_switch(given)
        return None
    read = flags.parse(given)
    found = sites(read, *environment.launched_as(os.environ))
    refuse_what_a_u_cannot_honour(read.others, known_to_megatron(), read.layers)
    schedule = schedule_of(found)
    patches.apply_for_megatron_lm()
    joining.expect(found, schedule, *environment.enter_site(found, os.environ))
    sys.argv[1:] = site_arguments(found)
    return found


def known_to_megatron() -> Collection[str]:
    """Every flag of the installed Megatron-LM.

    Raises:
        ConfigError: there is none.
    """
    try:
        from megatron.training.arguments import add_megatron_arguments
    except ImportError as error:
        raise ConfigError(
            f"megatron.training cannot be imported ({error}): run a script of a Megatron-LM checkout (core_v0.12.1 to "
            "core_v0.16.1), or put the checkout on PYTHONPATH"
        ) from error
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    return {option for action in parser._actions for option in action.option_strings}


def _refuse_flags_without_switch(given: list[str]) -> None:
    ours = [argument.partition("=")[0] for argument in given if argument.startswith("--ldt-")]
    if ours:
        raise ConfigError(
            f"{', '.join(ours)} without {flags.SWITCH}: add it to train over two sites, or leave them out"
        )
