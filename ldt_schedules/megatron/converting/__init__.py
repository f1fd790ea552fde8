"""Checkpoints of two sites, of plain Megatron and of Hugging Face, made into one another: tensor by tensor, without a model.

step_paths.py        which step a path means;   sites.py, parts.py: two sites' checkpoints, or a plain one, as one model
merging.py           two sites -> stock Megatron
splitting.py         stock Megatron -> one site;   huggingface_splitting.py: the same of a Hugging Face directory
from_huggingface.py  to_huggingface.py
assembling.py        writes the result of each
module_states.py     what lies beside tensors: states of modules, read without running anything
parameter_keys.py    how a checkpoint spells the names of parameters
common_state.py      megatron_arguments.py   plain_values.py: what Megatron looks for beside tensors
"""
