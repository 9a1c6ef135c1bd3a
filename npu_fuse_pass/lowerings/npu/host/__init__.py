"""What the host computes of a step before the device runs it: numbers, step counters."""
