"""The U inside Megatron-LM's own training script: one command line in, two stock worlds out.

torchrun ... -m ldt_schedules launch pretrain_gpt.py --layerwise-disaggregated-training ...
    │
    ├─ flags.py          our argument group, and the few of Megatron's that a site must have otherwise
    ├─ sites.py          both sites from the flags; what this process is
    ├─ site_arguments.py this site's plain Megatron command line
    ├─ environment.py    this site's RANK, WORLD_SIZE, MASTER_PORT, and where the link is
    ├─ schedule.py       the planner's tables, or the user's own
    ├─ refusals.py       what a U cannot honour, by name
    ├─ adaptor.py        does all of the above, then applies the patches
    └─ script.py         runs the user's script
          │
          └─ joining.py, model.py, loop.py    what the patches put into megatron.training
"""
