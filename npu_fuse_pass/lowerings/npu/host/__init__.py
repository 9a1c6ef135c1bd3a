"""The host's part of a step, computed before the device runs: numbers, step counters."""
