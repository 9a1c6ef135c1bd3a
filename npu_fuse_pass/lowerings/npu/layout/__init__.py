"""Which tensors of a group are adjacent in memory, and how a graph takes them."""
