"""`import ldt_schedules.megatron_adaptor` as the first line of a Megatron-LM script does what `ldt launch` does."""

from ldt_schedules.cli.errors import messages_of_one_of_many
from ldt_schedules.cli.launch import enter_site

with messages_of_one_of_many():
    enter_site()
