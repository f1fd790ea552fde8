"""Weights from a Hugging Face directory into the parts of a split model, and back.

architectures.py   which models are known; finds a directory's own
qwen2_5_vl.py, decoder_only.py   their tables: Megatron's names, the directory's names, how tensors are packed
decoder_layers.py        what these have in common
*_settings.py      what config.json says, in our config keys;   language_settings.py   what these have in common
mapping.py         the vocabulary of tables;   packing.py   how rows of tensors lie in Megatron's;   sizes.py
directory.py       names, shapes and dtypes of a directory, and slices of its tensors
loading.py         fills parameters;   saving.py   writes a directory;   safetensors_file.py   writes one file of it
"""
