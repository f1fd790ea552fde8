"""The U inside megatron-core: its forward-backward contract, its chunks, its gradients, its cross-site scalars."""
