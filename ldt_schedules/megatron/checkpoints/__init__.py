"""Checkpoints of one site, in megatron-core's own format (`torch_dist`).

layer_keys.py        how a site names the layers that it holds
safe_pickle.py       reading a pickle without running what is written in it
torch_dist.py        the format: what is in a checkpoint, and regions of its tensors
torch_dist_writer.py writes the format, one tensor after the other
strategies.py        both of them, for the sharded state dicts of megatron-core's dist_checkpointing
site_state.py        what a process keeps: model, optimizer, schedule;   random_states.py
site_directory.py    the directories of a site: one for each step, complete or not there at all
site_saver.py        saves a step, while training waits or goes on;   verifying.py: is it what was written?
"""
