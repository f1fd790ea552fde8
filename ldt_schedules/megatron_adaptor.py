"""`import ldt_schedules.megatron_adaptor` as the first line of a Megatron-LM script does what `ldt launch` does."""

from ldt_schedules.megatron_lm.adaptor import adopt
from ldt_schedules.megatron_lm.messages import messages_of_this_process

with messages_of_this_process():
    adopt()
