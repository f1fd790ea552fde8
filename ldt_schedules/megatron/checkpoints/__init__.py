"""Checkpoints of one site, in megatron-core's own format (`torch_dist`), and what turns them into other models' files.

layer_keys.py        how a site names the layers that it holds
safe_pickle.py       reading a pickle without running what is written in it
torch_dist.py        the format: what is in a checkpoint, and regions of its tensors
torch_dist_writer.py writes the format, one tensor after the other
strategies.py        both of them as megatron-core's dist_checkpointing takes them
site_state.py        what a process keeps: model, optimizer, schedule, random states
site_directory.py    the directories of a site: one for each step, complete or not there at all
"""
