"""Moving tensors between named pipeline ranks. Knows peers and lanes, nothing of schedules or Megatron."""
