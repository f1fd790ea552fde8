"""The small trainer on megatron-core: configuration, data, screens, launcher, loop."""
