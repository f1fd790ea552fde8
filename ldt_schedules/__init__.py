"""LDT Schedules: train a large model while its data stays in its own building.

`ldt_schedules.planning` is free of torch and Megatron; `ldt --help` shows what can be done from the command line.
"""

__version__ = "0.1.0"
