"""`ldt launch`: a Megatron-LM training script, split over two sites by one flag."""

from __future__ import annotations

import typer

HELP = """Run a Megatron-LM training script over two sites.

One process of a launcher's many (torchrun, srun). The script is your own, unmodified; --layerwise-disaggregated-training
splits the model, and without it the script runs as always. One command line serves both sites.

Example, both sites on this machine:

  torchrun --nproc-per-node 3 -m ldt_schedules launch pretrain_gpt.py --layerwise-disaggregated-training
      --pipeline-model-parallel-size 3 --num-layers 8 --ldt-layers 1,3,3,1 ...

`ldt launch SCRIPT --help` shows Megatron's own flags.
"""


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command(
        "launch",
        help=HELP,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
        add_help_option=False,
    )(launch)


def launch(context: typer.Context) -> None:
    """See HELP."""
    from ldt_schedules.megatron_lm.flags import parser

    arguments = context.args
    if not arguments or arguments[0] in ("-h", "--help"):
        typer.echo(context.get_help())
        typer.echo(parser().format_help())
        raise typer.Exit(0 if arguments else 2)

    from ldt_schedules.cli.errors import messages_of_one_of_many
    from ldt_schedules.megatron_lm.script import prepare_script, run_script

    with messages_of_one_of_many():
        prepare_script(arguments[0], arguments[1:])
        enter_site()
        try:
            run_script(arguments[0])
        except SystemExit as stop:
            if stop.code == 0:
                leave_world()
            raise
        leave_world()


def enter_site() -> None:
    """Make this process one of its site's, as its command line says, and let the edge's first process show the split."""
    # Only now, when the script's folder is on the path: a checkout of Megatron-LM brings its own megatron-core.
    from ldt_schedules.megatron_lm.adaptor import adopt
    from ldt_schedules.megatron_lm.describe import description

    sites = adopt()
    if sites is not None and sites.place.global_rank == 0:
        typer.echo(description(sites))


def leave_world() -> None:
    """Megatron leaves its process groups to the end of the process, where their threads may outlive what they use."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
