"""What generated kernels of every platform share: the sweeps over memory in which they work, printing of formulas."""
