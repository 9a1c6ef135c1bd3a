"""The callables that Dynamo calls at every step, and what they do when a step cannot run fused."""
