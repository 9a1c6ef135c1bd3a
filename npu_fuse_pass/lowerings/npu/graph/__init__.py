"""The FX graph that torchair gets for a step, and the converters of its nodes to GE operations."""
