"""What the pass did with a step, as data and as text. Outputs only: nothing here decides what is compiled."""
