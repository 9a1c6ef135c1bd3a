"""Reports: results of the pass for a step, as data and as text. Nothing here decides what is compiled."""
