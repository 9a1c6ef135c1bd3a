"""Capture: from an FX graph, or an update rule, to the updates of its leaves as expressions."""
