"""Facts about tensors and their memory: no compiler, no optimizer."""
